"""Metrics: sums are added up over batches and ranks, divided once, and the number of samples is checked.

In: logits and labels of a batch. Out: sums on the device, and from them plain numbers: `TrainSums` in training and
`Scores` in evaluation. A new metric is one line in `METRICS`, for both. Letters: B images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Metric -> its sum over a batch, a tensor (): from the batch's summed loss (), logits (B, K) and labels (B,).
# Each is added up on the device, summed over ranks, kept in checkpoints, and logged as a mean per image: of the images
# trained on, and of each split that is scored.
METRICS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "loss": lambda loss_sum, _logits, _labels: loss_sum,
    "accuracy": lambda _loss_sum, logits, labels: (logits.argmax(dim=1) == labels).sum(),
}


@dataclass(frozen=True)
class TrainSums:
    """Sums over the images trained on, of all ranks together.

    Attributes:
        totals: metric -> sum over images.
        num_samples: images.
        time_s: seconds in training steps.
    """

    totals: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(METRICS, 0.0))
    num_samples: int = 0
    time_s: float = 0.0

    def __add__(self, other: TrainSums) -> TrainSums:
        return TrainSums(
            {name: self.totals[name] + other.totals[name] for name in METRICS},
            self.num_samples + other.num_samples,
            self.time_s + other.time_s,
        )

    def means(self) -> dict[str, float]:
        """Metric -> mean per image; nan where there are no images."""
        return {name: total / self.num_samples if self.num_samples else math.nan for name, total in self.totals.items()}

    @property
    def images_per_s(self) -> float:
        """Images per second of training, 0 where no time was measured."""
        return self.num_samples / self.time_s if self.time_s else 0.0


@dataclass(frozen=True)
class Scores:
    """How a model did on a whole split.

    Attributes:
        loss: mean loss per sample.
        num_correct: samples whose largest logit is the label's.
        num_samples: samples scored.
        confusion: confusion[i][j] = samples of class i taken for class j.
        others: means of the other metrics per sample, by name.
    """

    loss: float
    num_correct: int
    num_samples: int
    confusion: tuple[tuple[int, ...], ...]
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """A fraction in [0, 1]; percent exists only in print."""
        return self.num_correct / self.num_samples

    @property
    def accuracy_per_class(self) -> list[float | None]:
        """The recall of each class, a fraction; None for a class without samples."""
        return [row[k] / sum(row) if sum(row) else None for k, row in enumerate(self.confusion)]

    def as_dict(self) -> dict[str, Any]:
        """The numbers that records and result.json hold."""
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "num_correct": self.num_correct,
            "num_samples": self.num_samples,
            **self.others,
        }

    @classmethod
    def from_dict(cls, numbers: Mapping[str, float], confusion: Sequence[Sequence[int]]) -> Scores:
        """The inverse of `as_dict`, from JSON."""
        others = dict(numbers)
        loss, num_correct, num_samples = (others.pop(name) for name in ("loss", "num_correct", "num_samples"))
        del others["accuracy"]
        return cls(loss, int(num_correct), int(num_samples), tuple(map(tuple, confusion)), others)

    @classmethod
    def from_sums(cls, totals: Mapping[str, float], confusion: Tensor) -> Scores:
        """From the sum of each metric over all samples, and the confusion counts (K, K), int64."""
        num_samples = int(confusion.sum())
        means = {name: total / num_samples for name, total in totals.items()}
        return cls(
            loss=means["loss"],
            num_correct=int(confusion.diagonal().sum()),
            num_samples=num_samples,
            confusion=tuple(map(tuple, confusion.tolist())),
            others={name: mean for name, mean in means.items() if name not in ("loss", "accuracy")},
        )


def add_to_confusion(counts: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Counts a batch into `counts` (K * K,) in place, on its device and without waiting for it.

    Args:
        counts: flat confusion matrix, row = label; any dtype that holds the counts exactly.
        logits: (B, K).
        labels: (B,) int64.
    """
    cells = labels * logits.shape[1] + logits.argmax(dim=1)
    counts.index_add_(0, cells, torch.ones_like(cells, dtype=counts.dtype))
