"""A training step: forward, loss, backward, update, on this rank's micro-batches of one global batch.

In: a prepared model and optimizer, micro-batches (uint8 images (B, 28, 28), labels int64 (B,)), a loss. Out: moved
weights, and sums on the device; the host waits for nothing here. Letters: B images of a rank's micro-batch, G of the
global batch, S side in pixels, P ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from mnist.data.batches import MicroBatch
from mnist.data.transforms import Augmentation
from mnist.errors import RunError
from mnist.seeding import derive_seed
from mnist.training.metrics import TRAIN_METRICS
from mnist.training.optim import LearningRate, WeightAverage


class DivergedError(RunError):
    """A number is not finite any more: the loss, or what `what` says."""

    def __init__(self, step: int, rank: int, what: str = "the loss is") -> None:
        super().__init__(f"{what} nan or inf at step {step} on rank {rank}; try a smaller --lr, or --grad-clip 1")
        self.step = step
        self.rank = rank


class Captured(Protocol):
    """A recording of a step's work on the device, for batches of one size."""

    def fits(self, micro_batches: Sequence[MicroBatch]) -> bool:
        """Whether it can stand in for `TrainStep.compute` on these."""

    def __call__(self, batch: MicroBatch, measure_grad_norm: bool) -> None:
        """Replays."""


class TrainStep:
    """One optimizer step, called with this rank's micro-batches of one global batch.

    Args:
        accelerator: for ranks, `no_sync`, clipping and the gradient scaler of fp16.
        model: prepared; images (B, 1, S, S) float32 -> logits (B, 10).
        optimizer: prepared.
        learning_rate: the schedule.
        loss_fn: (logits, labels) -> loss of each sample (B,).
        transform: pixels (B, 28, 28) -> network input (B, 1, S, S).
        augment: pixels (B, 28, 28) -> pixels (B, 28, 28), seeded by step.
        grad_clip: largest total gradient norm; 0 = no clipping.
        average: of the weights, moved after each update.
        seed: fixes dropout together with step, micro-batch and rank.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        learning_rate: LearningRate,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        transform: Callable[[Tensor], Tensor],
        augment: Augmentation,
        grad_clip: float = 0.0,
        average: WeightAverage | None = None,
        seed: int = 0,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.bare_model: nn.Module = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.loss_fn = loss_fn
        self.transform = transform
        self.augment = augment
        self.grad_clip = grad_clip
        self.average = average
        self.seed = seed
        # Accelerate's is for the scaler of fp16; besides, it divides by its accumulation count, which is 1 here: two
        # operations for nothing, 2 % of LeNet-5's step on a CPU.
        self._backward = Tensor.backward if accelerator.scaler is None else accelerator.backward
        self._seed_dropout = dropout_seeder(accelerator.device)
        self.rank: int = accelerator.process_index
        self.lr = math.nan
        self.grad_norm: float | Tensor = math.nan
        # Sums since the last `reset_sums`, on the device: the metrics, and the steps with a finite loss.
        self.sums = torch.zeros(len(TRAIN_METRICS) + 1, dtype=sum_dtype(accelerator.device), device=accelerator.device)
        *totals, self._finite_steps = self.sums.unbind()
        self._totals = dict(zip(TRAIN_METRICS, totals, strict=True))
        self.num_samples = 0
        self.captured: Captured | None = None  # replays `compute` for batches that fit

    def __call__(self, micro_batches: Sequence[MicroBatch], step: int, measure_grad_norm: bool = False) -> None:
        """Trains on one global batch; `step` counts the steps done before it."""
        self.lr = self.learning_rate.set_step(step)
        if self.captured is not None and self.captured.fits(micro_batches):
            self.set_step(step, 0)
            self.captured(micro_batches[0], measure_grad_norm)
        else:
            self.compute(micro_batches, step, measure_grad_norm)
        self.num_samples += sum(batch.num_samples for batch in micro_batches)

    def compute(self, micro_batches: Sequence[MicroBatch], step: int, measure_grad_norm: bool = False) -> None:
        """The device's share of a step: gradients of all micro-batches, then one update."""
        for index, batch in enumerate(micro_batches):
            self.set_step(step, index)
            is_last = index == len(micro_batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                self.forward_backward(batch)
        self.update(measure_grad_norm)

    def set_step(self, step: int, micro_step: int) -> None:
        """Tells the device what depends on the step: what augmentation and dropout draw next, how averages move."""
        self.augment.reseed(step)
        self._seed_dropout(derive_seed(self.seed, "dropout", step, micro_step, self.rank))
        if self.average is not None:
            self.average.set_step(step)

    def forward_backward(self, batch: MicroBatch) -> None:
        """Adds a micro-batch's part to the gradients and to the sums."""
        images = self.augment.apply(batch.images, batch.rows, batch.global_batch_size)
        labels = batch.labels
        logits = self.model(self.transform(images))  # (B, 10)
        loss_sum = self.loss_fn(logits, labels).sum()
        if batch.num_samples:
            for name, total in self._totals.items():
                total.add_(TRAIN_METRICS[name](loss_sum.detach(), logits.detach(), labels))
        # DDP averages gradients over the P ranks: P / G turns that into the mean over the G images of the global batch,
        # however unevenly they are spread. A stand-in for an empty share weighs nothing.
        weight = self.accelerator.num_processes / batch.global_batch_size if batch.num_samples else 0.0
        self._backward(loss_sum, gradient=loss_sum.new_full((), weight))

    def update(self, measure_grad_norm: bool) -> None:
        """Clips, steps, clears the gradients, moves the average."""
        if self.grad_clip:
            self.grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        elif measure_grad_norm:
            self.accelerator.unscale_gradients()
            self.grad_norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._finite_steps.add_(self._totals["loss"] < math.inf)  # false for nan; losses are not negative
        if self.average is not None:
            self.average.update()

    def reset_sums(self) -> None:
        """Starts the sums at zero again."""
        self.sums.zero_()
        self.num_samples = 0


def wait_for_device(device: torch.device) -> None:
    """Waits until all that is queued on `device` is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def dropout_seeder(device: torch.device) -> Callable[[int], object]:
    """What seeds the global generator of `device` alone: `torch.manual_seed` visits every device and costs 0.1 ms."""
    seeders = {"cpu": torch.default_generator.manual_seed, "cuda": torch.cuda.manual_seed}
    return seeders.get(device.type, torch.manual_seed)


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64 for sums, except on Apple's MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def warm_up(model: nn.Module, inputs: Tensor) -> None:
    """Two forward and backward passes on zeros that leave no trace. Every rank must call this before its first step.

    With three ranks or more DDP sorts its gradient buckets anew after the first backward pass, which changes the order
    of sums: without this a resumed run would differ from the uninterrupted one in the last bits. It also takes the
    one-off cost of choosing kernels out of the first step.

    Args:
        model: prepared.
        inputs: zeros in the shape of a micro-batch (B, 1, S, S).
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.train()
    for _ in range(2):
        (model(inputs).sum() * 0.0).backward()
    model.zero_grad()
    for buffer, saved in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(saved)
