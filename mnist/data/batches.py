"""Training batches: who sees which image at which step, as a pure function.

In: a split on the device and the coordinates (seed, epoch, step, rank). Out: this rank's micro-batches, one list per
optimizer step. The global batch of a step depends neither on the number of processes nor on accumulation. Letters: N
images in the split, P ranks, A micro-batches per step and rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from mnist.seeding import derive_seed


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, H, W) or (N, C, H, W), 0 = paper, 255 = ink; labels int64 (N,). Both on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> Split:
        return Split(self.images[rows], self.labels[rows])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        *channels, height, width = self.images.shape[1:]
        return (channels[0] if channels else 1, height, width)

    def repeat(self, copies: int) -> Split:
        """Every image `copies` times: the whole split again and again. One copy is the split itself."""
        if copies == 1:
            return self
        return Split(self.images.repeat(copies, *[1] * (self.images.ndim - 1)), self.labels.repeat(copies))

    def to(self, device: torch.device) -> Split:
        """The split on `device`. MNIST whole is 55 MB, so it lives there for the run."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass of one rank works on.

    Attributes:
        split: holds the images, all of them.
        indices: int64 (B,), the images of this micro-batch in `split`.
        rows: the place of these images in the global batch of the step.
        global_batch_size: images in that global batch; less than usual at the end of an epoch.
        num_samples: B, or 0 for a placeholder: a rank without images still takes part in the backward pass, weighted 0.
    """

    split: Split
    indices: Tensor
    rows: slice
    global_batch_size: int
    num_samples: int

    @property
    def images(self) -> Tensor:
        """uint8 (B, H, W) or (B, C, H, W), gathered by one operation on the device each time they are asked for."""
        return self.split.images.index_select(0, self.indices)

    @property
    def labels(self) -> Tensor:
        """int64 (B,), likewise."""
        return self.split.labels.index_select(0, self.indices)


@dataclass(frozen=True, kw_only=True)
class TrainLoader:
    """Serves the training split to one rank, in a new order each epoch; nothing in it ever needs to be saved.

    Not for `accelerator.prepare`: a prepared loader replays the first epoch's order after a resume (accelerate#3996).
    """

    split: Split = field(kw_only=False)
    global_batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulation_steps: int = 1

    @property
    def epoch_steps(self) -> int:
        """Steps in one epoch; its last batch may be short."""
        return -(-len(self.split) // self.global_batch_size)

    def order(self, epoch: int) -> Tensor:
        """The permutation (N,) int64 of `epoch`, counted from 0, equal on every rank and device."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        return torch.randperm(len(self.split), generator=generator)

    def steps(self, first: int, stop: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of optimizer steps `first` .. `stop` - 1 of the run, across epochs."""
        while first < stop:
            epoch, offset = divmod(first, self.epoch_steps)
            order = self.order(epoch)
            if self.split.images.is_cuda:
                order = order.pin_memory()  # copying pageable memory would wait for the device
            order = order.to(self.split.images.device, non_blocking=True)
            for start in range(offset, min(self.epoch_steps, offset + stop - first)):
                yield self._micro_batches(order[start * self.global_batch_size : (start + 1) * self.global_batch_size])
            first = (epoch + 1) * self.epoch_steps

    def _micro_batches(self, indices: Tensor) -> list[MicroBatch]:
        """This rank's share of a global batch `indices`, cut into micro-batches of near equal size."""
        size = len(indices)
        first, stop = self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size
        parts = self.accumulation_steps
        cuts = [first + part * (stop - first) // parts for part in range(parts + 1)]
        filled = [slice(a, b) for a, b in pairwise(cuts) if a < b]
        return [
            MicroBatch(
                split=self.split,
                indices=indices[rows],
                rows=rows,
                global_batch_size=size,
                num_samples=rows.stop - rows.start if filled else 0,
            )
            for rows in filled or [slice(0, 1)]
        ]
