"""Measures loops side by side: each in a process of its own, one after the other, round after round.

In: contestants and a configuration. Out: an `Entry` per contestant: images/s, losses and memory. Contestants take turns
pass by pass, so that whatever else happens on the machine happens to all of them, and ratios are taken within a round.
Their own processes give each its own memory, threads and precision (Accelerate has one per process). Linux and macOS.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from mnist.batches import Split
from mnist.config import Precision, RunError, TrainConfig, evolve
from mnist.data import read
from mnist.rivals import LOOPS, Job, Pass, find_device

_DYNAMO = "ACCELERATE_DYNAMO_BACKEND"


@dataclass(frozen=True)
class Contestant:
    """A loop and the mode that it runs in.

    Attributes:
        loop: a name in `rivals.LOOPS`.
        precision: fp32 ("no") or bf16.
        num_workers: of its DataLoader, where it has one.
        dynamo: the backend of torch.compile, or "no".
    """

    loop: str
    precision: Precision = "no"
    num_workers: int = 0
    dynamo: str = "no"


@dataclass(frozen=True)
class Entry:
    """What was measured of a contestant.

    Attributes:
        contestant: whose.
        images_per_s: a value per counted round.
        losses: mean training loss of each pass, the uncounted first one included.
        num_images: images seen, the first pass included.
        peak_memory_bytes: on a GPU what torch has allocated at most; else the largest resident set of the process,
            libraries included, workers not.
    """

    contestant: Contestant
    images_per_s: list[float]
    losses: list[float]
    num_images: int
    peak_memory_bytes: int


class Measurement(NamedTuple):
    """One pass of one contestant."""

    seconds: float
    loss_sum: float
    num_images: int
    peak_memory_bytes: int


def hold_contest(
    contestants: Sequence[Contestant], config: TrainConfig, num_images: int, repeats: int
) -> tuple[list[Entry], str]:
    """Lets all contestants train `repeats` + 1 passes over `num_images` images, in turns; the first is not counted.

    Returns:
        The entries in the order given, and the name of the device.

    Raises:
        RunError: a contestant's process has died; its own error is on standard error.
    """
    with _start(contestants, config, num_images) as pipes:
        device_name: str = _ask(pipes[0], contestants[0], None)
        rounds: list[list[Measurement]] = [
            [_ask(pipe, contestant, index) for pipe, contestant in zip(pipes, contestants, strict=True)]
            for index in range(repeats + 1)
        ]
    return [_entry(*pair) for pair in zip(contestants, zip(*rounds, strict=True), strict=True)], device_name


def _entry(contestant: Contestant, passes: Sequence[Measurement]) -> Entry:
    return Entry(
        contestant=contestant,
        images_per_s=[one.num_images / one.seconds for one in passes[1:]],
        losses=[one.loss_sum / one.num_images for one in passes],
        num_images=sum(one.num_images for one in passes),
        peak_memory_bytes=passes[-1].peak_memory_bytes,
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


def _ask(pipe: Connection, contestant: Contestant, index: int | None) -> Any:
    """The answer of a contestant's process: to None its device's name, to an index the `Measurement` of that pass."""
    try:
        pipe.send(index)
        return pipe.recv()
    except (EOFError, OSError) as error:
        raise RunError(f"the process of {contestant} has died; its error stands above") from error


def _compete(contestant: Contestant, config: TrainConfig, num_images: int, pipe: Connection) -> None:
    """A contestant's process: builds its loop, then trains a pass for each index that it is sent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    if contestant.dynamo == "no":
        os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)
    torch.set_num_threads(config.runtime.num_threads)
    device = find_device(config)
    config = evolve(config, mixed_precision=contestant.precision, cpu=device.type == "cpu")
    train = read(config.data.dataset, config.data).train
    split = Split(train.images[:num_images].clone(), train.labels[:num_images].clone())
    del train  # or every row would show the whole data set
    train_pass = LOOPS[contestant.loop](Job(config, split, contestant.num_workers))
    try:
        while True:
            index = pipe.recv()
            pipe.send(_device_name(device) if index is None else _measure(train_pass, index, device))
    except EOFError:  # the contest is over
        pass


def _measure(train_pass: Pass, index: int, device: torch.device) -> Measurement:
    started = time.perf_counter()
    loss_sum, num_images = train_pass(index)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measurement(seconds, loss_sum, num_images, memory)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
