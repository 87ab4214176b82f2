"""What a run has written down about itself, read from outside, while it runs or afterwards.

In: a run directory (metrics.jsonl, and result.json where there is one). Out: `History`, plain numbers. Nothing is
locked and nothing is written.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist.errors import UserError
from mnist.runs.records import Result, read_result

SPLITS = ("train", "val", "test")
_FIELDS = {"step", "epoch", "split", "dataset", "loss", "accuracy"}


@dataclass(frozen=True)
class Curve:
    """Values of one split in the order of their steps; nan where a value was not finite."""

    steps: list[int]
    losses: list[float]
    accuracies: list[float]


@dataclass(frozen=True)
class History:
    """The course of a run.

    Attributes:
        name: the run directory's.
        dataset: as recorded.
        result: result.json; None where there is none.
        curves: by split, those that have records.
        epoch_steps: steps per epoch; nan before the first whole record.
    """

    name: str
    dataset: str
    result: Result | None
    curves: dict[str, Curve]
    epoch_steps: float

    @property
    def last_step(self) -> int:
        """The newest step recorded."""
        return max(curve.steps[-1] for curve in self.curves.values())


def read_history(run_dir: Path) -> History:
    """Reads the records of a run.

    A last line without its end is left out: the run is writing it, or was killed while it did.

    Raises:
        UserError: no such run, no record yet, or a line that is none.
    """
    path = run_dir / "metrics.jsonl"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--run {run_dir}: no metrics.jsonl there ({error.strerror}); name a run directory") from error
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    records = [_parse(line, f"--run {run_dir}: line {number}") for number, line in enumerate(lines, start=1)]
    if not records:
        raise UserError(f"--run {run_dir}: no record in metrics.jsonl yet; the first comes after --log-every steps")
    curves = {split: _curve([r for r in records if r["split"] == split]) for split in SPLITS}
    last = records[-1]
    return History(
        name=run_dir.resolve().name,
        dataset=last["dataset"],
        result=read_result(run_dir),
        curves={split: curve for split, curve in curves.items() if curve.steps},
        epoch_steps=last["step"] / last["epoch"] if last["epoch"] else math.nan,
    )


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(line)
        missing = _FIELDS - record.keys()
    except (ValueError, AttributeError) as error:
        raise UserError(f"{where} of metrics.jsonl is no record ({error})") from error
    if missing:
        raise UserError(f"{where} of metrics.jsonl is no record (no {', '.join(sorted(missing))})")
    return record


def _curve(records: list[dict[str, Any]]) -> Curve:
    def column(name: str) -> list[float]:
        return [math.nan if record[name] is None else record[name] for record in records]

    return Curve([record["step"] for record in records], column("loss"), column("accuracy"))
