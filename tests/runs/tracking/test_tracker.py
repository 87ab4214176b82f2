from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mnist.config import OutputConfig
from mnist.errors import RunError, UserError
from mnist.runs.tracking.tracker import Sink, Tracker, tracker_names


@pytest.fixture(autouse=True)
def no_wandb_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)


class FailingSink:
    """A sink that fails in the calls named, and notes all calls."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise PermissionError(13, "Permission denied", "/.local")

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._call("/".join(values).split("/")[0])

    def model(self, *_: Any) -> None:
        self._call("model")

    def finish(self, *_: Any) -> None:
        self._call("finish")

    def hints(self) -> list[tuple[str, str]]:
        return [("upload", "wandb sync")]


def use_all(tracker: Tracker, tmp_path: Path) -> list[tuple[str, str]]:
    for step in (1, 2):
        tracker.log("train", step, 0.0, loss=1.0)
    tracker.pictures(2, {"samples": tmp_path / "samples.png"})
    tracker.confusion(2, [[1, 0], [0, 1]], ["a", "b"])
    tracker.model(tmp_path, ["best"], {})
    return tracker.finish("finished", {})


@pytest.mark.parametrize(
    ("failing", "complaint"),
    [
        ("train", "lacks points"),
        ("pictures", "lacks the picture samples"),
        ("test", "lacks the confusion matrix"),
        ("model", "lacks the model"),
        ("finish", "is incomplete"),
    ],
)
def test_a_failing_call_fails_alone_and_finish_is_tried(tmp_path: Path, failing: str, complaint: str) -> None:
    warnings: list[str] = []
    sink = FailingSink(failing)
    tracker = Tracker(tmp_path, "digits", warnings.append)
    tracker.attach("W&B", lambda: sink)  # type: ignore[arg-type,return-value]
    assert use_all(tracker, tmp_path) == [("upload", "wandb sync")]
    assert sink.calls == ["train", "train", "pictures", "test", "model", "finish"]
    reason = "(PermissionError: [Errno 13] Permission denied: '/.local')"
    assert set(warnings) == {f"W&B {complaint} {reason}"}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_sink_that_exits_does_not_end_the_run(tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker = Tracker(tmp_path, "digits", warnings.append)

    def start() -> Sink:
        raise SystemExit(255)

    assert not tracker.attach("W&B", start)
    assert warnings == ["W&B did not start (SystemExit: 255)"]


def test_the_reason_of_a_long_message_is_shown_on_one_line(tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker = Tracker(tmp_path, "digits", warnings.append)

    def start() -> Sink:
        raise TypeError(
            "1 validation error for Settings\nrun_tags\n  a tag must have 1 to 64 characters" + "\n at" * 999
        )

    assert not tracker.attach("TensorBoard", start)
    (warning,) = warnings
    assert "a tag must have 1 to 64 characters" in warning
    assert "\n" not in warning
    assert len(warning) < 400


def test_a_record_that_was_not_written_is_an_error_for_all_ranks_to_raise(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "digits", lambda line: None)
    tracker.check()
    tracker._jsonl._file.close()  # type: ignore[union-attr]
    tracker._jsonl._file = Path("/dev/full").open("a", buffering=1)  # type: ignore[union-attr]  # noqa: SIM115
    tracker.log("train", 1, 0.0, loss=1.0)
    with pytest.raises(RunError, match="not written"):
        tracker.check()


def test_records_that_are_gone_are_noticed_before_the_next_one(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "digits", pytest.fail)
    tracker.log("train", 1, 0.1, loss=1.0)
    tracker.check()
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="removed or moved"):
        tracker.check()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(None, "digits", pytest.fail)
    tracker.check()
    assert use_all(tracker, tmp_path) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_that_is_asked_for_and_not_installed_is_a_mistake(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        tracker_names(OutputConfig(wandb=mode))
    assert tracker_names(OutputConfig(wandb="auto")) == []


def test_an_unknown_mode_of_wandb_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match=r"^WANDB_MODE ofline: unknown; did you mean offline\?"):
        tracker_names(OutputConfig())
    assert tracker_names(OutputConfig(wandb="offline")) == ["wandb"], "the flag has the last word"


def test_tensorboard_that_is_not_installed_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        tracker_names(OutputConfig(tensorboard=True))
