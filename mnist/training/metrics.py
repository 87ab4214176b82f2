"""Scores as counts: sums are added up, divided once, and the number of samples is checked.

In: a confusion matrix of counts and a sum of losses. Out: `Scores`, plain numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_CLASSES = 10


@dataclass(frozen=True)
class Scores:
    """How a model did on a whole split.

    Attributes:
        loss: mean loss per sample.
        num_correct: samples whose largest logit is the label's.
        num_samples: samples scored.
        confusion: confusion[i][j] = samples of class i taken for class j.
    """

    loss: float
    num_correct: int
    num_samples: int
    confusion: tuple[tuple[int, ...], ...]

    @property
    def accuracy(self) -> float:
        """A fraction in [0, 1]; percent exists only in print."""
        return self.num_correct / self.num_samples

    @property
    def accuracy_per_class(self) -> list[float | None]:
        """The recall of each class, a fraction; None for a class without samples."""
        return [row[k] / sum(row) if sum(row) else None for k, row in enumerate(self.confusion)]

    def as_dict(self) -> dict[str, Any]:
        """The four numbers that records and result.json hold."""
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "num_correct": self.num_correct,
            "num_samples": self.num_samples,
        }

    @classmethod
    def from_sums(cls, loss_sum: float, confusion: Tensor) -> Scores:
        """From the sum of all losses and the confusion counts (10, 10), int64."""
        num_samples = int(confusion.sum())
        return cls(
            loss=loss_sum / num_samples,
            num_correct=int(confusion.diagonal().sum()),
            num_samples=num_samples,
            confusion=tuple(tuple(row) for row in confusion.tolist()),
        )


def add_to_confusion(counts: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Counts a batch into `counts` (100,) in place, on its device and without waiting for it.

    Args:
        counts: flat confusion matrix, row = label; any dtype that holds the counts exactly.
        logits: (B, 10).
        labels: (B,) int64.
    """
    cells = labels * NUM_CLASSES + logits.argmax(dim=1)
    counts.index_add_(0, cells, torch.ones_like(cells, dtype=counts.dtype))
