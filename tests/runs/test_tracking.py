from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist.config import OutputConfig
from mnist.errors import RunError, UserError
from mnist.runs.tracking import wandb
from mnist.runs.tracking.jsonl import JsonlFile
from mnist.runs.tracking.sink import Sink
from mnist.runs.tracking.tensorboard import TensorBoardRun
from mnist.runs.tracking.tracker import Tracker, tracker_names
from mnist.runs.tracking.wandb import wandb_mode
from mnist.system import signals
from tests.launch.test_launch import wait_until
from tests.processes import TORCHRUN, finish, started, train

SMOKE = [
    *("--recipe", "smoke", "--global-batch-size", "64", "--lr", "5e-3", "--min-accuracy", "0.1"),
    *("--max-steps", "46", "--eval-every", "23", "--checkpoint-every", "23", "--log-every", "23"),
    *("--num-threads", "1", "--run-dir", "run"),
]


@pytest.fixture(autouse=True)
def no_wandb_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.mark.parametrize(
    ("flag", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, "disabled"),
        ("auto", {"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, "offline"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
        ("offline", {"WANDB_MODE": "online", "WANDB_API_KEY": "k"}, "offline"),
        ("online", {}, "offline"),
        ("online", {"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_MODE": "dryrun", "WANDB_API_KEY": "k"}, "offline"),
        ("auto", {"WANDB_MODE": "nonsense", "WANDB_API_KEY": "k"}, "online"),
    ],
)
def test_the_mode_follows_flag_then_environment_then_key(
    monkeypatch: pytest.MonkeyPatch, flag: str, environment: dict[str, str], expected: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(OutputConfig(wandb=flag)) == expected  # type: ignore[arg-type]


def test_a_key_in_netrc_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password key\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(OutputConfig()) == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode(OutputConfig()) == "online"


def record(step: int, split: str = "train") -> dict[str, Any]:
    return {"step": step, "split": split, "loss": 0.5}


def test_records_are_appended_once_and_a_torn_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlFile(path)
    assert [first.append(record(step)) for step in (10, 20)] == [True, True]
    with path.open("a") as file:
        file.write('{"step": 30, "spl')
    second = JsonlFile(path)
    assert [second.append(record(step)) for step in (10, 20, 30)] == [False, False, True]
    assert second.append(record(20, "test"))
    steps = [(line["step"], line["split"]) for line in map(json.loads, path.read_text().splitlines())]
    assert steps == [(10, "train"), (20, "train"), (30, "train"), (20, "test")]


def inspect(folder: Path, *arguments: str) -> str:
    """The one offline run below `folder` as JSON, read back by W&B's own tool."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", *arguments, "--json", str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout


@pytest.mark.launch
def test_two_ranks_leave_one_offline_run_without_a_prompt(tmp_path: Path) -> None:
    command = train(*SMOKE, "--wandb", "auto", launcher=[*TORCHRUN, "--nproc-per-node", "2"])
    done = finish(command, tmp_path, WANDB_MODE="offline", NETRC=os.devnull)
    assert done.code == 0, done.err
    assert "wandb sync run/wandb/offline-run-" in done.out
    found = json.loads(inspect(tmp_path / "run", "--summary"))
    accuracy = json.loads((tmp_path / "run" / "result.json").read_text())["test"]["accuracy"]
    assert found["summary"]["test/accuracy"]["last"] == accuracy
    assert found["config"]["global_batch_size"] == 64
    assert found["exit_code"] == 0
    assert found["summary"]["best/accuracy"] == accuracy
    assert found["summary"]["test/loss"].keys() == {"min", "last"}
    records = [json.loads(line) for line in inspect(tmp_path / "run").splitlines()]
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    points = [(item["trainer/step"], name) for item in items for name in ("train/loss", "test/loss") if name in item]
    assert points == [(23, "train/loss"), (23, "test/loss"), (46, "train/loss"), (46, "test/loss")], "each step once"
    assert {item["trainer/step"] for item in items if "pictures/samples._type" in item} == {46}
    shown = {path.name.split("_")[0] for path in (tmp_path / "run").glob("wandb/*/files/media/images/pictures/*.png")}
    assert shown == {"samples", "curves", "features", "filters", "confusion", "mistakes"}
    models = [r["artifact"] for r in records if r["type"] == "artifact" and r["artifact"]["type"] == "model"]
    assert [sorted(model["aliases"]) for model in models] == [["best", "last", "latest"]]
    listed = {entry["path"] for entry in models[0]["manifest"]["contents"]}
    assert listed == {"config.json", "model.safetensors"}


@pytest.mark.launch
def test_best_and_last_are_two_versions_where_they_differ(tmp_path: Path) -> None:
    rising = ["--schedule", "one_cycle", "--warmup", "0.8", "--lr", "1", "--max-steps", "92", "--val-size", "300"]
    done = finish(train(*SMOKE, *rising, "--wandb", "offline", "--no-pictures"), tmp_path)
    assert done.code == 0, done.err
    assert not (tmp_path / "run" / "pictures").exists()
    records = [json.loads(line) for line in inspect(tmp_path / "run").splitlines()]
    models = [r["artifact"] for r in records if r["type"] == "artifact" and r["artifact"]["type"] == "model"]
    assert [sorted(set(model["aliases"]) - {"latest"}) for model in models] == [["last"], ["best"]]


@pytest.mark.launch
def test_a_preempted_run_is_marked_and_goes_on_under_the_same_id(tmp_path: Path) -> None:
    command = train(*SMOKE, "--wandb", "offline", "--max-steps", "9200")
    with started(command, tmp_path) as process:
        wait_until((tmp_path / "run" / "metrics.jsonl").exists)
        process.terminate()
        assert process.wait(timeout=60) == 75
    assert '"preempting"' in inspect(tmp_path / "run")
    assert json.loads(inspect(tmp_path / "run", "--summary"))["exit_code"] == 75
    run_id = (tmp_path / "run" / "wandb_id").read_text()
    steps = json.loads((tmp_path / "run" / "result.json").read_text())["steps"]
    finish(train(*SMOKE, "--wandb", "offline", "--max-steps", "9200", "--target-accuracy", "0.1"), tmp_path)
    names = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(names) == 2
    assert all(name.endswith(run_id) for name in names)
    assert steps > 0


def hold_connections(listener: socket.socket) -> None:
    kept = []
    while True:
        try:
            kept.append(listener.accept()[0])
        except OSError:
            return


@pytest.mark.launch
@pytest.mark.parametrize("accepts", [False, True], ids=["dead address", "accepts and never answers"])
def test_a_server_that_does_not_answer_costs_a_warning(tmp_path: Path, accepts: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if accepts:
            listener.listen(50)
            threading.Thread(target=hold_connections, args=(listener,), daemon=True).start()
        done = finish(
            train(*SMOKE, "--wandb", "online"),
            tmp_path,
            WANDB_BASE_URL=f"http://127.0.0.1:{port}",
            WANDB_API_KEY="0" * 40,
        )
        listener.shutdown(socket.SHUT_RDWR) if accepts else None
    assert done.code == 0, done.err
    assert "warning" in done.err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") >= 2
    assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb")), "it went on offline"


class FailingSink:
    """A sink that takes the first point, and nothing after it."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, step: int, points: dict[str, float]) -> None:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("gone")


def test_a_sink_that_fails_is_left_alone_and_the_file_goes_on(tmp_path: Path) -> None:
    warnings: list[str] = []
    sink = FailingSink()
    tracker = Tracker(tmp_path, "digits", warnings.append)
    tracker.attach("W&B", lambda: sink)  # type: ignore[arg-type,return-value]
    for step in range(1, 6):
        tracker.log("train", step, 0.0, loss=1.0)
    assert sink.calls == 2
    assert warnings == ["W&B failed and is left alone from here on (ConnectionError: gone)"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert tracker.finish("finished", {}) == []


def test_a_sink_that_does_not_start_costs_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker = Tracker(tmp_path, "digits", warnings.append)

    def start() -> Sink:
        raise TypeError("protobuf is too old\nand more")

    assert not tracker.attach("TensorBoard", start)
    assert warnings == ["TensorBoard did not start (TypeError: protobuf is too old)"]


def test_a_record_that_was_not_written_is_an_error_for_all_ranks_to_raise(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "digits", lambda line: None)
    tracker.check()
    tracker._jsonl._file.close()  # type: ignore[union-attr]
    tracker._jsonl._file = Path("/dev/full").open("a", buffering=1)  # type: ignore[union-attr]  # noqa: SIM115
    tracker.log("train", 1, 0.0, loss=1.0)
    with pytest.raises(RunError, match="not written"):
        tracker.check()


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\nnonsense\n')
    with pytest.raises(RunError, match="line 2 is no record"):
        JsonlFile(tmp_path / "metrics.jsonl")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(None, "digits", lambda line: None)
    tracker.log("train", 1, 0.0, loss=1.0)
    assert tracker.finish("finished", {}) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.launch
def test_tensorboard_shows_what_the_file_holds(tmp_path: Path) -> None:
    done = finish(train(*SMOKE, "--tensorboard"), tmp_path)
    assert done.code == 0, done.err
    assert "tensorboard --logdir run/tensorboard" in done.out
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for split in ("train", "test"):
        records = [record for record in records_of(tmp_path / "run") if record["split"] == split]
        points = [(point.step, point.value) for point in events.Scalars(f"{split}/loss")]
        assert [step for step, _ in points] == [record["step"] for record in records]
        assert [value for _, value in points] == pytest.approx([record["loss"] for record in records])
    assert events.Scalars("perf/epoch_time_s")
    assert events.Scalars("perf/memory_mb")[0].value > 100


def test_tensorboard_hides_what_a_run_has_gone_back_behind(tmp_path: Path) -> None:
    """Five records; a resume from step 3 takes two of them back, a resume after a crash takes none."""
    for wanted, steps in (([1, 2, 3, 4, 5], range(1, 6)), ([1, 2, 3, 4], range(4, 5))):
        if wanted[-1] == 4:
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
            (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]))
        tracker = Tracker(tmp_path, "digits", pytest.fail)
        tracker.attach("TensorBoard", partial(TensorBoardRun, tmp_path, tracker.next_step))
        for step in steps:
            tracker.log("train", step, step / 5, loss=float(step))
        tracker.finish("finished", {})
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [point.step for point in events.Scalars("train/loss")] == wanted
        time.sleep(1.1)  # event files are told apart and ordered by the second


def test_a_server_that_is_slow_at_the_end_leaves_a_preempted_run_its_exit_code() -> None:
    """The end of W&B must fit into the time after a signal, with room for a checkpoint before it."""
    assert wandb.FINISH_TIMEOUT_S <= signals.GRACE_S - 10


def test_records_that_are_gone_are_noticed_before_the_next_one(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "digits", pytest.fail)
    tracker.log("train", 1, 0.1, loss=1.0)
    tracker.check()
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="removed or moved"):
        tracker.check()


