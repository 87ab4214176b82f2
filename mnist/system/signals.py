"""Signals that ask a run to end: noted here; the loop acts on them at a step that all ranks agree on.

In: SIGTERM, SIGUSR1 (SLURM, Kubernetes, launchers), SIGINT (Ctrl-C), SIGHUP (the terminal is gone), SIGXCPU (a soft
limit on CPU time). Out: `stop_requested()`. Standard library only, because it runs before torch is imported.
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
from collections.abc import Iterator
from types import FrameType
from typing import Any

from mnist.errors import is_first_rank
from mnist.system.process import TICK_S, RunningClock, fill_standard_streams, was_launched

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGXCPU")
FORCE_AFTER_S = 2.0
START_GRACE_S = 5.0  # before training there is nothing to save
GRACE_S = 27.0  # launchers kill after 30
EXIT_FORCED = 130
EXIT_PREEMPTED = 75
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

_handled: list[int] = []  # the signals that have our handler
_received: list[int] = []  # the signals that have come
_training, _is_watched = threading.Event(), threading.Event()


def install() -> None:
    """Installs the handlers; a rank started by a launcher also gets SIGTERM when the launcher dies.

    A signal that is ignored stays ignored (nohup, background jobs). Where a platform lacks one, it is left out.
    """
    fill_standard_streams()
    _received.clear()
    _handled.clear()
    _training.clear()
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)
            _handled.append(number)
    if os.name == "posix":
        _start_watching()
        os.register_at_fork(after_in_child=_reset_in_child)
    if was_launched() and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def interrupts_noted() -> Iterator[None]:
    """For a process that is not ours, such as a notebook's: the first Ctrl-C asks the run to end, and raises nothing.

    Another one, 2 s later or more, raises KeyboardInterrupt as before. Handlers of our own, or of the caller, stay. In
    processes that `notebook_launcher` has forked SIGTERM counts too, and at the end the launcher's handler is called.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if is_main_thread}
    taken: dict[int, Any] = {number: handler for number, handler in before.items() if _raises(handler)}
    first: list[float] = []

    def note_or_raise(number: int, frame: FrameType | None) -> None:
        if first and time.monotonic() - first[0] >= FORCE_AFTER_S:
            taken[number](number, frame)
        first.append(time.monotonic())
        _note(number, frame)

    if taken:
        _received.clear()
    for number in taken:
        signal.signal(number, note_or_raise)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
        received = _received[:1] if taken else []
        if taken:
            _received.clear()
    if received and taken[received[0]] is not signal.default_int_handler:
        taken[received[0]](received[0], None)


def _raises(handler: Any) -> bool:
    """Whether a handler only raises an exception: Python's own, and that of torch's launcher in its ranks."""
    is_launchers = getattr(handler, "__module__", "") == "torch.distributed.elastic.multiprocessing.api"
    return handler is signal.default_int_handler or is_launchers


def are_installed() -> bool:
    """Whether this process is a command of ours, which may be ended, and not one that called us."""
    return bool(_handled)


def training_begins() -> None:
    """From now on a signal is answered by a checkpoint, which takes its time."""
    _training.set()


def _start_watching() -> None:
    """Starts a thread that ends this process when it does not stop in time, or at a second Ctrl-C.

    The main thread may be in C++, in a collective whose other ranks are gone, where no Python runs. The interpreter
    writes the number of *every* signal that has a Python handler to the wake-up descriptor, at once and also then;
    the thread reads it there. Where no thread can be started, signals are still noted.
    """
    reader, writer = os.pipe()
    with contextlib.suppress(RuntimeError):  # a limit on threads
        threading.Thread(target=_watch, args=(reader,), daemon=True, name="signal-watch").start()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        _is_watched.set()


def _watch(reader: int) -> None:
    """Waits for the first of our signals, then for the end of the time that the process has to obey it.

    Signals arrive twice: SLURM tells every process and the launcher forwards. So a second one means nothing, except a
    second Ctrl-C of a person who has had time to read that the first one is being obeyed.
    """
    while (number := os.read(reader, 1)[0]) not in _handled:
        pass
    _received.append(number)  # the handler waits for the main thread, which may be in C++
    _announce(number)
    first, is_training, clock = time.monotonic(), _training.is_set(), RunningClock()
    grace_s = GRACE_S if is_training else START_GRACE_S
    while clock.read() < grace_s:
        has_come = select.select([reader], [], [], min(TICK_S, grace_s))[0]
        if has_come and os.read(reader, 1)[0] == signal.SIGINT and time.monotonic() - first >= FORCE_AFTER_S:
            _say("ended without saving")
            os._exit(EXIT_FORCED)
    if not is_training:
        os._exit(EXIT_PREEMPTED)
    _say("the signal was not obeyed in time; this process was here:")
    with contextlib.suppress(OSError):
        faulthandler.dump_traceback(file=2)
    os._exit(1)


def _reset_in_child() -> None:
    """Takes the handlers from a forked process, such as a DataLoader's worker, which its parent ends by SIGTERM.

    It has inherited the wake-up descriptor: a signal to it would read as one to its parent. What a terminal sends to
    all processes is left to the parent.
    """
    if _handled:
        signal.set_wakeup_fd(-1)
    for number in _handled:
        from_terminal = signal.Signals(number).name in ("SIGINT", "SIGHUP")
        signal.signal(number, signal.SIG_IGN if from_terminal else signal.SIG_DFL)
    _handled.clear()


def stop_requested() -> bool:
    """Whether a signal has asked this process to end."""
    return bool(_received)


def signal_name() -> str | None:
    """The first signal that came, such as "SIGTERM"."""
    return signal.Signals(_received[0]).name if _received else None


def _note(number: int, _frame: FrameType | None) -> None:
    _received.append(number)
    if len(_received) == 1 and not _is_watched.is_set():
        _announce(number)


def _announce(number: int) -> None:
    if is_first_rank():
        what = "saving and ending at the next step" if _training.is_set() else "ending before training, nothing is lost"
        _say(f"\n{signal.Signals(number).name}: {what}")


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"{line}\n".encode())
