"""The process as a whole: what it runs on, what is set before torch is imported, and how it ends.

In: the operating system. Out: cores; settings of OpenMP, of the C library and of Python itself. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import NoReturn

from mnist.errors import UserError

with contextlib.suppress(ImportError):  # Windows has none
    import resource

MIN_COLUMNS = 40
MIN_OPEN_FILES = 256  # torch, W&B and matplotlib together open some 60; W&B waits for ever where it gets none
_CPUINFO, _CGROUPS = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup")
_V1_NAMES = ("quota", "period")
TICK_S = 1.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h


def tune() -> None:
    """Settings that every command needs; to be called before torch is imported."""
    wait_briefly()
    keep_memory()
    columns = shutil.get_terminal_size().columns
    if "COLUMNS" in os.environ or columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(max(columns, MIN_COLUMNS))  # in 0 to 5 columns rich prints nothing, or for ever
    gc.set_threshold(100_000)  # imports make many objects that stay; looking for garbage among them takes 0.2 s


def check_surroundings() -> None:
    """Checks what a process inherits beside variables: the working directory and the limit on open files.

    Raises:
        UserError: names what is wrong and what to do.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise UserError("the working directory was deleted; change to another one") from error
    _raise_open_files_limit()


def _raise_open_files_limit() -> None:
    if os.name != "posix":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < MIN_OPEN_FILES:
        if 0 <= hard < MIN_OPEN_FILES:
            raise UserError(f"ulimit -n {hard}: too few open files; {MIN_OPEN_FILES} are needed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (MIN_OPEN_FILES, hard))


def wait_briefly() -> None:
    """Lets OpenMP's threads sleep after some ten microseconds of waiting, unless OMP_WAIT_POLICY is set.

    They spin for milliseconds by default. On a machine that does other work as well a thread then waits for one that
    has no core to run on: training was 3 to 8 times slower. Where nothing else runs this costs 3 %. Torch's OpenMP
    reads it when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def keep_memory() -> None:
    """Lets the C library keep the memory of freed tensors for the next ones.

    It gives it back to the system by default, and gets it again at the next step, page by page: on a CPU `yannet` had
    0.7 of its speed. (Only glibc has this switch. Environment variables about it have precedence.)
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # bytes; the most that it takes
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def fill_standard_streams() -> None:
    """Opens /dev/null in the place of each standard stream that is closed.

    Otherwise a file of the run would get the stream's number, and its text. Python has None for such a stream.
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


def usable_cores() -> list[int]:
    """Cores that this process may run on: its affinity mask, where the platform has one."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cpu_quota() -> float | None:
    """How many cores' time this process's container may use (Linux control groups, version 2 or 1); None = no limit."""
    try:
        if (_CGROUPS / "cpu.max").exists():
            limit, period = (_CGROUPS / "cpu.max").read_text(encoding="ascii").split()
        else:
            limit, period = ((_CGROUPS / f"cpu/cpu.cfs_{name}_us").read_text(encoding="ascii") for name in _V1_NAMES)
        return max(int(limit), 0) / int(period) or None  # version 1 says -1 for no limit
    except (OSError, ValueError, ZeroDivisionError):  # no such file; "max 100000"
        return None


def num_usable_cores() -> int:
    """The number of threads that can run at a time: the cores, or a container's quota where that is smaller."""
    cores, quota = len(usable_cores()), cpu_quota()
    return cores if quota is None else min(cores, math.ceil(quota))


def cpu_name() -> str:
    """The processor's name."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class RunningClock:
    """Counts the seconds in which this process could run; to be read about every `TICK_S`.

    A longer gap counts as two ticks: the process was stopped (Ctrl-Z, `docker pause`, SLURM's suspend).
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last = time.monotonic()

    def read(self) -> float:
        """Seconds since the clock was made."""
        now = time.monotonic()
        self._seconds += min(now - self._last, 2 * TICK_S)
        self._last = now
        return self._seconds


def started_by() -> str:
    """What has started this process: "accelerate launch", "torchrun", "srun" or, alone, "python"."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return "accelerate launch"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "srun" if "SLURM_PROCID" in os.environ else "python"


def was_launched() -> bool:
    """Whether the parent of this process is a launcher that ends its ranks: torchrun or `accelerate launch`."""
    return started_by() in ("torchrun", "accelerate launch")


def print_after_launcher(text: str) -> None:
    """Prints `text` once the launcher has ended: at Ctrl-C launchers print their tracebacks below all that ranks say.

    Only for a person at a terminal. A forked process waits for it, for 30 s at most.
    """
    launcher = os.getppid()
    if not was_launched() or not sys.stderr.isatty() or os.fork() != 0:
        return
    os.closerange(3, 4096)  # the run's lock among them
    for _ in range(300):
        time.sleep(0.1)
        if not Path(f"/proc/{launcher}").exists():
            break
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
    os._exit(0)


def leave(code: int) -> NoReturn:
    """Exits without a last garbage collection, which would take 0.4 s.

    With several ranks garbage is collected, so that Python frees a broken process group in its usual order. Where the
    group is still open, after an error on NCCL (`open_accelerator`), the process ends at once.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        gc.freeze()
    sys.exit(code)
