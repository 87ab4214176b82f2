"""Faults on demand, for drills.

In: what `--inject` asks for. Out: the fault asked for, at the step asked for. Standard library only.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from mnist.config import Fault, parse_fault

T = TypeVar("T")


def faults_on_rank(texts: Sequence[str], rank: int) -> list[Fault]:
    """What `--inject` asks for on this rank."""
    return [fault for fault in map(parse_fault, texts) if fault.rank == rank]


def inject(steps: Iterator[T], faults: Sequence[Fault], steps_done: int, weights: Iterable[Any]) -> Iterator[T]:
    """`steps` as they are, or, in a drill, with `faults` before the steps that they name.

    Args:
        steps: what this rank is about to work on.
        faults: what shall go wrong on this rank.
        steps_done: steps taken before the first of `steps`.
        weights: the model's tensors, of which nan spoils the first: the next loss is then no number.
    """
    return _with_faults(steps, faults, steps_done, weights) if faults else steps


def _with_faults(steps: Iterator[T], faults: Sequence[Fault], steps_done: int, weights: Iterable[Any]) -> Iterator[T]:
    for number, step in enumerate(steps, start=steps_done + 1):
        for fault in faults:
            if fault.step in (0, number):
                _happen(fault, weights)
        yield step


def _happen(fault: Fault, weights: Iterable[Any]) -> None:
    match fault.kind:
        case "nan":
            next(iter(weights)).data.fill_(math.nan)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(3600)
        case "slow":
            time.sleep(fault.seconds)
        case "exit":
            raise SystemExit(0)
        case _:
            raise RuntimeError("--inject asked for this")
