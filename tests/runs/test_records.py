from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from mnist.config import TrainConfig, to_flat
from mnist.runs.records import Numbers, check_record, read_config, read_run_record
from mnist.runs.result import load_result
from mnist.system.files import RecordError

RUNNING = {
    "status": "running",
    "recipe": "fast",
    "dataset": "mnist",
    "seed": 0,
    "num_params": 17_882,
    "world_size": 1,
    "precision": "fp32",
    "job": "node7-4242-1700000000",
    "host": "node7",
    "pid": 4242,
    "origin": None,
}
SCORES = {"loss": 0.03, "accuracy": 0.99, "num_correct": 9_900, "num_samples": 10_000}
FINISHED = {
    **RUNNING,
    "status": "finished",
    "epochs": 1.0,
    "steps": 235,
    "planned_steps": 235,
    "stop_reason": None,
    "test": SCORES,
    "val": None,
    "best": {"step": 235, **SCORES},
    "test_confusion": [[5, 1], [0, 6]],
    "train_time_s": 1.5,
    "total_time_s": 5,
    "images_per_s": 40_000.0,
}


@dataclass
class Inner:
    numbers: list[int]
    name: str | None = None


@dataclass
class Outer:
    step: int
    share: float
    is_done: bool
    kind: Literal["a", "b"]
    inner: Inner
    scores: dict[str, Numbers] = field(default_factory=dict)
    anything: Any = None


GOOD = {
    "step": 3,
    "share": 1,
    "is_done": False,
    "kind": "a",
    "inner": {"numbers": [1, 2], "name": None},
    "scores": {"val": SCORES},
    "anything": [{}],
}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_record_becomes_an_object_of_its_class() -> None:
    made = check_record(Path("x"), GOOD, Outer)
    assert made == Outer(3, 1, False, "a", Inner([1, 2]), {"val": SCORES}, [{}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 3.5}, r"Expected `int`, got `float` - at `\$.step`"),
        ({"step": 3.0}, r"Expected `int`, got `float` - at `\$.step`"),
        ({"step": True}, r"Expected `int`, got `bool` - at `\$.step`"),
        ({"step": "3"}, r"Expected `int`, got `str` - at `\$.step`"),
        ({"step": None}, r"Expected `int`, got `null` - at `\$.step`"),
        ({"share": True}, r"Expected `float`, got `bool` - at `\$.share`"),
        ({"is_done": 0}, r"Expected `bool`, got `int` - at `\$.is_done`"),
        ({"kind": "c"}, r"Invalid enum value 'c' - at `\$.kind`"),
        ({"kind": []}, r"Expected `str`, got `array` - at `\$.kind`"),
        ({"inner": None}, r"Expected `object`, got `null` - at `\$.inner`"),
        ({"inner": {"name": None}}, r"Object missing required field `numbers` - at `\$.inner`"),
        ({"inner": {"numbers": [1, "x"], "name": None}}, r"Expected `int`, got `str` - at `\$.inner.numbers\[1\]`"),
        ({"inner": {"numbers": [], "name": 1}}, r"Expected `str \| null`, got `int` - at `\$.inner.name`"),
        ({"scores": {"val": {"loss": "1"}}}, r"Expected `int \| float`, got `str` - at `\$.scores\[...\]\[...\]`"),
        ({"scores": []}, r"Expected `object`, got `array` - at `\$.scores`"),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_file_and_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=f"^a/b.json: {message}$"):
        check_record(Path("a/b.json"), {**GOOD, **changes}, Outer)


def test_unknown_names_are_ignored_and_fields_with_a_default_may_be_missing() -> None:
    content = {name: value for name, value in GOOD.items() if name not in ("scores", "anything")}
    assert check_record(Path("x"), {**content, "more": 1}, Outer).scores == {}


@pytest.mark.parametrize("content", [None, [], 1, "text"])
def test_what_is_no_object_is_no_record(content: Any) -> None:
    with pytest.raises(RecordError, match="x: Expected `object`, got"):
        check_record(Path("x"), content, Outer)


def test_the_result_of_a_run_at_its_start_and_at_its_end(tmp_path: Path) -> None:
    assert read_run_record(tmp_path) is None
    write(tmp_path / "result.json", RUNNING)
    started = read_run_record(tmp_path)
    assert started is not None
    assert (started.status, started.test, started.steps) == ("running", None, 0)
    write(tmp_path / "result.json", FINISHED)
    finished = read_run_record(tmp_path)
    assert finished is not None
    assert (finished.steps, finished.test, finished.stop_reason) == (235, SCORES, None)


def test_the_result_that_a_real_run_writes_is_read(smoke_run: Path) -> None:
    written = json.loads((smoke_run / "result.json").read_text())
    result = read_run_record(smoke_run)
    assert result is not None
    assert result.test == written["test"]
    assert result.test_confusion == written["test_confusion"]
    assert to_flat(read_config(smoke_run / "config.json")) == json.loads((smoke_run / "config.json").read_text())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *(
            ({k: v for k, v in FINISHED.items() if k != name}, f"Object missing required field `{name}`")
            for name in ("status", "dataset")
        ),
        ({**FINISHED, "status": "done"}, r"Invalid enum value 'done' - at `\$.status`"),
        ({**FINISHED, "test": None}, "a finished run has test_confusion, and in test accuracy, loss, num_correct"),
        ({**FINISHED, "test": {}}, "a finished run has test_confusion, and in test accuracy, loss, num_correct"),
        ({**FINISHED, "test_confusion": None}, "a finished run has test_confusion, and in test accuracy"),
        ({**FINISHED, "test_confusion": [[1, 2], [3]]}, "test_confusion must be a square of counts"),
        ({**FINISHED, "test_confusion": [[1, 2]]}, "test_confusion must be a square of counts"),
        ({**FINISHED, "test_confusion": [[1, 2], [3, -4]]}, "test_confusion must be a square of counts"),
        ({**FINISHED, "test_confusion": [["a"]]}, r"Expected `int`, got `str` - at `\$.test_confusion\[0\]\[0\]`"),
        ({**FINISHED, "test_confusion": 7}, r"Expected `array \| null`, got `int` - at `\$.test_confusion`"),
    ],
)
def test_a_damaged_result_is_one_line_that_names_the_field(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    write(tmp_path / "result.json", content)
    with pytest.raises(RecordError, match=rf"result\.json: {message}"):
        read_run_record(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing or empty"),
        ({}, "missing or empty"),
        ({"lr": "fast"}, "--lr fast: must be a finite number"),
        ({"lr": [[1]]}, "--lr .*: must be a finite number"),
        ({"model": {"a": 1}}, "--model .*: unknown"),
        ({"colour": 1}, "unknown configuration field: colour"),
        ({**to_flat(TrainConfig()), "epochs": 0}, "--epochs 0: must lie in"),
    ],
)
def test_a_damaged_configuration_is_one_line_that_names_the_field(tmp_path: Path, content: Any, message: str) -> None:
    if content is not None:
        write(tmp_path / "config.json", content)
    with pytest.raises(RecordError, match=rf"config\.json: {message}"):
        read_config(tmp_path / "config.json")


def test_a_metric_that_was_added_is_read_back_with_the_scores(smoke_run: Path, tmp_path: Path) -> None:
    content = json.loads((smoke_run / "result.json").read_text())
    content["test"]["top3"] = 0.75
    (tmp_path / "result.json").write_text(json.dumps(content))
    scores = load_result(tmp_path).test
    assert scores is not None
    assert scores.others == {"top3": 0.75}
    assert scores.as_dict() == content["test"]
