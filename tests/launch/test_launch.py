"""The commands that people type, with real launchers and real processes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ACCELERATE, CONFIGURED, PYTHON, ROOT, TORCHRUN, finish, left_behind, members, started, train

pytestmark = pytest.mark.launch

SMOKE = [
    *("--recipe", "smoke", "--global-batch-size", "64", "--lr", "5e-3"),
    *("--max-steps", "138", "--min-accuracy", "0.5", "--no-pictures"),
]
NO_NETWORK = {
    "MNIST_DATA_DIR": "data",
    "MNIST_MIRROR": "http://127.0.0.1:9/",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
}
LONG = ["--dataset", "digits", "--recipe", "convnet", "--epochs", "50", "--num-threads", "1", "--log-every", "50"]


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    ("launcher", "world_size", "evaluation"),
    [
        (PYTHON, 1, "sharded"),
        (ACCELERATE, 1, "rank0"),
        (CONFIGURED, 1, "rank0"),
        ([*TORCHRUN, "--nproc-per-node", "2"], 2, "sharded"),
        ([*CONFIGURED, "--num_processes", "3"], 3, "rank0"),
    ],
)
def test_every_launcher_ends_with_the_right_world_size(
    tmp_path: Path, launcher: list[str], world_size: int, evaluation: str
) -> None:
    done = finish(train(*SMOKE, "--run-dir", "run", "--evaluation", evaluation, launcher=launcher), tmp_path)
    assert done.code == 0, done.err
    found = result(tmp_path / "run")
    assert (found["status"], found["world_size"], found["test"]["num_samples"]) == ("finished", world_size, 360)
    assert done.out.count("test  digits: accuracy") == 1, "one rank speaks"
    assert "\x1b" not in done.out + done.err
    assert "\r" not in done.out + done.err


def test_without_network_and_data_the_digits_are_trained_and_nobody_can_miss_it(tmp_path: Path) -> None:
    done = finish(train("--num-threads", "1", "--run-dir", "run", "--min-accuracy", "0.92"), tmp_path, **NO_NETWORK)
    assert done.code == 0, done.err
    assert "NOT MNIST: these are the 1,797 embedded digits" in done.err
    assert result(tmp_path / "run")["dataset"] == "digits"
    assert result(tmp_path / "run")["steps"] == 158
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dataset"] == "digits"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["dataset"] for line in lines} == {"digits"}
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "launcher", [PYTHON, [*TORCHRUN, "--nproc-per-node", "2"], CONFIGURED], ids=["python", "torchrun", "accelerate"]
)
def test_missing_mnist_is_one_message_on_every_launcher(tmp_path: Path, launcher: list[str]) -> None:
    done = finish(train("--dataset", "mnist", launcher=launcher), tmp_path, **NO_NETWORK)
    assert done.code != 0
    assert done.err.count("error: --dataset mnist: not in data/MNIST/raw") == 1
    assert "--dataset digits" in done.err
    assert not re.search(r"mnist/\w+\.py", done.err), "no frame of ours"
    assert not list(tmp_path.iterdir())


def wait_until(condition: Any, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.05)


def has_records(folder: Path) -> bool:
    path = folder / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        (PYTHON, signal.SIGTERM),
        *(([*TORCHRUN, "--nproc-per-node", "2"], number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_a_signal_to_the_launcher_saves_and_is_resumable(tmp_path: Path, launcher: list[str], number: int) -> None:
    with started(train(*LONG, "--run-dir", "run", launcher=launcher), tmp_path) as process:
        wait_until(lambda: has_records(tmp_path / "run"))
        os.kill(process.pid, number)
        process.wait(timeout=60)
        assert left_behind(process) == []
    found = result(tmp_path / "run")
    assert found["status"] == "preempted"
    assert process.returncode == (75 if launcher is PYTHON else 1)
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints[-1] == f"step-{found['steps']:08d}"


@contextlib.contextmanager
def at_a_terminal(tmp_path: Path, launcher: list[str]) -> Iterator[tuple[int, int]]:
    """A run at a terminal of its own, once it has begun: its process, and the other end of the terminal."""
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        command = train(*LONG, "--run-dir", "run", "--wandb", "disabled", launcher=launcher)
        os.chdir(tmp_path)
        os.execve(command[0], command, {**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + 100
        while not has_records(tmp_path / "run"):
            assert time.monotonic() < deadline
            read_terminal(terminal)  # or the command waits for a reader
        yield child, terminal
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def read_terminal(terminal: int) -> str:
    try:
        return os.read(terminal, 10_000).decode() if select.select([terminal], [], [], 0.05)[0] else ""
    except OSError:  # nobody writes any more
        return ""


@pytest.mark.parametrize("launcher", [PYTHON, [*TORCHRUN, "--nproc-per-node", "2"]], ids=["python", "torchrun"])
def test_a_terminal_that_closes_leaves_a_checkpoint(tmp_path: Path, launcher: list[str]) -> None:
    with at_a_terminal(tmp_path, launcher) as (child, terminal):
        os.close(terminal)  # the kernel sends SIGHUP; from now on writing to the terminal fails
        wait_until(lambda: os.waitpid(child, os.WNOHANG)[0] != 0)
    found = result(tmp_path / "run")
    assert (found["status"], found["signal"]) == ("preempted", "SIGHUP")
    assert (tmp_path / "run" / "checkpoints" / f"step-{found['steps']:08d}").is_dir()


@pytest.mark.parametrize(
    "launcher", [PYTHON, [*TORCHRUN, "--nproc-per-node", "2"], CONFIGURED], ids=["python", "torchrun", "accelerate"]
)
def test_after_ctrl_c_the_last_line_is_the_command_that_continues(tmp_path: Path, launcher: list[str]) -> None:
    with at_a_terminal(tmp_path, launcher) as (child, terminal):
        os.write(terminal, b"\x03")
        seen, ended = "", False
        deadline = time.monotonic() + 60
        while not (ended and ("to continue: " in seen or launcher is PYTHON)):
            assert time.monotonic() < deadline, seen
            seen += read_terminal(terminal)
            ended = ended or os.waitpid(child, os.WNOHANG)[0] != 0
        time.sleep(0.5)
        seen += read_terminal(terminal)
        os.close(terminal)
    last = [line for line in seen.strip().splitlines() if "\u2501" not in line][-1]  # below it is only a rule
    assert last.endswith("train_ddp.py --resume run"), seen
    assert launcher is PYTHON or "Traceback" in seen, "what launchers print, above it"


def test_a_run_that_was_stopped_for_longer_than_its_time_out_continues(tmp_path: Path) -> None:
    with started(train(*LONG, "--run-dir", "run", "--timeout-s", "4"), tmp_path) as process:
        wait_until(lambda: has_records(tmp_path / "run"))
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(8)
        size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
        os.kill(process.pid, signal.SIGCONT)
        wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").stat().st_size > size)
        time.sleep(2)  # the watchdog looks about every second
        process.terminate()
        assert process.wait(timeout=60) == 75
        assert process.stderr is not None
        assert "no progress" not in process.stderr.read()


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="limits bind root only with setpriv")
def test_a_run_without_room_for_another_thread_finishes(tmp_path: Path) -> None:
    limited = ["setpriv", "--ruid", "65534", "--bounding-set", "-sys_admin,-sys_resource", "prlimit", "--nproc=1"]
    probe = [*limited, *PYTHON, "-c", "import threading; threading.Thread(target=print).start()"]
    assert "can't start new thread" in finish(probe, tmp_path).err
    done = finish([*limited, *train(*SMOKE, "--num-threads", "1", "--run-dir", "run")], tmp_path)
    assert done.code == 0, done.err
    assert result(tmp_path / "run")["status"] == "finished"


def test_a_killed_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    with started(train(*LONG, "--run-dir", "run", launcher=ACCELERATE), tmp_path) as process:
        wait_until(lambda: has_records(tmp_path / "run"))
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
        wait_until(lambda: members(process) == [], timeout=60)
    assert result(tmp_path / "run")["status"] == "preempted"


def test_a_reader_that_goes_away_does_not_end_a_run(tmp_path: Path) -> None:
    with started(train(*SMOKE, "--max-steps", "920", "--num-threads", "1", "--run-dir", "run"), tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == 0
    assert result(tmp_path / "run")["status"] == "finished"


def test_closed_streams_are_not_taken_for_files_of_the_run(tmp_path: Path) -> None:
    command = " ".join(train(*SMOKE, "--num-threads", "1", "--run-dir", "run"))
    done = finish(["sh", "-c", f"{command} <&- >&- 2>&-"], tmp_path)
    assert done.code == 0
    assert "accuracy" not in (tmp_path / "run" / ".lock").read_text()
    assert result(tmp_path / "run")["status"] == "finished"


def test_a_log_without_room_does_not_end_a_run(tmp_path: Path) -> None:
    command = " ".join(train(*SMOKE, "--num-threads", "1", "--run-dir", "run"))
    assert finish(["sh", "-c", f"{command} 2>/dev/full"], tmp_path).code == 0
    assert result(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize("stream", ["2>&-", "2>/dev/full"])
def test_a_mistake_has_its_exit_code_also_where_nobody_reads_why(tmp_path: Path, stream: str) -> None:
    for wrong in (["--schedule", "cosin"], ["--recipe", "smoke", "--global-batch-size", "99999"]):
        done = finish(["sh", "-c", f"{' '.join(train(*wrong, '--run-dir', 'run'))} {stream}"], tmp_path)
        assert (done.code, done.out) == (2, "")


@pytest.mark.skipif("MNIST_DATA_DIR" not in os.environ, reason="MNIST_DATA_DIR does not name a folder with MNIST")
def test_the_default_command_reaches_99_percent_on_mnist(tmp_path: Path) -> None:
    done = finish(train("--dataset", "mnist", "--min-accuracy", "0.99", "--run-dir", "run"), tmp_path)
    assert done.code == 0, done.err
    assert result(tmp_path / "run")["test"]["num_samples"] == 10_000
