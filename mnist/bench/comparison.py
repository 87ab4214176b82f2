"""Measures loops side by side: each in its own process, one after the other, round after round.

In: loops and a configuration. Out: a `LoopResult` (images/s, losses, memory) and a row of a table for each. Loops take
turns pass by pass, so that other work on the machine slows all of them alike, and ratios are taken within a round. A
process each gives them their own memory, threads and precision (Accelerate has one per process). Linux and macOS.
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
from mnist.bench.report import Row
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
class Loop:
    """A loop and the mode in which it runs.

    Attributes:
        name: a key of `baselines.LOOPS`.
        precision: fp32 ("no") or bf16.
        num_workers: of its DataLoader, where it has one.
        dynamo: the backend of torch.compile, or "no".
        step_mode: eager, or captured as one CUDA graph; for this project and the bare loop.
    """

    name: str
    precision: Precision = "no"
    num_workers: int = 0
    dynamo: str = "no"
    step_mode: StepMode = "eager"


@dataclass(frozen=True)
class LoopResult:
    """Attributes:

    loop: which one.
    images_per_s: a value per counted round.
    losses: mean training loss of each pass, the uncounted first one included.
    num_images: images seen, the first pass included.
    peak_memory_mb: of its process, libraries included, workers not; on a GPU what torch has allocated there.
    """

    loop: Loop
    images_per_s: list[float]
    losses: list[float]
    num_images: int
    peak_memory_mb: float


class Measurement(NamedTuple):
    """One pass of one loop."""

    seconds: float
    loss_sum: float
    num_images: int
    peak_memory_mb: float


def measure_loops(loops: Sequence[Loop], config: TrainConfig, num_images: int, repeats: int) -> list[LoopResult]:
    """Each loop trains `repeats` + 1 passes over `num_images` images, in turns; the first is not counted.

    Raises:
        RunError: a loop's process has died; its error is on standard error.
    """
    with _start(loops, config, num_images) as pipes:
        rounds = [
            [_ask(pipe, loop, index) for pipe, loop in zip(pipes, loops, strict=True)] for index in range(repeats + 1)
        ]
    return [_result(*pair) for pair in zip(loops, zip(*rounds, strict=True), strict=True)]


def _result(loop: Loop, passes: Sequence[Measurement]) -> LoopResult:
    return LoopResult(
        loop=loop,
        images_per_s=[one.num_images / one.seconds for one in passes[1:]],
        losses=[one.loss_sum / one.num_images for one in passes],
        num_images=sum(one.num_images for one in passes),
        peak_memory_mb=passes[-1].peak_memory_mb,
    )


@contextmanager
def _start(loops: Sequence[Loop], config: TrainConfig, num_images: int) -> Iterator[list[Connection]]:
    """Starts a process per loop; each ends when its pipe closes, at the end of the block or of this process."""
    context = multiprocessing.get_context("forkserver")  # copies of a process that has only imported torch
    context.set_forkserver_preload([__name__])
    pipes: list[Connection] = []
    processes = []
    try:
        for loop in loops:
            ours, theirs = context.Pipe()
            process = context.Process(target=_train_passes, args=(loop, config, num_images, theirs))
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


def _ask(pipe: Connection, loop: Loop, index: int) -> Measurement:
    """Asks a loop's process to train pass `index`."""
    try:
        pipe.send(index)
        measured: Measurement = pipe.recv()
    except (EOFError, OSError) as error:
        raise RunError(f"the process of {loop} has died; its error stands above") from error
    return measured


def _train_passes(loop: Loop, config: TrainConfig, num_images: int, pipe: Connection) -> None:
    """The process of a loop: builds it, then trains a pass for each index that it receives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    if loop.dynamo == "no":
        os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)
    if loop.name in ("bare", "project"):
        keep_memory()  # as every command of this project does; the usual loops do not
    torch.set_num_threads(config.runtime.num_threads)
    device = find_device(config)
    mode = {"mixed_precision": loop.precision, "step_mode": loop.step_mode}
    config = evolve(config, **mode, cpu=device.type == "cpu")
    dataset = read(config.data.dataset, config.data, size=config.image.image_size)
    split, info = dataset.train[:num_images], dataset.info
    split = Split(split.images.clone(), split.labels.clone())
    del dataset  # else each loop's memory would contain the whole data set
    train_pass = LOOPS[loop.name](Job(config, split, info, loop.num_workers))
    try:
        while True:
            pipe.send(_measure(train_pass, pipe.recv(), device))
    except (EOFError, BrokenPipeError):  # the comparison has ended
        pass


def _measure(train_pass: Pass, index: int, device: torch.device) -> Measurement:
    started = time.perf_counter()
    loss_sum, num_images = train_pass(index)
    wait_for_device(device)
    seconds = time.perf_counter() - started
    return Measurement(seconds, loss_sum, num_images, peak_memory_mb(device))


def compare(recipe: str, results: Sequence[LoopResult]) -> list[Row]:
    """A row per loop: speed, ratio to the usual pipeline, and time over the bare loop."""
    usual = results[0]
    rows = []
    for result in results:
        loop = result.loop
        is_ours = loop.name == "project"
        limit = _find(results, Loop("bare", loop.precision, step_mode=loop.step_mode))
        twin = _find(results, Loop("bare", loop.precision))
        rows.append(
            {
                "recipe": recipe,
                "loop": NAMES[loop.name],
                "mode": describe(loop),
                "images/s": statistics.median(result.images_per_s),
                "min": min(result.images_per_s),
                "max": max(result.images_per_s),
                "x usual": paired_ratio(result.images_per_s, usual.images_per_s),
                "over bare": paired_ratio(limit.images_per_s, result.images_per_s) - 1 if limit and is_ours else None,
                "memory MB": result.peak_memory_mb,
                "loss difference": relative_difference(result, twin) if twin and is_ours else None,
                "loss": result.losses[-1],
                "passes": len(result.losses),
                "images seen": result.num_images,
            }
        )
    return rows


def _find(results: Sequence[LoopResult], loop: Loop) -> LoopResult | None:
    return next((result for result in results if result.loop == loop), None)


def describe(loop: Loop) -> str:
    """Precision, workers and compiler in words."""
    parts: list[str] = ["fp32" if loop.precision == "no" else loop.precision]
    if loop.name in ("pipeline", "prepared"):
        parts.append(f"{loop.num_workers} workers")
    if loop.dynamo != "no":
        parts.append(loop.dynamo)
    if loop.step_mode != "eager":
        parts.append(loop.step_mode)
    return ", ".join(parts)


def paired_ratio(rates: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(rates, base, strict=True))


def relative_difference(result: LoopResult, limit: LoopResult) -> float:
    """Relative difference of the mean losses of the first pass."""
    return abs(result.losses[0] - limit.losses[0]) / limit.losses[0]


def check_losses(results: Sequence[LoopResult]) -> None:
    """Checks that the project and the bare loop compute the same as the eager bare loop of their precision.

    Raises:
        RunError: they do not, so a comparison of their speed would mean nothing.
    """
    for result in results:
        for limit in results:
            loop = result.loop
            is_pair = loop.name in ("project", "bare") and limit.loop == Loop("bare", loop.precision)
            if is_pair and not relative_difference(result, limit) <= LOSS_TOLERANCE:
                raise RunError(
                    f"{NAMES[loop.name]}, {describe(loop)}: the loss of the first pass is {result.losses[0]:.4f}, but "
                    f"{limit.losses[0]:.4f} in the eager bare loop: they do not compute the same"
                )
