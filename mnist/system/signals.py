"""Signals that ask a run to end: noted here, acted upon by the loop at a step that all ranks agree on.

In: SIGTERM, SIGUSR1 (SLURM, Kubernetes, launchers) and SIGINT (Ctrl-C). Out: `stop_requested()`. Standard library only,
because it runs before torch is imported, which takes a second in which a signal may come.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from types import FrameType

FORCE_AFTER_S = 2.0
START_GRACE_S = 5.0  # before training there is nothing to save
GRACE_S = 27.0  # launchers kill after 30
EXIT_FORCED = 130
EXIT_PREEMPTED = 75
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

_received: list[int] = []  # the signals that have come
_training = threading.Event()


def install() -> None:
    """Installs the handlers; a rank started by a launcher also gets SIGTERM when the launcher dies.

    A signal that is ignored stays ignored (nohup, background jobs). Where a platform lacks one, it is left out.
    """
    fill_standard_streams()
    _received.clear()
    _training.clear()
    _watch_over_the_end()
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)
    if _was_launched() and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def fill_standard_streams() -> None:
    """Puts /dev/null where a standard stream is closed; a file of the run would get its number, and its text.

    Python has None for such a stream, which nobody who writes to it expects.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def training_begins() -> None:
    """From now on a signal is answered by a checkpoint, which takes its time."""
    _training.set()


def _watch_over_the_end() -> None:
    """Ends a process at a later second Ctrl-C, and one that does not obey: in a collective whose other ranks are gone.

    The interpreter writes each signal's number to the wake-up descriptor at once, also where the main thread is in C++
    and no Python runs; a thread waits for that, and answers at once, in the longest step too. Signals arrive twice:
    SLURM tells every process and the launcher forwards; so a second one means nothing, except a second Ctrl-C
    of a person who has had time to read that the first one is being obeyed.
    """
    if os.name != "posix":
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        _announce(os.read(reader, 1)[0])
        first, is_training = time.monotonic(), _training.is_set()
        end = first + (GRACE_S if is_training else START_GRACE_S)
        while (left := end - time.monotonic()) > 0:
            has_come = select.select([reader], [], [], left)[0]
            if has_come and os.read(reader, 1)[0] == signal.SIGINT and time.monotonic() - first >= FORCE_AFTER_S:
                _say("ended without saving")
                os._exit(EXIT_FORCED)
        _say("the signal was not obeyed in time; this process was here:")
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(file=2)
        os._exit(1 if is_training else EXIT_PREEMPTED)

    threading.Thread(target=watch, daemon=True, name="signal-watch").start()


def stop_requested() -> bool:
    """Whether a signal has asked this process to end."""
    return bool(_received)


def signal_name() -> str | None:
    """The first signal that came, such as "SIGTERM"."""
    return signal.Signals(_received[0]).name if _received else None


def _was_launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _note(number: int, _frame: FrameType | None) -> None:
    _received.append(number)
    if len(_received) == 1 and os.name != "posix":
        _announce(number)


def _announce(number: int) -> None:
    if os.environ.get("RANK", "0") == "0":
        _say(f"\n{signal.Signals(number).name}: saving and ending at the next step")


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"{line}\n".encode())
