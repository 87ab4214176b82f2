from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mnist.errors import UserError
from mnist.plots.history import read_history
from mnist.system.files import RecordError


def record(at: int, split: str = "train", **values: Any) -> str:
    facts = {"step": at, "epoch": round(at / 469, 4), "split": split, "dataset": "mnist"}
    return json.dumps({**facts, "loss": 1 / at, "accuracy": 0.9, **values}) + "\n"


def write(folder: Path, *lines: str) -> Path:
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_records_become_curves_by_split(tmp_path: Path) -> None:
    write(tmp_path, record(50), record(100), record(100, "val", accuracy=0.95), record(100, "test", loss=0.25))
    facts = {
        "recipe": "fast",
        "dataset": "mnist",
        "seed": 0,
        "num_params": 10,
        "world_size": 1,
        "precision": "fp32",
    } | {"job": "", "host": "h", "pid": 1, "origin": None}
    (tmp_path / "result.json").write_text(json.dumps({"status": "running", **facts}))
    history = read_history(tmp_path)
    assert list(history.curves) == ["train", "val", "test"]
    assert history.curves["train"].steps == [50, 100]
    assert history.curves["train"].losses == [1 / 50, 1 / 100]
    assert history.curves["val"].accuracies == [0.95]
    assert history.curves["test"].losses == [0.25]
    assert (history.name, history.dataset, history.last_step) == (tmp_path.name, "mnist", 100)
    assert history.status == "running"
    assert history.epoch_steps == pytest.approx(469, rel=1e-3)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    history = read_history(write(tmp_path, record(1), record(2), record(3)[:-9]))
    assert history.curves["train"].steps == [1, 2]
    assert history.status is None


def test_a_value_that_was_not_finite_is_nan(tmp_path: Path) -> None:
    history = read_history(write(tmp_path, record(1), record(2, loss=None)))
    assert math.isnan(history.curves["train"].losses[1])


def test_the_length_of_an_epoch_is_unknown_at_its_very_beginning(tmp_path: Path) -> None:
    assert math.isnan(read_history(write(tmp_path, record(1, epoch=0.0))).epoch_steps)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no record in metrics.jsonl yet"),
        ([record(1)[:-9]], "no record in metrics.jsonl yet"),
        ([record(1), "{\n", record(2)], "metrics.jsonl: line 2 is not a record"),
        (["[]\n"], "metrics.jsonl: line 1 is not a record .Expected `object`"),
        (['{"step": 1}\n'], "metrics.jsonl: line 1 .*required field `epoch`"),
        ([record(1, loss="low")], "metrics.jsonl: line 1 .*got `str` - at `..loss`"),
        ([record(1, split="dev")], "metrics.jsonl: line 1 .*Invalid enum value 'dev' - at `..split`"),
        ([record(1, step=0.5)], "metrics.jsonl: line 1 .*got `float` - at `..step`"),
        (["[" * 100_000 + "\n"], "metrics.jsonl: line 1 is not a record"),
    ],
)
def test_what_is_no_history_is_one_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises((UserError, RecordError), match=message) as caught:
        read_history(write(tmp_path, *lines))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--run .*none: no metrics.jsonl there"):
        read_history(tmp_path / "none")
