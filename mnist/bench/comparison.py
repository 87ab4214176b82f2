"""Measures loops side by side: each in its own process, one after the other, round after round.

In: loops and a configuration. Out: the `Measurement`s of each loop, and a row of a table for each. Loops take turns
pass by pass, so that other work on the machine slows all of them alike, and ratios are taken within a round. A process
each gives them their own memory and threads, and Accelerate its own state. Linux and macOS.
"""

from __future__ import annotations

import multiprocessing
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import cache
from multiprocessing.connection import Listener
from typing import NamedTuple

import torch

from mnist.bench.baselines import LOOPS, Job, Pass, find_device
from mnist.bench.report import Row
from mnist.config import StepMode, TrainConfig, evolve
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


class Loop(NamedTuple):
    """A key of `baselines.LOOPS`; data-loading processes (the usual loops); step mode (this project and `bare`)."""

    name: str
    num_workers: int = 0
    step_mode: StepMode = "eager"

    def __str__(self) -> str:
        mode = f"{self.num_workers} workers" if self.name in ("pipeline", "prepared") else self.step_mode
        return f"{NAMES[self.name]}, {mode}"


class Measurement(NamedTuple):
    """One pass of one loop: its speed, its mean loss, and the most memory that its process has held so far.

    Memory is without that of workers; on a GPU it is what torch has allocated there.
    """

    images_per_s: float
    loss: float
    peak_memory_mb: float


Results = Mapping[Loop, Sequence[Measurement]]  # the first pass of each is not counted


def measure_loops(loops: Sequence[Loop], config: TrainConfig, num_images: int, repeats: int) -> Results:
    """Each loop trains `repeats` + 1 passes over `num_images` images, in turns.

    Raises:
        RunError: a loop cannot run, or its process has died.
        OSError: TMPDIR is too long for the sockets of data-loading processes, which would wait for ever.
    """
    Listener().close()
    context = multiprocessing.get_context("spawn")  # this project takes one thread only in a forked process
    results: dict[Loop, list[Measurement]] = {loop: [] for loop in loops}
    with ExitStack() as stack:
        processes = {loop: stack.enter_context(ProcessPoolExecutor(1, context)) for loop in loops}
        for index in range(repeats + 1):
            for loop in loops:
                pending = processes[loop].submit(_measure, loop, config, num_images, index)
                try:
                    results[loop].append(pending.result())
                except BrokenProcessPool as error:
                    raise RunError(f"the process of {loop} has died") from error
    return results


def _measure(loop: Loop, config: TrainConfig, num_images: int, index: int) -> Measurement:
    """Trains pass `index`, in the process of a loop."""
    device = find_device(config.runtime)
    train_pass = _build(loop, config, num_images)
    started = time.perf_counter()
    loss_sum, num_seen = train_pass(index)
    wait_for_device(device)
    seconds = time.perf_counter() - started
    if torch.get_num_threads() != config.runtime.num_threads:
        raise RunError(f"{loop}: has run with {torch.get_num_threads()} threads, not {config.runtime.num_threads}")
    return Measurement(num_seen / seconds, loss_sum / num_seen, peak_memory_mb(device))


@cache
def _build(loop: Loop, config: TrainConfig, num_images: int) -> Pass:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    if loop.name in ("bare", "project"):
        keep_memory()  # as every command of this project does; the usual loops do not
    torch.set_num_threads(config.runtime.num_threads)
    config = evolve(config, step_mode=loop.step_mode, cpu=find_device(config.runtime).type == "cpu")
    dataset = read(config.data.dataset, config.data, size=config.image.image_size)
    split = dataset.train[:num_images]
    split = Split(split.images.clone(), split.labels.clone())  # without the memory of the whole data set
    return LOOPS[loop.name](Job(config, split, dataset.info, loop.num_workers))


def compare(recipe: str, results: Results) -> list[Row]:
    """A row per loop: speed, ratio to the usual pipeline, and time over the bare loop in the same mode."""
    usual = _rates(results[Loop("pipeline")])
    rows = []
    for loop, passes in results.items():
        rates, bare = _rates(passes), results.get(Loop("bare", step_mode=loop.step_mode))
        rows.append(
            {
                "recipe": recipe,
                "loop": str(loop),
                "images/s": statistics.median(rates),
                "min": min(rates),
                "max": max(rates),
                "x usual": paired_ratio(rates, usual),
                "over bare": paired_ratio(_rates(bare), rates) - 1 if bare and loop.name == "project" else None,
                "memory MB": passes[-1].peak_memory_mb,
            }
        )
    return rows


def _rates(passes: Sequence[Measurement]) -> list[float]:
    return [one.images_per_s for one in passes[1:]]


def paired_ratio(rates: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(rates, base, strict=True))


def check_losses(results: Results) -> float:
    """Checks that the project and the bare loop, in every mode, compute what the eager bare loop computes.

    Returns:
        The largest relative difference of the mean losses of the first pass.

    Raises:
        RunError: they do not, so a comparison of their speed would mean nothing.
    """
    limit = results[Loop("bare")][0].loss
    differences = [0.0]
    for loop, passes in results.items():
        if loop.name in ("bare", "project"):
            loss = passes[0].loss
            differences.append(abs(loss - limit) / limit)
            if not differences[-1] <= LOSS_TOLERANCE:
                raise RunError(
                    f"{loop}: the loss of the first pass is {loss:.4f}, but {limit:.4f} in the eager bare loop: they "
                    "do not compute the same"
                )
    return max(differences)
