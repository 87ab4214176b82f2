"""Measures loops side by side: each in a process of its own, one after the other, round after round.

In: contestants and a configuration. Out: an `Entry` (images/s, losses, memory) and a row of a table for each.
Contestants take turns pass by pass, so that whatever else happens on the machine happens to all of them, and ratios are
taken within a round. Processes of their own give each its own memory, threads and precision (Accelerate has one per
process). Linux and macOS.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from mnist.bench.baselines import LOOPS, Job, Pass, find_device
from mnist.bench.scoreboard import Row
from mnist.config import Precision, StepMode, TrainConfig, evolve
from mnist.data.batches import Split
from mnist.data.datasets import read
from mnist.errors import RunError
from mnist.system.environment import peak_memory_mb
from mnist.system.process import keep_memory
from mnist.training.step import wait_for_device

LOSS_TOLERANCE = 0.05  # relative, of the first pass's mean loss; dropout draws other masks in each loop
NAMES = {
    "pipeline": "usual pipeline",
    "prepared": "Accelerate's examples",
    "bare": "bare loop",
    "project": "this project",
}


@dataclass(frozen=True)
class Contestant:
    """A loop and the mode that it runs in.

    Attributes:
        loop: a name in `rivals.LOOPS`.
        precision: fp32 ("no") or bf16.
        num_workers: of its DataLoader, where it has one.
        dynamo: the backend of torch.compile, or "no".
        step_mode: eager, or captured as one CUDA graph; for this project and the bare loop.
    """

    loop: str
    precision: Precision = "no"
    num_workers: int = 0
    dynamo: str = "no"
    step_mode: StepMode = "eager"


@dataclass(frozen=True)
class Entry:
    """What was measured of a contestant.

    Attributes:
        contestant: whose.
        images_per_s: a value per counted round.
        losses: mean training loss of each pass, the uncounted first one included.
        num_images: images seen, the first pass included.
        peak_memory_mb: as `runtime.peak_memory_mb` has it; of the process, libraries included, workers not.
    """

    contestant: Contestant
    images_per_s: list[float]
    losses: list[float]
    num_images: int
    peak_memory_mb: float


class Measurement(NamedTuple):
    """One pass of one contestant."""

    seconds: float
    loss_sum: float
    num_images: int
    peak_memory_mb: float


def hold_contest(contestants: Sequence[Contestant], config: TrainConfig, num_images: int, repeats: int) -> list[Entry]:
    """Lets all contestants train `repeats` + 1 passes over `num_images` images, in turns; the first is not counted.

    Raises:
        RunError: a contestant's process has died; its own error is on standard error.
    """
    with _start(contestants, config, num_images) as pipes:
        rounds = [
            [_ask(pipe, contestant, index) for pipe, contestant in zip(pipes, contestants, strict=True)]
            for index in range(repeats + 1)
        ]
    return [_entry(*pair) for pair in zip(contestants, zip(*rounds, strict=True), strict=True)]


def _entry(contestant: Contestant, passes: Sequence[Measurement]) -> Entry:
    return Entry(
        contestant=contestant,
        images_per_s=[one.num_images / one.seconds for one in passes[1:]],
        losses=[one.loss_sum / one.num_images for one in passes],
        num_images=sum(one.num_images for one in passes),
        peak_memory_mb=passes[-1].peak_memory_mb,
    )


@contextmanager
def _start(contestants: Sequence[Contestant], config: TrainConfig, num_images: int) -> Iterator[list[Connection]]:
    """A process per contestant; each ends when its pipe closes, with the block or with this process."""
    context = multiprocessing.get_context("forkserver")  # copies of a process that has imported torch and no more
    context.set_forkserver_preload([__name__])
    pipes: list[Connection] = []
    processes = []
    try:
        for contestant in contestants:
            ours, theirs = context.Pipe()
            process = context.Process(target=_compete, args=(contestant, config, num_images, theirs))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


def _ask(pipe: Connection, contestant: Contestant, index: int) -> Measurement:
    """What a contestant's process has measured of a pass."""
    try:
        pipe.send(index)
        measured: Measurement = pipe.recv()
    except (EOFError, OSError) as error:
        raise RunError(f"the process of {contestant} has died; its error stands above") from error
    return measured


