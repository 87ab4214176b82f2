"""What a run has written down about itself, read from outside, while it runs or afterwards.

In: a run directory (metrics.jsonl, and result.json where there is one). Out: `History`, plain numbers. Nothing is
locked and nothing is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from mnist.errors import UserError
from mnist.runs.records import read_run_record
from mnist.runs.tracking.jsonl import SPLITS, Record, read_records
from mnist.system.files import read_json


@dataclass(frozen=True)
class Curve:
    """Values of one split in the order of their steps; nan where a value was not finite or was not recorded."""

    steps: list[int]
    losses: list[float]
    accuracies: list[float]
    learning_rates: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class History:
    """The course of a run.

    Attributes:
        name: the run directory's.
        dataset: as recorded.
        status: of the run, by result.json; None where there is none.
        curves: by split, those that have records.
        epoch_steps: steps per epoch; nan before the first whole record.
        is_smoothed: whether the training loss includes label smoothing, by config.json.
    """

    name: str
    dataset: str
    status: str | None
    curves: dict[str, Curve]
    epoch_steps: float
    is_smoothed: bool = False

    @property
    def last_step(self) -> int:
        """The newest step recorded."""
        return max(curve.steps[-1] for curve in self.curves.values())


def read_history(run_dir: Path) -> History:
    """Reads the records of a run.

    A last line without its end is left out: the run is writing it, or was killed while it did.

    Raises:
        UserError: no such run, or no record yet.
        RecordError: a line is not a record; names line and field.
    """
    try:
        records = read_records(run_dir / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"--run {run_dir}: no metrics.jsonl there ({error.strerror}); name a run directory") from error
    if not records:
        raise UserError(f"--run {run_dir}: no record in metrics.jsonl yet; the first comes after --log-every steps")
    curves = {split: _curve([record for record in records if record.split == split]) for split in SPLITS}
    last, result = records[-1], read_run_record(run_dir)
    return History(
        name=run_dir.resolve().name,
        dataset=last.dataset,
        status=result.status if result else None,
        curves={split: curve for split, curve in curves.items() if curve.steps},
        epoch_steps=last.step / last.epoch if last.epoch > 0 else math.nan,
        is_smoothed=bool(read_json(run_dir / "config.json").get("label_smoothing")),
    )


def _curve(records: list[Record]) -> Curve:
    columns = [[getattr(record, name) for record in records] for name in ("loss", "accuracy", "lr", "grad_norm")]
    return Curve([r.step for r in records], *([math.nan if v is None else v for v in column] for column in columns))
