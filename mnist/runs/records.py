"""Reads the records that the project has written itself, and checks them against the types of their fields.

In: a JSON file, and a dataclass. Out: an object of that class, or one line that names file and field. No torch.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from mnist.config import RUNS, TrainConfig, from_flat
from mnist.data.sources import DatasetInfo
from mnist.errors import UserError
from mnist.system.files import RecordError, read_json

WEIGHTS_CHECKSUM = "weights_sha256"  # in the config.json of an exported model, beside the configuration
EXPORT_FIELDS = (WEIGHTS_CHECKSUM, *(field.name for field in fields(DatasetInfo)))  # what else is in that file
MANIFEST = "manifest.json"  # what makes a folder a checkpoint

Status = Literal["running", "finished", "preempted", "failed", "diverged"]

Numbers = dict[str, int | float]  # what `Scores.as_dict` writes, with the step where it is that of the best evaluation

T = TypeVar("T")


@dataclass(frozen=True)
class RunRecord:
    """What is read back from result.json. Fields with a default are written at the end of a run."""

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
    test: Numbers | None = None
    val: Numbers | None = None
    best: Numbers | None = None
    test_confusion: list[list[int]] | None = None
    train_time_s: float = 0.0
    total_time_s: float = 0.0

    def __post_init__(self) -> None:
        rows = self.test_confusion or []
        if any(len(row) != len(rows) or min(row) < 0 for row in rows):
            raise ValueError("test_confusion must be a square of counts")
        expected = {"loss", "accuracy", "num_correct", "num_samples"}
        if self.status == "finished" and not (rows and expected <= (self.test or {}).keys()):
            raise ValueError(f"a finished run has test_confusion, and in test {', '.join(sorted(expected))}")


def runs_with(file: str) -> list[Path]:
    """The run directories below runs/ that hold `file`, newest first by the time of that file.

    Whatever else is in runs/ is passed over: folders of other users, pipes, files.
    """
    found = []
    with contextlib.suppress(OSError):  # no runs/, or not ours to read
        for run in RUNS.iterdir():
            with contextlib.suppress(OSError):
                if (run / file).is_file():
                    found.append(((run / file).stat().st_mtime, run))
    return [run for _, run in sorted(found, reverse=True)]


def read_run_record(run_dir: Path) -> RunRecord | None:
    """result.json of a run; None where there is none.

    Raises:
        RecordError: it is not what a run writes; names file and field.
    """
    path = run_dir / "result.json"
    content = read_json(path)
    return check_record(path, content, RunRecord) if content else None


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


def check_record(path: Path, content: Any, kind: type[T]) -> T:
    """`content`, as JSON has it, as a `kind`, a dataclass; all fields, also nested ones, must have the declared types.

    Unknown names are ignored.

    Raises:
        RecordError: a field is missing or has another type; names `path` and field.
    """
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise RecordError(f"{path}: {error}") from error
