"""What goes wrong: a watchdog against stalls, and faults on demand for drills.

In: time, and the environment variable MNIST_FAULT. Out: the stacks of a stalled process and its end; or the fault asked
for. Standard library only.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import TypeVar

FAULT_VARIABLE = "MNIST_FAULT"  # such as "kill rank=1 step=33"; kill, raise, hang or exit, in the first attempt only

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
            if sys.__stderr__ is not None:
                faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=sys.__stderr__)

    def rest(self) -> None:
        """Stops watching."""
        faulthandler.cancel_dump_traceback_later()


def inject(steps: Iterator[T], first_step: int, rank: int) -> Iterator[T]:
    """`steps` as they are, or, in a drill, with the fault of MNIST_FAULT when its rank is about to take its step."""
    drill = os.environ.get(FAULT_VARIABLE)
    if drill is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return steps
    kind, *conditions = drill.split()
    where = {name: int(value) for name, value in (condition.split("=") for condition in conditions)}
    return _with_fault(steps, kind, where["step"] - first_step) if where["rank"] == rank else steps


def _with_fault(steps: Iterator[T], kind: str, at_index: int) -> Iterator[T]:
    for index, step in enumerate(steps):
        if index == at_index:
            _fail(kind)
        yield step


def _fail(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "hang":
        time.sleep(3600)
    elif kind == "exit":
        raise SystemExit(0)
    else:
        raise RuntimeError(f"{FAULT_VARIABLE} asked for this: {kind}")
