"""The watchdog ends the process that it watches: each test looks at a fork."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mnist.system import process, watchdog
from mnist.system.process import TICK_S, RunningClock
from mnist.system.watchdog import Watchdog, ended_after


def exit_code_and_errors(work: Callable[[], None], folder: Path) -> tuple[int, str]:
    """Of a fork that does `work` and then ends with 0."""
    errors = folder / "errors"
    child = os.fork()
    if child == 0:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        watchdog.LINGER_S = 0.0
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), errors.read_text()


def hang() -> None:
    """In C, where signals wait."""
    ctypes.CDLL(None).sleep(60)


def test_a_process_without_progress_ends_with_its_reason_and_its_stacks(tmp_path: Path) -> None:
    def watch_and_hang() -> None:
        Watchdog(2, at_stall=(tmp_path / "reason").write_text).heartbeat()
        hang()

    code, errors = exit_code_and_errors(watch_and_hang, tmp_path)
    assert (code, (tmp_path / "reason").read_text()) == (1, "no progress for 2 s")
    assert "in hang" in errors


def test_a_reason_found_at_a_tick_ends_a_process_that_does_progress(tmp_path: Path) -> None:
    def watch_and_wait() -> None:
        Watchdog(600, lambda _: "rank 1 is gone", (tmp_path / "reason").write_text).heartbeat()
        hang()

    assert exit_code_and_errors(watch_and_wait, tmp_path)[0] == 1
    assert (tmp_path / "reason").read_text() == "rank 1 is gone"


@pytest.mark.parametrize("report", [lambda _: time.sleep(60), lambda _: 1 / 0], ids=["hangs", "fails"])
def test_a_stall_ends_the_process_also_where_its_report_hangs_or_fails(
    tmp_path: Path, report: Callable[[str], None]
) -> None:
    def watch_and_hang() -> None:
        watchdog.END_S = 1.0
        Watchdog(0.5, at_stall=report).heartbeat()
        hang()

    code, errors = exit_code_and_errors(watch_and_hang, tmp_path)
    assert code == 1
    assert "in hang" in errors


def test_ranks_that_can_no_longer_be_asked_do_not_end_the_watch(tmp_path: Path) -> None:
    def ask(_: float) -> None:
        raise RuntimeError("Connection closed")

    def watch_and_hang() -> None:
        Watchdog(0.5, ask).heartbeat()
        hang()

    assert exit_code_and_errors(watch_and_hang, tmp_path)[0] == 1


def test_heartbeats_keep_a_process_alive_and_stop_ends_the_watch(tmp_path: Path) -> None:
    def work_and_stop() -> None:
        watched = Watchdog(1.5)
        for _ in range(25):
            time.sleep(0.1)
            watched.heartbeat()
        watched.stop()
        time.sleep(2.5)

    assert exit_code_and_errors(work_and_stop, tmp_path) == (0, "")


@pytest.mark.parametrize(("seconds", "code"), [(0.3, 1), (600, 0)])
def test_a_block_that_takes_longer_than_it_may_ends_the_process(tmp_path: Path, seconds: float, code: int) -> None:
    def work() -> None:
        with ended_after(seconds):
            time.sleep(2)

    assert exit_code_and_errors(work, tmp_path)[0] == code


def test_time_in_which_a_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(process.time, "monotonic", lambda: now)
    clock = RunningClock()
    for now in (1.0, 2.0, 3_602.0):  # noqa: B007 - the lambda reads it
        read = clock.read()
    assert read == 2.0 + 2 * TICK_S
