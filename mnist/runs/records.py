"""Reads the records that the project has written itself, and checks them against the types of their fields.

In: a JSON file, and a dataclass. Out: an object of that class, or one line that names file and field. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

import msgspec

from mnist.config import TrainConfig, from_flat
from mnist.data.sources import DatasetInfo
from mnist.errors import UserError
from mnist.system.files import RecordError, read_json

WEIGHTS_CHECKSUM = "weights_sha256"  # in the config.json of an exported model, beside the configuration
EXPORT_FIELDS = (WEIGHTS_CHECKSUM, *(field.name for field in fields(DatasetInfo)))  # what else is in that file
MANIFEST = "manifest.json"  # what makes a folder a checkpoint

Status = Literal["running", "finished", "preempted", "failed", "diverged"]

T = TypeVar("T")


class ScoreRecord(TypedDict):
    """What `Scores.as_dict` has written."""

    loss: float
    accuracy: float
    num_correct: int
    num_samples: int


class BestRecord(ScoreRecord):
    """The best evaluation, and the step that it was of."""

    step: int


@dataclass(frozen=True)
class RunRecord:
    """What is read back from result.json: the first eleven from the start of a run on, the others at its end."""

    status: Status
    recipe: str
    dataset: str
    seed: int
    num_params: int
    world_size: int
    precision: str
    job: str
    host: str
    pid: int
    origin: str | None
    epochs: float = 0.0
    steps: int = 0
    planned_steps: int = 0
    stop_reason: str | None = None
    test: ScoreRecord | None = None
    val: ScoreRecord | None = None
    best: BestRecord | None = None
    test_confusion: list[list[int]] | None = None
    train_time_s: float = 0.0
    total_time_s: float = 0.0

    def __post_init__(self) -> None:
        rows = self.test_confusion or []
        if any(len(row) != len(rows) or min(row) < 0 for row in rows):
            raise ValueError("test_confusion must be a square of counts")
        if self.status == "finished" and self.test is None:
            raise ValueError("test must be an object in a finished run")


def read_run_record(run_dir: Path) -> RunRecord | None:
    """result.json of a run; None where there is none.

    Raises:
        RecordError: it is not what a run writes; names file and field.
    """
    path = run_dir / "result.json"
    content = read_json(path)
    if not content:
        return None
    record = check_record(path, content, RunRecord, complete=content.get("status") != "running")
    if record.test is not None:
        record.test.update(content["test"])  # with metrics that were added to METRICS, of which no type knows
    return record


def read_config(path: Path) -> TrainConfig:
    """A config.json, of a run or of an exported model.

    Raises:
        RecordError: missing, or not a configuration; names file and field.
    """
    content = read_json(path)
    if not content:
        raise RecordError(f"{path}: missing or empty")
    for name in EXPORT_FIELDS:
        content.pop(name, None)
    try:
        return from_flat(content)
    except (UserError, TypeError, RecursionError) as error:
        raise RecordError(f"{path}: {error}"[:300]) from error


def check_record(path: Path, content: Any, kind: type[T], *, complete: bool) -> T:
    """`content` as a `kind`, a dataclass; all fields, also nested ones, must have the declared types.

    Args:
        path: named in the message.
        content: as JSON has it.
        kind: the class.
        complete: its own fields with a default must be there, too. Unknown names are ignored.

    Raises:
        RecordError: a field is missing or has another type; names file and field.
    """
    try:
        made = msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise RecordError(f"{path}: {error}") from error
    missing = [name for name in kind.__annotations__ if name not in content] if complete else []
    if missing:
        raise RecordError(f"{path}: {missing[0]} is missing")
    return made
