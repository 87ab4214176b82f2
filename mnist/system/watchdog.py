"""Ends a process that has stalled, after printing where its threads are.

In: time. Out: the stacks of a stalled process and its end. Standard library only.
"""

from __future__ import annotations

import faulthandler
import time


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
