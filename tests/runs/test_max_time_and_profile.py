"""--max-time and --profile: whole runs."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest

from tests.processes import finish, train
from tests.ranks import run_ranks
from tests.runs.test_run import SMALL, metrics, result, run, run_and_signal, weights

LONG = [*SMALL, "--max-steps", "400", "--inject", "slow@rank0:0.02"]  # at least 8 s


@pytest.mark.parametrize("world_size", [1, 2])
def test_max_time_ends_a_run_like_a_signal_and_the_same_command_continues_it(tmp_path: Path, world_size: int) -> None:
    arguments = [*LONG, "--max-time", "0.05"]
    assert run_ranks(run, world_size, tmp_path / "b", *arguments) == [75] * world_size
    found = result(tmp_path / "b")
    assert (found["status"], found["signal"], found["reason"]) == ("preempted", None, "--max-time 0.05")
    assert 0 < found["steps"] < 400
    assert (tmp_path / "b" / "checkpoints" / f"step-{found['steps']:08d}").is_dir()
    assert run_ranks(run, world_size, tmp_path / "b", *LONG) == [0] * world_size
    assert run_ranks(run, world_size, tmp_path / "a", *LONG[:-2]) == [0] * world_size
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


@pytest.mark.launch
def test_max_time_counts_from_the_start_of_the_command_and_prints_how_to_continue(tmp_path: Path) -> None:
    done = finish(train(*SMALL, "--max-time", "0.0001", "--run-dir", "run"), tmp_path)
    assert done.code == 75
    assert result(tmp_path / "run")["steps"] == 1
    assert re.search(r"preempted +after step 1 \(--max-time 0.0001\)", done.out)
    assert re.search(r"continue +python train_ddp.py --resume run\n", done.out)


def test_the_times_of_a_run_count_from_its_own_start_not_from_that_of_the_process(tmp_path: Path) -> None:
    def timed() -> tuple[int, float]:
        started = time.perf_counter()
        code = run(tmp_path, *SMALL, "--max-steps", "23", "--min-accuracy", "None", "--max-time", "60")
        return code, time.perf_counter() - started

    ((code, elapsed_s),) = run_ranks(timed, 1)  # in a fork of this process, which has imported train_ddp long ago
    assert code == 0
    assert result(tmp_path)["total_time_s"] <= elapsed_s + 0.01


@pytest.mark.parametrize("world_size", [1, 2])
def test_profile_writes_a_trace_of_so_many_steps_on_each_rank_and_changes_no_weight(
    tmp_path: Path, world_size: int
) -> None:
    arguments = [*SMALL, "--max-steps", "23", "--min-accuracy", "None"]
    assert run_ranks(run, world_size, tmp_path / "a", *arguments, "--profile", "3") == [0] * world_size
    traces = sorted((tmp_path / "a" / "profile").iterdir())
    assert [path.name for path in traces] == [f"profile_{rank}.json" for rank in range(world_size)]
    for path in traces:
        names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
        assert sum("Optimizer.step#Adam" in str(name) for name in names) == 3
    assert run_ranks(run, world_size, tmp_path / "b", *arguments) == [0] * world_size
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_run_that_is_shorter_than_its_profile_finishes(tmp_path: Path) -> None:
    assert run_ranks(run, 1, tmp_path, *SMALL, "--max-steps", "4", "--min-accuracy", "None", "--profile", "50") == [0]
    assert (tmp_path / "profile" / "profile_0.json").is_file()


def test_a_start_of_two_steps_says_that_there_is_no_trace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(run, 1, tmp_path, *SMALL, "--max-steps", "2", "--min-accuracy", "None", "--profile", "5") == [0]
    assert "--profile 5: no trace" in capfd.readouterr().err
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_while_steps_are_profiled_saves_as_always(tmp_path: Path, world_size: int) -> None:
    arguments = [*SMALL, "--min-accuracy", "None", "--profile", "40"]
    codes = run_ranks(run_and_signal, world_size, signal.SIGTERM, 10, 0, tmp_path, *arguments)
    assert codes == [75] * world_size
    assert result(tmp_path)["status"] == "preempted"
    assert run_ranks(run, world_size, tmp_path, *SMALL) == [0] * world_size
