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
# A test runner in the background has SIGINT ignored, and its children inherit that.
DEFAULTS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_noted_and_named_once_by_rank_0(name: str) -> None:
    for rank, expected in (("0", 1), ("1", 0)):
        with start(DEFAULTS + WAITING, RANK=rank) as process:
            process.send_signal(getattr(signal, name))
            assert process.stdout is not None
            assert process.stdout.readline() == f"{name}\n"
            process.send_signal(getattr(signal, name))  # again at once, as launchers do: nothing happens
            time.sleep(0.1)
            assert process.poll() is None
            process.kill()
            assert process.stderr is not None
            assert process.stderr.read().count("saving and ending") == expected


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


def test_what_was_ignored_stays_ignored() -> None:
    program = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + WAITING
    with start(program) as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == "SIGTERM\n"
        process.kill()


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
def test_a_process_that_is_stuck_in_c_ends_after_a_while(is_training: bool, code: int) -> None:
    with start(DEFAULTS + STUCK.format(grace_s=0.5, is_training=is_training)) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=25) == code
        assert process.stderr is not None
        assert "this process was here" in process.stderr.read()


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
