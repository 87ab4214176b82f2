"""metrics.jsonl: one record a line, append-only, none doubled after a resume; and its one reader.

In: records, on rank 0. Out: the file; what a reader takes from it, checked.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from mnist.errors import RunError
from mnist.system.files import RecordError, flush, read_regular, refuse_symlink

RECORDS, MAX_BYTES = "metrics.jsonl", 1 << 30
SplitName = Literal["train", "val", "test"]
SPLITS: tuple[str, ...] = get_args(SplitName)


@dataclass(frozen=True)
class Record:
    """What every line holds; a number that was not finite is None. Lines of training have more."""

    step: int
    epoch: float
    split: SplitName
    dataset: str
    loss: float | None
    accuracy: float | None
    lr: float | None = None
    grad_norm: float | None = None


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, without a last line that has no end: a run is writing it, or died while it did.

    Raises:
        RecordError: a line is not a record (names file and line), or `path` is not a regular file.
        OSError: missing, or not readable.
    """
    return [_parse(line, Path(f"{path}: line {number}")) for number, line in enumerate(_read_lines(path), start=1)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Likewise, as dictionaries with all that the lines hold."""
    read_records(path)  # which checks them
    return [msgspec.json.decode(line) for line in _read_lines(path)]


def _read_lines(path: Path) -> list[bytes]:
    return read_regular(path, MAX_BYTES).split(b"\n")[:-1]


def flush_records(run_dir: Path) -> int:
    """Waits until the disk has the records of a run, before what stands for them is written; returns their number."""
    path = run_dir / RECORDS
    refuse_symlink(path)
    if not path.exists():
        return 0
    num_records = len(_read_lines(path))
    flush(path)
    return num_records


def _parse(line: bytes, where: Path) -> Record:
    try:
        return msgspec.json.decode(line, type=Record)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise RecordError(f"{where} is not a record ({error})") from error


class JsonlFile:
    """Append-only metrics.jsonl; knows what it already holds."""

    def __init__(self, path: Path) -> None:
        refuse_symlink(path)
        self._path = path
        records = read_records(path) if path.exists() else []
        self._last_step: dict[str, int] = {record.split: record.step for record in records}
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a process killed while writing leaves a torn line
        self._file = path.open("a", encoding="utf-8", buffering=1)

    @property
    def last_step(self) -> int:
        """The largest step of any record; -1 without one."""
        return max(self._last_step.values(), default=-1)

    def check(self) -> None:
        """Raises a RunError where the file is gone: what is written into it then goes nowhere."""
        if not self._path.exists():
            raise RunError(f"{self._path}: removed or moved while the run was writing it")

    def append(self, record: dict[str, Any]) -> bool:
        """Writes one line unless the file holds this step of this split, or a later one; says whether it did."""
        if record["step"] <= self._last_step.get(record["split"], -1):
            return False
        self._last_step[record["split"]] = record["step"]
        valid = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self.check()
            self._file.write(json.dumps(valid) + "\n")  # JSON has no inf, which an fp16 gradient norm can be
        except OSError as error:
            raise RunError(f"{self._path}: not written ({error.strerror}); free some space there") from error
        return True
