"""Starts the real commands in processes of their own, and ends whatever they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
CONFIGURED = [*ACCELERATE, "--config_file", str(ROOT / "accelerate_config.yaml")]


@dataclass
class Finished:
    """What a command left: exit code, both outputs, and seconds from start to end."""

    code: int
    out: str
    err: str
    seconds: float


@contextmanager
def started(command: Sequence[str], cwd: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A command as leader of a process group of its own, which is ended with all its members."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "RANK", "WORLD"))}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**inherited, "WANDB_MODE": "disabled", "CI": "true", "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in [process.pid, *members(process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def members(session: int) -> list[int]:
    """Living processes of a session, zombies left out: what a command has started and not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
        except OSError:
            continue
        if fields and int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def finish(command: Sequence[str], cwd: Path, timeout: float = 100, **environment: str) -> Finished:
    """Runs a command to its end, and checks that it leaves no process behind."""
    start = time.monotonic()
    with started(command, cwd, **environment) as process:
        out, err = process.communicate(timeout=timeout)
        seconds = time.monotonic() - start
        assert members(process.pid) == []
    return Finished(process.returncode, out, err, seconds)


def train(*arguments: str, launcher: Sequence[str] = PYTHON) -> list[str]:
    """The command line of a training run."""
    return [*launcher, str(ROOT / "train_ddp.py"), *arguments]