@pytest.mark.parametrize("content", ["", "\n", None])
def test_an_id_that_a_crash_has_left_empty_is_made_anew(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "wandb_id").write_text(content)
    found = wandb._run_id(tmp_path)
    assert len(found) == 8
    assert wandb._run_id(tmp_path) == found


def records_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_that_is_asked_for_and_not_installed_is_a_mistake(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        tracker_names(OutputConfig(wandb=mode))
    tracker_names(OutputConfig(wandb="auto"))


def test_an_unknown_mode_of_wandb_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match=r"^WANDB_MODE ofline: unknown; did you mean offline\?"):
        tracker_names(OutputConfig())
    assert tracker_names(OutputConfig(wandb="offline")) == ["wandb"], "the flag has the last word"


def test_tensorboard_that_is_not_installed_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        tracker_names(OutputConfig(tensorboard=True))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for the first kilobytes only."""
    folder = tmp_path / "run" / "wandb"
    folder.mkdir(parents=True)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.launch
def test_a_full_disk_below_wandb_costs_a_warning(tmp_path: Path, full_disk: Path) -> None:
    done = finish(train(*SMOKE, "--wandb", "offline", "--log-every", "1", "--max-steps", "345"), tmp_path)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    assert shutil.disk_usage(full_disk).free < 4096, "the disk was not full"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
    assert len(records_of(tmp_path / "run")) == 15 * 23 + 15
