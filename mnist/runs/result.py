"""The result of a run: what `train` returns, and what anybody can read again from the run directory.

In: a run directory. Out: a `Result`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist.errors import UserError
from mnist.runs.export import TrainedModel, find_export, load_model
from mnist.runs.records import RunRecord, Status, read_run_record
from mnist.runs.tracking.jsonl import read_rows
from mnist.training.metrics import Scores


@dataclass(frozen=True)
class Result:
    """How a run ended. It is small and can be sent to other processes: history and model stay in the run directory.

    Attributes:
        run_dir: where everything is.
        record: result.json, field by field: times, steps, best and validation scores, precision and so on.
    """

    run_dir: Path
    record: RunRecord

    @property
    def status(self) -> Status:
        """From `train` finished or preempted, because other ends are exceptions; from `load_result` any."""
        return self.record.status

    @property
    def test(self) -> Scores | None:
        """Scores of the test set with the confusion matrix; None unless the run has finished."""
        if self.record.test is None or self.record.test_confusion is None:
            return None
        return Scores.from_dict(self.record.test, self.record.test_confusion)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl in the order of the steps: {"step", "epoch", "split", "loss", "accuracy", ...}."""
        return read_rows(self.run_dir / "metrics.jsonl")

    def load_model(self) -> TrainedModel:
        """The weights that were scored on the test set, in evaluation mode on the CPU, with their transform.

        Raises:
            UserError: there are none, because the run has not finished.
        """
        return load_model(find_export(str(self.run_dir)))


def load_result(run_dir: str | Path) -> Result:
    """The result of a run that ended earlier, or in other processes.

    Raises:
        UserError: no run there.
        RecordError: result.json is not what a run writes; names the field.
    """
    record = read_run_record(Path(run_dir))
    if record is None:
        raise UserError(f"{run_dir}: no run there (it has no result.json)")
    return Result(Path(run_dir), record)
