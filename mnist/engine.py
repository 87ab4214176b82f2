"""The loop: a training step, an epoch, an evaluation. It sees tensors and callables, no configuration and no recipe.

In: a prepared model and optimizer, micro-batches (uint8 images (B, 28, 28), labels int64 (B,)), a loss. Out: plain
numbers. The host waits for the device, and ranks, gradients apart, for one another only where a record is due and, if
there are several ranks, about once a second in between. Letters: B images of a rank's micro-batch, G of the global
batch, S side in pixels, P ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from mnist.batches import MicroBatch, Split
from mnist.config import RunError
from mnist.metrics import NUM_CLASSES, Scores, add_to_confusion
from mnist.optim import LearningRate, WeightAverage
from mnist.seeding import derive_seed
from mnist.transforms import Augmentation

EVAL_CHUNK = 1000  # images; fixed, so that every mode and world size shows a kernel the same batches
HEARTBEAT_S = 1.0  # how often ranks compare notes, about


class DivergedError(RunError):
    """A number is not finite any more: the loss, or what `what` says."""

    def __init__(self, step: int, rank: int, what: str = "the loss is") -> None:
        super().__init__(f"{what} nan or inf at step {step} on rank {rank}; try a smaller --lr, or --grad-clip 1")
        self.step = step
        self.rank = rank


@dataclass
class TrainState:
    """All that the loop remembers besides weights and optimizer, as plain numbers.

    Attributes:
        step: optimizer steps done.
        interval: per rank the sums since the last record: loss, correct, finite steps, samples. (A record is a planned
            event; a checkpoint written between two of them, at a signal, carries the sums along.)
        interval_start: the step of the last record.
        interval_time_s: training time since then.
        epoch_sums: loss, correct, samples and seconds of training since the epoch began, all ranks together.
        best: record of the best evaluation so far.
        evals_since_best: evaluations after it.
        train_time_s: time in training steps, evaluation and checkpoints not counted.
        stop_reason: why the run ends before its planned length, or None.
        is_stopping: a signal arrived somewhere, and all ranks have agreed to end after this step.
    """

    step: int = 0
    interval: list[list[float]] = field(default_factory=list)
    interval_start: int = 0
    interval_time_s: float = 0.0
    epoch_sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    best: dict[str, float] | None = None
    evals_since_best: int = 0
    train_time_s: float = 0.0
    stop_reason: str | None = None
    is_stopping: bool = False


@dataclass(frozen=True)
class TrainRecord:
    """Means over the samples of all ranks since the last record; learning rate and gradient norm of the last step."""

    step: int
    loss: float
    accuracy: float
    num_samples: int
    lr: float
    grad_norm: float
    images_per_s: float


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
        # Sums on the device, read only when a record is due: loss, correct, steps with a finite loss.
        self.sums = torch.zeros(3, dtype=sum_dtype(accelerator.device), device=accelerator.device)
        self._loss_sum, self._num_correct, self._finite_steps = self.sums.unbind()
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
        logits = self.model(self.transform(images))  # (B, 10)
        labels = batch.labels
        loss_sum = self.loss_fn(logits, labels).sum()
        if batch.num_samples:
            self._loss_sum.add_(loss_sum.detach())
            self._num_correct.add_((logits.argmax(dim=1) == labels).sum())
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
        self._finite_steps.add_(self._loss_sum < math.inf)  # false for nan; losses are not negative
        if self.average is not None:
            self.average.update()

    def load_sums(self, interval: list[list[float]]) -> None:
        """Takes up the sums of an interrupted interval; on another number of ranks, rank 0 takes all of them."""
        loss = correct = finite_steps = num_samples = 0.0
        if len(interval) == self.accelerator.num_processes:
            loss, correct, finite_steps, num_samples = interval[self.rank]
        elif interval:
            columns = list(zip(*interval, strict=True))
            finite_steps = min(columns[2])
            if self.rank == 0:
                loss, correct, num_samples = sum(columns[0]), sum(columns[1]), sum(columns[3])
        self.sums.copy_(torch.tensor([loss, correct, finite_steps], dtype=self.sums.dtype))
        self.num_samples = int(num_samples)


def train_one_epoch(
    train_step: TrainStep,
    steps: Iterable[Sequence[MicroBatch]],
    state: TrainState,
    *,
    pauses_at: Callable[[int], bool],
    heartbeat: Callable[[], bool] = lambda: False,
) -> Iterator[TrainRecord]:
    """Runs `steps`, and hands control back with a record after each step at which `pauses_at` is true.

    It ends early where `state.stop_reason` has been set at a record; and, with `state.is_stopping` set and the sums
    since the last record in `state.interval`, when `heartbeat` has said so on any rank: it is asked after each step by
    a single rank, and about once a second where several have to compare notes. Every rank must exhaust it.

    Raises:
        DivergedError: on all ranks, when the loss of any of them was not finite.
    """
    is_alone = train_step.accelerator.num_processes == 1
    heartbeat_steps, since_heartbeat, started = 1, 0, time.perf_counter()
    train_step.model.train()
    for micro_batches in steps:
        is_pause = pauses_at(state.step + 1)
        train_step(micro_batches, state.step, measure_grad_norm=is_pause)
        state.step += 1
        since_heartbeat += 1
        is_due = heartbeat() if is_alone else since_heartbeat >= heartbeat_steps
        if not (is_pause or is_due):
            continue
        rows = _compare_notes(train_step, state, heartbeat(), started)
        seconds = max(row[-1] for row in rows)
        state.train_time_s += seconds
        state.interval_time_s += seconds
        heartbeat_steps = max(1, min(2 * heartbeat_steps, int(HEARTBEAT_S * since_heartbeat / max(seconds, 1e-6))))
        if is_pause:
            yield _make_record(train_step, state, rows)
            train_step.model.train()  # whoever had control may have evaluated
        if state.is_stopping or state.stop_reason is not None:
            return
        since_heartbeat, started = 0, time.perf_counter()


def _compare_notes(train_step: TrainStep, state: TrainState, stop: bool, started: float) -> list[list[float]]:
    """Gathers a row per rank (loss, correct, finite steps, samples, stop, seconds), equal on every rank.

    The one place where the host waits for the device. All decisions are taken from these rows, never from local flags.
    """
    sums = train_step.sums
    wait_for_device(sums.device)  # or the clock would miss the work that is only queued
    seconds = time.perf_counter() - started
    own = torch.tensor([train_step.num_samples, stop, seconds], dtype=sums.dtype, device=sums.device)
    gathered = train_step.accelerator.gather(torch.cat([sums, own]))
    rows: list[list[float]] = gathered.view(train_step.accelerator.num_processes, -1).tolist()
    finite_steps = [int(row[2]) for row in rows]
    if min(finite_steps) < state.step - state.interval_start:
        rank = finite_steps.index(min(finite_steps))
        raise DivergedError(state.interval_start + finite_steps[rank] + 1, rank)
    state.interval = [row[:4] for row in rows]
    state.is_stopping = any(row[4] for row in rows)
    return rows


def _make_record(train_step: TrainStep, state: TrainState, rows: list[list[float]]) -> TrainRecord:
    """Closes the interval: its sums become a record, and start again at zero."""
    loss_sum, num_correct, _, num_samples = (sum(column) for column in list(zip(*rows, strict=True))[:4])
    seconds, state.interval_time_s = state.interval_time_s, 0.0
    interval = (loss_sum, num_correct, num_samples, seconds)
    state.epoch_sums = [a + b for a, b in zip(state.epoch_sums, interval, strict=True)]
    state.interval, state.interval_start = [], state.step
    train_step.load_sums([])
    return TrainRecord(
        step=state.step,
        loss=loss_sum / num_samples,
        accuracy=num_correct / num_samples,
        num_samples=int(num_samples),
        lr=train_step.lr,
        grad_norm=float(train_step.grad_norm),
        images_per_s=num_samples / seconds,
    )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    *,
    accelerator: Accelerator,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    transform: Callable[[Tensor], Tensor],
    sharded: bool = False,
    after_chunk: Callable[[Tensor], None] | None = None,
) -> Scores:
    """Scores `model` on every image of `split`, each exactly once. Every rank must call this; all get the result.

    Args:
        model: the bare module: a DDP wrapper would wait for other ranks in its forward pass (accelerate#3861).
        split: images uint8 (N, 28, 28), labels int64 (N,).
        accelerator: to reduce over ranks.
        loss_fn: (logits, labels) -> (B,).
        transform: pixels -> network input.
        sharded: every rank scores a share of the chunks; else rank 0 scores all, and the others wait.
        after_chunk: shown this rank's confusion counts (100,) so far, on the device, for whoever wants to watch.

    Returns:
        The same counts in both modes and on any number of ranks, and the same loss to the last bit: sums are kept per
        chunk, reduced once (adding zeros is exact), and added up in the order of the chunks.
    """
    num_chunks = math.ceil(len(split) / EVAL_CHUNK)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    mine = range(rank, num_chunks, world_size) if sharded else range(num_chunks if rank == 0 else 0)
    device = split.images.device
    losses = torch.zeros(num_chunks, dtype=sum_dtype(device), device=device)
    confusion = torch.zeros(NUM_CLASSES**2, dtype=sum_dtype(device), device=device)
    if sharded and world_size > 1:
        _broadcast_buffers(model)
    was_training = model.training
    model.eval()
    for chunk in mine:
        batch = split[chunk * EVAL_CHUNK : (chunk + 1) * EVAL_CHUNK]
        logits = model(transform(batch.images))
        losses[chunk] = loss_fn(logits, batch.labels).sum()
        add_to_confusion(confusion, logits, batch.labels)
        if after_chunk is not None:
            after_chunk(confusion)
    model.train(was_training)
    sums = accelerator.reduce(torch.cat([losses, confusion]), reduction="sum").cpu().double()
    counts = sums[num_chunks:].round().long().view(NUM_CLASSES, NUM_CLASSES)
    scores = Scores.from_sums(math.fsum(sums[:num_chunks].tolist()), counts)
    if scores.num_samples != len(split):
        raise RuntimeError(f"scored {scores.num_samples} of {len(split)} samples")
    return scores


def _broadcast_buffers(model: nn.Module) -> None:
    """Gives every rank the buffers of rank 0: after the last step batch-norm statistics differ by one update."""
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, src=0)


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
