"""Ends a process that makes no progress, after printing where its threads are.

In: heartbeats. Out: the stacks of a stalled process and its end. Standard library only.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mnist.system.process import TICK_S, RunningClock

LINGER_S = 3.0  # other ranks learn of a stall within about a second: then all end at about the same time
END_S = 20.0  # for what is done at a stall, before the stacks are printed and the process ends


class Watchdog:
    """Ends a process that makes no progress, after printing where all its threads are.

    It watches from the first heartbeat on, in a thread of its own, which cannot run while another thread waits in C++
    with Python's global lock held. (A timer in C could, but would also end a process that was stopped by Ctrl-Z.)

    Args:
        timeout_s: seconds without a heartbeat, not counting those in which the process was stopped.
        each_tick: called about once a second; what it returns, if not None, is a reason to end now.
        at_stall: called once, with the reason, before the stacks are printed and the process ends with exit code 1.
    """

    def __init__(
        self,
        timeout_s: float,
        each_tick: Callable[[float], str | None] = lambda _: None,
        at_stall: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.timeout_s = timeout_s
        self._each_tick = each_tick
        self._at_stall = at_stall
        self._now = self._last_heartbeat = 0.0  # of the running clock
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def heartbeat(self) -> None:
        """Starts the time-out anew; costs nothing, and may be called in every step."""
        self._last_heartbeat = self._now
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            with contextlib.suppress(RuntimeError):  # a limit on threads: the run is not watched
                self._thread.start()

    def stop(self) -> None:
        """Stops watching, for good. Waits for the thread, whose `ended_after` would cancel one of the caller's."""
        self._stopped.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(TICK_S)  # no longer: it may be talking to a machine that is gone

    def _watch(self) -> None:
        clock, tick_s = RunningClock(), min(TICK_S, self.timeout_s / 4)
        while not self._stopped.wait(tick_s):
            self._now = clock.read()
            idle_s = self._now - self._last_heartbeat
            reason = None
            with (
                ended_after(self.timeout_s),
                contextlib.suppress(RuntimeError),
            ):  # it may talk to a machine that is gone
                reason = self._each_tick(idle_s)
            if reason is None and idle_s >= self.timeout_s:
                reason = f"no progress for {self.timeout_s:.0f} s"
            if reason is not None and not self._stopped.is_set():
                self._end(reason)

    def _end(self, reason: str) -> None:
        with ended_after(END_S), contextlib.suppress(Exception):  # the stacks are printed in any case
            self._at_stall(reason)
        with contextlib.suppress(OSError):  # nobody reads them
            faulthandler.dump_traceback(file=2)
        time.sleep(LINGER_S)
        os._exit(1)


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Ends the process with its stacks where the body takes longer, also where no Python can run."""
    try:
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    except RuntimeError:  # a limit on threads
        yield
        return
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
