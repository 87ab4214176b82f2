"""The training loop: an epoch of steps, and a record of plain numbers where one is due.

In: a `TrainStep` and micro-batches. Out: records. The host waits for the device, and ranks, gradients apart, for one
another only where a record is due and, if there are several ranks, about once a second in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mnist.data.batches import MicroBatch
from mnist.training.step import DivergedError, TrainStep, wait_for_device

HEARTBEAT_S = 1.0  # how often ranks compare notes, about


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
