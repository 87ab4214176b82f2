"""Starts the real commands in processes of their own, and ends whatever they leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
MARK = "MNIST_TEST_COMMAND"
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
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**inherited, "WANDB_MODE": "disabled", "CI": "true", "PYTHONPATH": str(ROOT), **environment, MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process.mark = mark  # type: ignore[attr-defined]
    try:
        yield process
    finally:
        for pid in [*members(process), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def members(process: subprocess.Popen[str]) -> list[int]:
    """Living processes that a command has started, wherever they belong by now, itself left out.

    Launchers put their workers into sessions of their own: an inherited variable of the environment finds them.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == process.pid:
            continue
        try:
            is_ours = f"{MARK}={process.mark}".encode() in (entry / "environ").read_bytes()  # type: ignore[attr-defined]
            is_alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            continue
        if is_ours and is_alive:
            found.append(int(entry.name))
    return found


def left_behind(process: subprocess.Popen[str], patience_s: float = 10) -> list[str]:
    """Command lines of what outlives a command by a while: W&B's monitor ends by itself, soon after its parent."""
    deadline = time.monotonic() + patience_s
    while pids := members(process):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    lines = []
    for pid in pids:
        with contextlib.suppress(OSError):
            lines.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
    return lines


def finish(command: Sequence[str], cwd: Path, timeout: float = 100, **environment: str) -> Finished:
    """Runs a command to its end, and checks that it leaves no process behind."""
    start = time.monotonic()
    with started(command, cwd, **environment) as process:
        out, err = process.communicate(timeout=timeout)
        seconds = time.monotonic() - start
        assert left_behind(process) == []
    return Finished(process.returncode, out, err, seconds)


def together(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], cwd: Path) -> list[str]:
    """Runs commands side by side, as machines would; all must end well. What each wrote."""
    with ExitStack() as stack:
        processes = [
            stack.enter_context(started(command, cwd, **environment))
            for command, environment in zip(commands, environments, strict=True)
        ]
        outputs = ["".join(process.communicate(timeout=100)) for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def train(*arguments: str, launcher: Sequence[str] = PYTHON) -> list[str]:
    """The command line of a training run."""
    return [*launcher, str(ROOT / "train_ddp.py"), *arguments]
