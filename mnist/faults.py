"""What goes wrong: a watchdog against stalls, and faults on demand for drills.

In: time, and what `--inject` asks for. Out: the stacks of a stalled process and its end; or the fault asked for.
Standard library only.
"""

from __future__ import annotations

import faulthandler
import math
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

_FAULT = re.compile(r"(?:(nan|kill|hang|raise|exit)@(?:rank(\d+):)?([1-9]\d*)|slow@(?:rank(\d+):)?(\d+(?:\.\d+)?))")

T = TypeVar("T")


class Watchdog:
    """Ends a process that shows no sign of life, after printing where all its threads are.

    Args:
        timeout_s: seconds without a sign of life.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._armed_at = -1.0

    def sign_of_life(self) -> None:
        """Starts the time-out anew, at most once a second, because it costs 40 microseconds."""
        now = time.monotonic()
        if self._armed_at < 0 or now - self._armed_at >= 1.0:
            self._armed_at = now
            faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=2)

    def rest(self) -> None:
        """Stops watching."""
        self._armed_at = -1.0
        faulthandler.cancel_dump_traceback_later()


@dataclass(frozen=True)
class Fault:
    """Something that shall go wrong on one rank.

    Attributes:
        kind: nan, kill, hang, raise, exit or slow.
        rank: where.
        step: when, counted from 1: just before this step is taken; 0 = before every step.
        seconds: what a slow rank loses before every step.
    """

    kind: str
    rank: int
    step: int = 0
    seconds: float = 0.0


def parse_fault(text: str) -> Fault:
    """`nan@30`, `kill@rank1:50`, `slow@rank1:0.05` -> `Fault`; without a rank, rank 0 is meant.

    Raises:
        ValueError: another form; says which forms there are.
    """
    match = _FAULT.fullmatch(text)
    if match is None:
        raise ValueError(
            "give KIND@STEP or KIND@rankN:STEP with nan, kill, hang, raise or exit and a step of 1 or more, or "
            "slow@rankN:SECONDS"
        )
    kind, rank, step, slow_rank, seconds = match.groups()
    if kind is None:
        return Fault("slow", int(slow_rank or 0), seconds=float(seconds))
    return Fault(kind, int(rank or 0), step=int(step))


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
