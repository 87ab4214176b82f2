"""A training step: forward, loss, backward and update on this rank's micro-batches of one global batch.

In: a prepared model and optimizer, and micro-batches: images uint8 (B, H, W) or (B, C, H, W), labels int64 (B,).
Out: new weights, and sums of metrics on the device. Nothing here waits for the device. Letters: B images in a rank's
micro-batch, G in the global batch, C channels, S side of the network's input in pixels, P ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from mnist.data.batches import MicroBatch
from mnist.data.transforms import Augmentation
from mnist.errors import RunError
from mnist.seeding import derive_seed
from mnist.training.metrics import METRICS
from mnist.training.optim import LearningRate, WeightAverage


@dataclass(eq=False, kw_only=True)
class TrainStep:
    """One optimizer step, called with this rank's micro-batches of one global batch.

    Args:
        accelerator: for ranks, `no_sync`, clipping and the gradient scaler of fp16.
        model: prepared; images (B, C, S, S) float32 -> logits (B, K), K classes.
        bare_model: the module that was prepared. (`accelerator.unwrap_model` would import torch.compile, a second.)
        optimizer: prepared.
        learning_rate: the schedule.
        loss_fn: (logits, labels) -> loss of each sample (B,).
        transform: pixels -> network input (B, C, S, S).
        augment: pixels -> pixels of the same shape, with random numbers fixed by seed, step and row.
        grad_clip: largest total gradient norm; 0 = no clipping.
        average: of the weights, moved after each update.
        seed: fixes dropout together with step, micro-batch and rank.

    Attributes:
        lr, grad_norm: of the last step; the norm only where it was measured.
        sums, num_samples: since the last `reset_sums`: on the device, the sum of each metric and the number of steps
            with a finite loss; and the images seen.
        replay: takes the step if it can and returns whether it did; None = every step runs eagerly.
    """

    accelerator: Accelerator
    model: nn.Module
    bare_model: nn.Module
    optimizer: Optimizer
    learning_rate: LearningRate
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    transform: Callable[[Tensor], Tensor]
    augment: Augmentation
    grad_clip: float = 0.0
    average: WeightAverage | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.rank: int = self.accelerator.process_index
        self.replay: Callable[[TrainStep, Sequence[MicroBatch], int], bool] | None = None
        self.lr = math.nan
        self.grad_norm: float | Tensor = math.nan
        self.num_samples = 0
        device = self.accelerator.device
        self.sums = torch.zeros(len(METRICS) + 1, dtype=sum_dtype(device), device=device)
        *totals, self._finite_steps = self.sums.unbind()
        self._totals = dict(zip(METRICS, totals, strict=True))
        self._seed_dropout = _dropout_seeder(device)
        # accelerator.backward is needed for the scaler of fp16 only. It also divides by its accumulation count, which
        # is 1 here: two operations for nothing, 2 % of LeNet-5's step on a CPU.
        self._backward = Tensor.backward if self.accelerator.scaler is None else self.accelerator.backward

    @property
    def eval_model(self) -> nn.Module:
        """The bare network that is scored and exported: the averaged one where there is an average."""
        return self.bare_model if self.average is None else self.average.module

    def __call__(self, micro_batches: Sequence[MicroBatch], step: int, measure_grad_norm: bool = False) -> None:
        """Trains on one global batch; `step` counts the steps done before it."""
        self.lr = self.learning_rate.set_step(step)
        if self.replay is None or not self.replay(self, micro_batches, step):
            self.compute(micro_batches, step, measure_grad_norm)
        self.num_samples += sum(batch.num_samples for batch in micro_batches)

    def compute(self, micro_batches: Sequence[MicroBatch], step: int, measure_grad_norm: bool = False) -> None:
        """The work on the device: forward and backward passes of all micro-batches, then one update."""
        for index, batch in enumerate(micro_batches):
            self.set_step(step, index)
            is_last = index == len(micro_batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                self.forward_backward(batch)
        self.update(measure_grad_norm)

    def set_step(self, step: int, micro_step: int) -> None:
        """Writes what depends on the step to the device: seeds of augmentation and dropout, weight of the average."""
        self.augment.reseed(step)
        self._seed_dropout(derive_seed(self.seed, "dropout", step, micro_step, self.rank))
        if self.average is not None:
            self.average.set_step(step)

    def forward_backward(self, batch: MicroBatch) -> None:
        """Adds a micro-batch's part to the gradients and to the sums."""
        images = self.augment.apply(batch.images, batch.rows)
        labels = batch.labels
        logits = self.model(self.transform(images))  # (B, K)
        loss_sum = self.loss_fn(logits, labels).sum()
        if batch.num_samples:
            for name, total in self._totals.items():
                total.add_(METRICS[name](loss_sum.detach(), logits.detach(), labels))
        # DDP averages gradients over the P ranks: P / G turns that into the mean over the G images of the global batch,
        # however unevenly they are spread. The placeholder of a rank without images has weight 0.
        weight = self.accelerator.num_processes / batch.global_batch_size if batch.num_samples else 0.0
        self._backward(loss_sum * weight)

    def update(self, measure_grad_norm: bool) -> None:
        """One update of the weights from the gradients, and of the average from the weights."""
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


class DivergedError(RunError):
    """The loss, or what `what` names, is not finite any more."""

    def __init__(self, step: int, rank: int, what: str = "the loss is") -> None:
        super().__init__(f"{what} nan or inf at step {step} on rank {rank}; try a smaller --lr, or --grad-clip 1")
        self.step = step
        self.rank = rank


def warm_up(model: nn.Module, inputs: Tensor, num_passes: int = 2) -> None:
    """Forward and backward passes on zeros that change nothing. Every rank must call this before its first step.

    With three ranks or more DDP sorts its gradient buckets anew after the first backward pass, which changes the order
    of sums: without this a resumed run would differ from the uninterrupted one in the last bits. It also takes the
    one-off cost of choosing kernels out of the first step.

    Args:
        model: prepared.
        inputs: zeros in the shape of a micro-batch (B, C, S, S).
        num_passes: DDP needs two.
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.train()
    for _ in range(num_passes):
        (model(inputs).sum() * 0.0).backward()
    model.zero_grad()
    for buffer, saved in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(saved)


def wait_for_device(device: torch.device) -> None:
    """Waits until all work queued on `device` is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64 for sums, except on Apple's MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _dropout_seeder(device: torch.device) -> Callable[[int], object]:
    """Seeds the global generator of `device` alone: `torch.manual_seed` visits every device and costs 0.1 ms."""
    seeders = {"cpu": torch.default_generator.manual_seed, "cuda": torch.cuda.manual_seed}
    return seeders.get(device.type, torch.manual_seed)
