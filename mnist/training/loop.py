"""The training loop: runs steps, and yields a record of plain numbers where one is due.

In: a `TrainStep` and the micro-batches of its steps. Out: records. Between two records the host never waits for the
device; ranks exchange gradients, and about once a second their sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mnist.data.batches import MicroBatch
from mnist.training.metrics import METRICS, TrainSums
from mnist.training.step import DivergedError, TrainStep, wait_for_device

EXCHANGE_S = 1.0  # about how often ranks exchange their sums


@dataclass(frozen=True)
class InitialWeights:
    """Where a run has its first weights from, if not from its seed.

    Attributes:
        folder: of the exported model.
        sha256: of its weights' file.
        skipped: tensors that do not fit, because the classes are others; these are random.
    """

    folder: str
    sha256: str
    skipped: list[str]

    def __str__(self) -> str:
        skipped = f"; random, because the classes are others: {', '.join(self.skipped)}" if self.skipped else ""
        return f"{self.folder}, sha256 {self.sha256[:12]}{skipped}"


@dataclass
class TrainState:
    """What the loop keeps besides weights and optimizer state, as plain numbers, the same on every rank.

    Attributes:
        step: optimizer steps done.
        interval_sums: since the last record. (A checkpoint that a signal asks for may lie between two records.)
        epoch_sums: since the epoch began; whoever evaluates resets them.
        run_sums: since the run began.
        best: record of the best evaluation so far.
        evals_since_best: evaluations after it.
        val_scores: of the last evaluation on validation.
        stop_reason: why the run ends before its planned length, or None.
        is_stopping: a signal has arrived on some rank, and all ranks end after this step.
        initialised_from: another run's weights; None = random weights.
    """

    step: int = 0
    interval_sums: TrainSums = field(default_factory=TrainSums)
    epoch_sums: TrainSums = field(default_factory=TrainSums)
    run_sums: TrainSums = field(default_factory=TrainSums)
    best: dict[str, int | float] | None = None
    evals_since_best: int = 0
    val_scores: dict[str, int | float] | None = None
    stop_reason: str | None = None
    is_stopping: bool = False
    initialised_from: InitialWeights | None = None

    def load(self, saved: TrainState) -> None:
        """Becomes a copy of the state in a checkpoint; nobody has asked this start to stop."""
        vars(self).update(vars(saved))
        self.is_stopping = False


@dataclass(frozen=True)
class TrainRecord:
    """Sums since the last record; learning rate and gradient norm of the last step."""

    step: int
    sums: TrainSums
    lr: float
    grad_norm: float


def train_one_epoch(
    train_step: TrainStep,
    steps: Iterable[Sequence[MicroBatch]],
    state: TrainState,
    *,
    pauses_at: Callable[[int], bool],
    heartbeat: Callable[[], bool] = lambda: False,
) -> Iterator[TrainRecord]:
    """Runs `steps`; yields a record after each step at which `pauses_at` is true. Every rank must exhaust it.

    It ends early after a record at which `state.stop_reason` is set, and when `heartbeat`, called after each step, has
    returned true on any rank: then `state.is_stopping` is set. A single process ends after that very step, several
    within about a second, all after the same step.

    Raises:
        DivergedError: on all ranks, when the loss of any of them is not finite.
    """
    is_alone = train_step.accelerator.num_processes == 1
    num_steps, max_steps = 0, 1  # since the last exchange of sums, and until the next one
    started = time.perf_counter()
    train_step.model.train()
    for micro_batches in steps:
        is_pause = pauses_at(state.step + 1)
        train_step(micro_batches, state.step, measure_grad_norm=is_pause)
        state.step += 1
        num_steps += 1
        stop = heartbeat()
        is_exchange = stop if is_alone else num_steps >= max_steps
        if not (is_pause or is_exchange):
            continue
        sums, state.is_stopping = _gather_sums(train_step, state.step, num_steps, stop, started)
        state.interval_sums += sums
        state.epoch_sums += sums
        state.run_sums += sums
        max_steps = max(1, min(2 * max_steps, int(EXCHANGE_S * num_steps / max(sums.time_s, 1e-6))))
        if is_pause:
            record = TrainRecord(state.step, state.interval_sums, train_step.lr, float(train_step.grad_norm))
            state.interval_sums = TrainSums()
            yield record
        if state.is_stopping or state.stop_reason is not None:
            return
        num_steps, started = 0, time.perf_counter()


def _gather_sums(
    train_step: TrainStep, step: int, num_steps: int, stop: bool, started: float
) -> tuple[TrainSums, bool]:
    """The sums of the last `num_steps` steps over all ranks, and whether any rank wants to stop; equal on every rank.

    The one place where the host waits for the device. Ranks decide by what they get here, never by a flag of their own.
    Sums are exchanged before the wait: NCCL and our watchdog know nothing of the exchanges in replayed steps, and would
    not find out who is missing there.
    """
    own = [train_step.sums.new_full((1,), value) for value in (train_step.num_samples, stop)]  # copying them would wait
    rows = train_step.accelerator.gather(torch.cat([train_step.sums, *own]))
    wait_for_device(train_step.sums.device)  # or the clock would miss the work that is only queued
    time_s = train_step.accelerator.gather(train_step.sums.new_tensor([time.perf_counter() - started])).max().item()
    names = (*METRICS, "finite_steps", "num_samples", "stop")
    by_name = dict(zip(names, rows.view(-1, len(names)).T.tolist(), strict=True))  # name -> a number of each rank
    train_step.reset_sums()
    finite_steps = by_name["finite_steps"]
    if min(finite_steps) < num_steps:
        rank = finite_steps.index(min(finite_steps))
        raise DivergedError(step - num_steps + int(finite_steps[rank]) + 1, rank)
    totals = {name: sum(by_name[name]) for name in METRICS}
    return TrainSums(totals, int(sum(by_name["num_samples"])), time_s), any(by_name["stop"])
