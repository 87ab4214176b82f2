"""The run directory: one for each run, locked while a process writes to it.

In: the resolved configuration. Out: a folder with config.json, environment.json and result.json, locked until
the process ends, whatever ends it. Only rank 0 reads and writes it, and tells the other ranks what is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from accelerate import Accelerator
from filelock import FileLock, Timeout

from mnist.config import RUNS, TrainConfig
from mnist.errors import UserError
from mnist.recipes import run_name
from mnist.runs.records import MANIFEST, RunRecord, Status, check_record, read_config, read_run_record
from mnist.runs.tracking.jsonl import flush_records
from mnist.system import ranks
from mnist.system.files import RecordError, read_json, refuse_symlink, write_json

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)  # what file systems without locks answer


@dataclass(frozen=True)
class RunDirectory:
    """A run directory as this start has found it.

    Attributes:
        path: of the directory.
        config: config.json of the start before this one; None where this is the first.
        result: result.json of the start before this one, likewise.
        belongs_to_this_job: whether an earlier attempt of the same job, which its launcher or scheduler has restarted,
            began it. Decided by rank 0, because each machine has a launcher of its own, and so another `job_id`.
        lock: held by rank 0; None on other ranks, and where the file system has no locks.
    """

    path: Path
    config: TrainConfig | None
    result: RunRecord | None
    belongs_to_this_job: bool
    lock: FileLock | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def write_result(self, status: Status, **facts: Any) -> RunRecord:
        """Replaces result.json, after the records that it stands for are on the disk. Rank 0 alone calls it."""
        path, content = self.path / "result.json", {"status": status, "job": job_id(), **facts}
        flush_records(self.path)
        write_json(path, content)
        return check_record(path, content, RunRecord)

    def remove_if_empty(self) -> None:
        """Removes a directory that holds nothing but the lock, because the run has not begun."""
        if self.lock is not None and [entry.name for entry in self.path.iterdir()] == [".lock"]:
            with contextlib.suppress(OSError):
                (self.path / ".lock").unlink()
                self.lock.release()
                self.path.rmdir()


def open_run_directory(config: TrainConfig, dataset: str, accelerator: Accelerator) -> RunDirectory:
    """The directory of this run, made and locked. Every rank must call this.

    `--run-dir` names it. Without one a new directory is made below runs/, named <run_name>-<dataset>-<date>-<time>.

    Raises:
        UserError: another process writes there (named with host and pid), or the folder is not writable.
    """
    lock: FileLock | None = None  # it cannot be sent to other ranks

    def open_it() -> RunDirectory:
        nonlocal lock
        path = _choose_path(config, dataset)
        lock = _lock(path)
        config_before = read_config(path / "config.json") if (path / "config.json").exists() else None
        result = read_run_record(path)
        return RunDirectory(path, config_before, result, is_restart() and result is not None and result.job == job_id())

    return replace(ranks.together(accelerator, open_it), lock=lock)


def branch_origin(config: TrainConfig) -> Path | None:
    """The checkpoint that a new run begins from (--resume PATH), or None."""
    wanted = config.output.resume
    return None if wanted in ("auto", "never") else Path(wanted).resolve()


def is_restart() -> bool:
    """Whether a launcher or a scheduler has started this job before."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in names)


def job_id() -> str:
    """Names the job that this process belongs to; a restarted job keeps its name.

    The SLURM job, or the launcher's process, or this process.
    """
    if "SLURM_JOB_ID" in os.environ:
        return f"slurm-{os.environ['SLURM_JOB_ID']}"
    own = psutil.Process()
    top = (own.parent() if "TORCHELASTIC_RUN_ID" in os.environ else None) or own
    return f"{socket.gethostname()}-{top.pid}-{top.create_time():.0f}"


def _choose_path(config: TrainConfig, dataset: str) -> Path:
    origin = branch_origin(config)
    if origin is not None and not (origin / MANIFEST).is_file():
        raise UserError(
            f"--resume {config.output.resume}: no checkpoint; give auto, never, last, a run directory or one of its "
            "checkpoints/step-... directories"
        )
    if config.output.run_dir is not None:
        return Path(config.output.run_dir)
    if is_restart():
        for result in RUNS.glob("*/result.json"):
            with contextlib.suppress(RecordError):  # the damaged record of another run is no reason to stop
                if read_json(result).get("job") == job_id():
                    return result.parent
    return _make_new(f"{run_name(config)}-{dataset}-{datetime.now():%Y%m%d-%H%M%S}")


def _make_new(name: str) -> Path:
    """A folder below runs/ that no other run has, also where several start in the same second."""
    number = 1
    while True:
        path = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except OSError:
            if path.exists():
                number += 1
                continue
        return path  # where it could not be made, the attempt to lock it says why


def _lock(path: Path) -> FileLock | None:
    lock = FileLock(path / ".lock", blocking=False)
    refuse_symlink(path / ".lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        holder = "another process"
        with contextlib.suppress(RecordError):
            found = read_run_record(path)
            holder = f"pid {found.pid} on {found.host}" if found is not None else holder
        raise UserError(f"--run-dir {path}: in use by {holder}; choose another directory, or wait") from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise UserError(f"--run-dir {path}: not writable ({error.strerror or error})") from error
    return lock
