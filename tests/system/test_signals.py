from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mnist.system import signals

ROOT = Path(__file__).parents[2]
# A test runner in the background, or under nohup, has signals ignored, and its children inherit that.
DEFAULTS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
WAITING = """
import sys, time
from mnist.system import signals
signals.install()
print("ready", flush=True)
while not signals.stop_requested():
    time.sleep(0.01)
print(signals.signal_name(), flush=True)
time.sleep(30)
"""


def start(program: str, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", signals.NAMES)
def test_a_signal_is_noted_and_named_once_by_rank_0(name: str) -> None:
    for rank, expected in (("0", 1), ("1", 0)):
        with start(DEFAULTS + WAITING, RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost") as process:
            process.send_signal(getattr(signal, name))
            assert process.stdout is not None
            assert process.stdout.readline() == f"{name}\n"
            process.send_signal(getattr(signal, name))  # again at once, as launchers do: nothing happens
            time.sleep(0.1)
            assert process.poll() is None
            process.kill()
            assert process.stderr is not None
            assert process.stderr.read().count("ending before training") == expected


def test_only_a_later_second_ctrl_c_ends_at_once() -> None:
    with start(DEFAULTS + WAITING) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        time.sleep(signals.FORCE_AFTER_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=15) == signals.EXIT_FORCED


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_that_is_ignored_stays_ignored(name: str) -> None:
    program = f"import signal; signal.signal(signal.{name}, signal.SIG_IGN)\n" + WAITING
    with start(program) as process:
        process.send_signal(getattr(signal, name))
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == "SIGTERM\n"
        process.kill()


LOADING = """
import os, sys, time
from mnist.system import signals
signals.START_GRACE_S = 1.0
signals.install()
import torch
from torch.utils.data import DataLoader
for _ in range(2):  # the workers of the first loader end, which is a SIGCHLD each
    loader = DataLoader(torch.arange(64), batch_size=8, num_workers=2)
    assert sum(int(batch.sum()) for batch in loader) == 64 * 63 // 2
workers = iter(DataLoader(torch.arange(64), batch_size=1, num_workers=2, persistent_workers=True))
next(workers)
for worker in workers._workers:
    for number in (signals.signal.SIGINT, signals.signal.SIGHUP):  # what a terminal sends to all
        os.kill(worker.pid, number)
time.sleep(3 * signals.START_GRACE_S)
assert all(worker.is_alive() for worker in workers._workers)
try:
    os.kill(workers._workers[0].pid, signals.signal.SIGUSR1)
    workers._workers[0].join(20)
    time.sleep(1)
except RuntimeError as error:  # torch's own handler for workers that die
    assert "killed by signal" in str(error)
print("ready", signals.stop_requested(), workers._workers[0].is_alive(), flush=True)
os._exit(0)
"""


def test_workers_of_a_data_loader_that_end_or_get_signals_do_not_end_the_run() -> None:
    command = [sys.executable, "-c", DEFAULTS + LOADING]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, done.returncode) == ("ready False False\n", 0), done.stderr
    assert "ending" not in done.stderr


def stop_for(process: subprocess.Popen[str], seconds: float) -> None:
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)


def test_time_in_which_the_process_was_stopped_is_no_part_of_the_grace() -> None:
    with start(DEFAULTS + STUCK.format(grace_s=6, is_training=True)) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert [process.stderr.readline() for _ in range(2)][1].startswith("SIGTERM: saving")
        stop_for(process, 8)
        time.sleep(2)  # a second is enough for a thread that waits to look at the clock
        assert process.poll() is None
        assert process.wait(timeout=25) == 1


def test_without_room_for_a_thread_signals_are_noted_and_nothing_is_watched() -> None:
    refuse = """
import threading
def start(thread):
    raise RuntimeError("can't start new thread")
threading.Thread.start = start
"""
    with start(DEFAULTS + refuse + WAITING.replace("signals.install()", "signals.install()" + SHORT_WATCH)) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == "SIGTERM\n"
        process.kill()
        assert process.stderr is not None
        assert process.stderr.read().count("ending before training") == 1


SHORT_WATCH = """
from mnist.system.watchdog import Watchdog
Watchdog(0.1).heartbeat()
"""


def test_a_rank_gets_sigterm_when_its_launcher_dies() -> None:
    parent = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {WAITING!r}], stdout=sys.stdout)
print(child.pid, file=sys.stderr, flush=True)
time.sleep(30)
"""
    with start(parent, TORCHELASTIC_RUN_ID="x") as process:  # "ready" comes from the child
        assert process.stdout is not None
        assert process.stderr is not None
        child = int(process.stderr.readline())
        process.kill()
        assert process.stdout.readline() == "SIGTERM\n"
        os.kill(child, signal.SIGKILL)


STUCK = """
import ctypes
from mnist.system import signals
signals.START_GRACE_S = signals.GRACE_S = {grace_s}
signals.install()
if {is_training}:
    signals.training_begins()
print("ready", flush=True)
for _ in range(3):  # a signal ends a sleep
    ctypes.CDLL(None).sleep(30)  # no Python runs in here, as in a collective whose other ranks are gone
"""


def test_a_process_that_is_stuck_ends_also_where_nobody_reads_where() -> None:
    program = "import os; os.close(2)\n" + DEFAULTS + STUCK.format(grace_s=0.5, is_training=True)
    with start(program) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=25) == 1


@pytest.mark.parametrize(("is_training", "code"), [(False, signals.EXIT_PREEMPTED), (True, 1)])
def test_a_stuck_process_ends_in_one_line_before_training_and_shows_its_stacks_later(
    is_training: bool, code: int
) -> None:
    with start(DEFAULTS + STUCK.format(grace_s=0.5, is_training=is_training)) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=25) == code
        assert process.stderr is not None
        error = process.stderr.read()
        assert ("this process was here" in error) == is_training
        assert is_training or error == "\nSIGTERM: ending before training, nothing is lost\n"


def test_a_later_second_ctrl_c_is_heard_in_c_too() -> None:
    with start(DEFAULTS + STUCK.format(grace_s=20, is_training=True)) as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert [process.stderr.readline() for _ in range(2)] == ["\n", "SIGINT: saving and ending at the next step\n"]
        time.sleep(signals.FORCE_AFTER_S + 0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=15) == signals.EXIT_FORCED
        assert process.stderr.read() == "ended without saving\n"
