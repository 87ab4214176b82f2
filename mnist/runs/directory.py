"""The run directory: found or made, locked, and told what happened.

In: the resolved configuration. Out: a folder with config.json, environment.json and result.json, held under a lock that
the kernel releases when the process ends, however it ends. Only rank 0 comes here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

with contextlib.suppress(ImportError):  # Windows has none
    import fcntl

from mnist.config import RUNS, TrainConfig, fields_on_resume, to_flat
from mnist.errors import RunError, UserError
from mnist.system.files import read_json, write_atomically, write_json

UNFINISHED = ("running", "preempted")
# What a run writes; `--resume never` sets it aside.
CONTENTS = (
    *("config.json", "environment.json", "metrics.jsonl", "result.json", "wandb_id"),
    *("checkpoints", "export", "pictures", "tensorboard"),
)


class RunDir:
    """A run directory, locked where the file system has locks."""

    def __init__(self, path: Path, lock: TextIO, is_locked: bool) -> None:
        self.path = path
        self.is_locked = is_locked
        self._lock = lock

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def read(self, name: str) -> dict[str, Any]:
        """What config.json or result.json says of an earlier start, {} where there is none."""
        return read_json(self.path / name)

    def has_records(self) -> bool:
        """Whether an earlier start has written any into metrics.jsonl."""
        metrics = self.path / "metrics.jsonl"
        return metrics.exists() and metrics.stat().st_size > 0

    def write_result(self, status: str, **facts: Any) -> None:
        """Replaces result.json; status is running, finished, preempted, failed or diverged."""
        write_json(self.path / "result.json", {"status": status, **facts})

    def set_aside(self) -> Path | None:
        """Moves what an earlier run left here into before-<time>/, so that a new one can start; says where it is."""
        return self.move_aside([self.path / name for name in CONTENTS if (self.path / name).exists()])

    def rewind(self, step: int, later: list[Path]) -> None:
        """Moves what belongs to later steps into before-<time>/, so that the run can take another way from `step` on.

        W&B cannot take points back: the run gets a new id there.

        Args:
            step: records up to this step stay.
            later: checkpoints of later steps.
        """
        metrics = self.path / "metrics.jsonl"
        lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
        try:
            kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{metrics}: a line is no record; mend it, or start over elsewhere") from error
        if not later and kept == lines:
            return
        wandb_id = self.path / "wandb_id"
        folder = self.move_aside([*later, *([wandb_id] if wandb_id.exists() else [])]) or self._make_before()
        if kept != lines:
            shutil.copy(metrics, folder)
            write_atomically(metrics, b"".join(kept))  # a kill leaves all records, or these

    def move_aside(self, paths: list[Path]) -> Path | None:
        """Moves files or folders of this run into a new before-<time>/; says where they are."""
        if not paths:
            return None
        folder = self._make_before()
        for path in paths:
            shutil.move(path, folder / path.name)
        return folder

    def _make_before(self) -> Path:
        folder = self.path / f"before-{datetime.now():%Y%m%d-%H%M%S-%f}"
        folder.mkdir()
        return folder


class InUseError(UserError):
    """Another process holds the lock of a run directory."""


def resume_mode(config: TrainConfig) -> str:
    """--resume, but auto when a launcher or a scheduler has restarted the job: it has started over once already."""
    return "auto" if is_restart() else config.output.resume


def is_restart() -> bool:
    """Whether a launcher or a scheduler has started this job before."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in names)


def open_run_dir(config: TrainConfig, dataset: str) -> RunDir:
    """The run directory, locked: the one asked for, an unfinished one of the same configuration, or a new one.

    Raises:
        InUseError: another process writes there (named with host and pid).
        UserError: not writable.
    """
    if config.output.run_dir is not None:
        return _lock(Path(config.output.run_dir))
    if resume_mode(config) == "auto":
        for path in _unfinished_runs(config):
            with contextlib.suppress(InUseError):
                return _lock(path)
    return _lock(_new_folder(f"{config.recipe}-{dataset}-{datetime.now():%Y%m%d-%H%M%S}"))


def _new_folder(name: str) -> Path:
    """A folder below runs/ that nobody else has, also where several runs start in the same second."""
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


def _unfinished_runs(config: TrainConfig) -> list[Path]:
    wanted = _essentials(to_flat(config))
    found = []
    for path in sorted(RUNS.glob("*/"), key=lambda p: p.stat().st_mtime, reverse=True):
        status = read_json(path / "result.json").get("status")
        is_unfinished = status in UNFINISHED or (status == "failed" and any((path / "checkpoints").glob("step-*")))
        if is_unfinished and _essentials(read_json(path / "config.json")) == wanted:
            found.append(path)
    return found


def _essentials(flat: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flat.items() if name not in fields_on_resume("free")}


def _lock(path: Path) -> RunDir:
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a+")
        is_locked = _flock(lock)
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise InUseError(f"--run-dir {path}: in use by {holder}; choose another directory, or wait") from error
    except OSError as error:
        raise UserError(f"--run-dir {path}: not writable ({error.strerror or error})") from error
    return RunDir(path, lock, is_locked)


def _flock(file: TextIO) -> bool:
    """Locks an open file; false where the platform (Windows) or the file system has no locks.

    Raises:
        BlockingIOError: another process has locked it.
    """
    if os.name != "posix":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
