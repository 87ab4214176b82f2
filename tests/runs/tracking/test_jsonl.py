from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mnist.errors import UserError
from mnist.runs.tracking.jsonl import JsonlFile, read_records
from mnist.system.files import RecordError


def record(step: int, split: str = "train", **others: Any) -> dict[str, Any]:
    place = {"step": step, "epoch": step / 10, "split": split, "dataset": "digits"}
    return {**place, "loss": 0.5, "accuracy": 0.25, **others}


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


def test_what_is_written_is_read_back_and_infinity_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = JsonlFile(path)
    file.append(record(1, lr=0.1, grad_norm=float("inf")))
    file.append(record(2, "val", loss=float("nan")))
    first, second = read_records(path)
    assert (first.step, first.split, first.dataset, first.lr, first.grad_norm) == (1, "train", "digits", 0.1, None)
    assert (second.step, second.split, second.loss, second.accuracy) == (2, "val", None, 0.25)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "is not a record"),
        ("[]", "Expected `object`"),
        ("[" * 100_000, "not a record"),
        (json.dumps({"step": 1, "split": "train"}), "required field `epoch`"),
        (json.dumps(record(1) | {"step": 1.5}), r"Expected `int`, got `(float|bool)` - at `\$.step`"),
        (json.dumps(record(1) | {"step": True}), r"Expected `int`, got `(float|bool)` - at `\$.step`"),
        (json.dumps(record(1, "trial")), r"Invalid enum value 'trial' - at `\$.split`"),
        (json.dumps(record(1, loss="low")), r"Expected `float \| null`, got `str` - at `\$.loss`"),
        (json.dumps(record(1, accuracy=float("nan"))), "malformed"),
        ('{"step": ' + "9" * 5000 + "}", "not a record"),
        (json.dumps(record(1, grad_norm=[1])), r"Expected `float \| null`, got `array` - at `\$.grad_norm`"),
    ],
)
def test_a_line_that_is_not_a_record_is_named_by_file_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(1)) + "\n" + line + "\n")
    with pytest.raises(RecordError, match=r"metrics\.jsonl: line 2.*" + message) as caught:
        JsonlFile(tmp_path / "metrics.jsonl")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_not_a_regular_file_is_refused_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "metrics.jsonl"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    with pytest.raises((RecordError, OSError)):
        read_records(path)
    with pytest.raises((RecordError, OSError)):
        JsonlFile(path)


def test_a_symlink_is_refused_by_name_and_its_target_stays(tmp_path: Path) -> None:
    target = tmp_path / "foreign"
    target.write_text("torn")
    (tmp_path / "metrics.jsonl").symlink_to(target)
    with pytest.raises(UserError, match=r"metrics\.jsonl: a symbolic link"):
        JsonlFile(tmp_path / "metrics.jsonl")
    assert target.read_text() == "torn"