def _compete(contestant: Contestant, config: TrainConfig, num_images: int, pipe: Connection) -> None:
    """A contestant's process: builds its loop, then trains a pass for each index that it is sent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    if contestant.dynamo == "no":
        os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)
    if contestant.loop in ("bare", "project"):
        keep_memory()  # as every command of this project does; the usual loops do not
    torch.set_num_threads(config.runtime.num_threads)
    device = find_device(config)
    mode = {"mixed_precision": contestant.precision, "step_mode": contestant.step_mode}
    config = evolve(config, **mode, cpu=device.type == "cpu")
    train = read(config.data.dataset, config.data).train
    split = Split(train.images[:num_images].clone(), train.labels[:num_images].clone())
    del train  # or every row would show the whole data set
    train_pass = LOOPS[contestant.loop](Job(config, split, contestant.num_workers))
    try:
        while True:
            pipe.send(_measure(train_pass, pipe.recv(), device))
    except (EOFError, BrokenPipeError):  # the contest is over, or was stopped
        pass


def _measure(train_pass: Pass, index: int, device: torch.device) -> Measurement:
    started = time.perf_counter()
    loss_sum, num_images = train_pass(index)
    wait_for_device(device)
    seconds = time.perf_counter() - started
    return Measurement(seconds, loss_sum, num_images, peak_memory_mb(device))


def compare(recipe: str, entries: Sequence[Entry]) -> list[Row]:
    """A row per contestant: speed, its ratio to the usual pipeline, and what it costs over the bare loop."""
    usual = entries[0]
    rows = []
    for entry in entries:
        who = entry.contestant
        is_ours = who.loop == "project"
        limit = _find(entries, Contestant("bare", who.precision, step_mode=who.step_mode))
        twin = _find(entries, Contestant("bare", who.precision))
        rows.append(
            {
                "recipe": recipe,
                "loop": NAMES[who.loop],
                "mode": describe(who),
                "images/s": statistics.median(entry.images_per_s),
                "min": min(entry.images_per_s),
                "max": max(entry.images_per_s),
                "x usual": paired_ratio(entry.images_per_s, usual.images_per_s),
                "over bare": paired_ratio(limit.images_per_s, entry.images_per_s) - 1 if limit and is_ours else None,
                "memory MB": entry.peak_memory_mb,
                "loss difference": relative_difference(entry, twin) if twin and is_ours else None,
                "loss": entry.losses[-1],
                "passes": len(entry.losses),
                "images seen": entry.num_images,
            }
        )
    return rows


def _find(entries: Sequence[Entry], contestant: Contestant) -> Entry | None:
    return next((entry for entry in entries if entry.contestant == contestant), None)


def describe(contestant: Contestant) -> str:
    """Precision, workers and compiler in words."""
    parts: list[str] = ["fp32" if contestant.precision == "no" else contestant.precision]
    if contestant.loop in ("pipeline", "prepared"):
        parts.append(f"{contestant.num_workers} workers")
    if contestant.dynamo != "no":
        parts.append(contestant.dynamo)
    if contestant.step_mode != "eager":
        parts.append(contestant.step_mode)
    return ", ".join(parts)


def paired_ratio(rates: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(rates, base, strict=True))


def relative_difference(entry: Entry, limit: Entry) -> float:
    """How far the mean loss of the first pass is from the other's, in parts of it."""
    return abs(entry.losses[0] - limit.losses[0]) / limit.losses[0]


def check_losses(entries: Sequence[Entry]) -> None:
    """The project and the bare loop, captured or not, compute the same as the eager bare loop of their precision.

    Raises:
        RunError: they do not, and a comparison of their speed would mean nothing.
    """
    for entry in entries:
        for limit in entries:
            who = entry.contestant
            is_pair = who.loop in ("project", "bare") and limit.contestant == Contestant("bare", who.precision)
            if is_pair and not relative_difference(entry, limit) <= LOSS_TOLERANCE:
                raise RunError(
                    f"{NAMES[who.loop]}, {describe(who)}: the first pass has a loss of {entry.losses[0]:.4f}, and of "
                    f"{limit.losses[0]:.4f} in the eager bare loop: they do not compute the same"
                )
