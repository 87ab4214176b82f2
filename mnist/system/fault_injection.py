"""Faults on demand, to try what a run does about them.

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


def inject(steps: Iterator[T], texts: Sequence[str], rank: int, steps_done: int, weights: Iterable[Any]) -> Iterator[T]:
    """`steps`; before those that the faults name, the fault happens on this rank.

    Args:
        steps: what this rank is about to work on.
        texts: what `--inject` asks for.
        rank: of this process.
        steps_done: steps taken before the first of `steps`.
        weights: the model's tensors, of which nan spoils the first: the next loss is then no number.
    """
    faults = [fault for fault in map(parse_fault, texts) if fault.rank == rank]
    for number, step in enumerate(steps, start=steps_done + 1):
        for fault in faults:
            if fault.step in (0, number):
                _cause(fault, weights)
        yield step


def _cause(fault: Fault, weights: Iterable[Any]) -> None:
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
