from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import time
from pathlib import Path

import pytest

from mnist.config import TrainConfig, evolve, to_flat
from mnist.errors import UserError
from mnist.runs.directory import open_run_dir
from tests.ranks import run_ranks


def config_in(folder: Path) -> TrainConfig:
    return evolve(TrainConfig(), run_dir=str(folder))


def test_a_directory_is_made_and_remembers_its_result(tmp_path: Path) -> None:
    run = open_run_dir(config_in(tmp_path / "a" / "b"), "mnist")
    assert run.read("result.json") == {}
    run.write_result("running", steps=3)
    assert run.read("result.json") == {"status": "running", "steps": 3}
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "result.json"]


def test_two_runs_cannot_share_a_directory_and_the_second_learns_who_is_there(tmp_path: Path) -> None:
    first = open_run_dir(config_in(tmp_path), "mnist")
    with pytest.raises(UserError, match=f"in use by pid {os.getpid()} on "):
        open_run_dir(config_in(tmp_path), "mnist")
    assert first._lock is not None
    first._lock.close()  # as the kernel does when a process ends
    assert open_run_dir(config_in(tmp_path), "mnist").path == tmp_path


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run: not writable"):
        open_run_dir(config_in(tmp_path / "file" / "run"), "mnist")


def test_a_disk_without_room_for_a_line_is_named_by_its_flag(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(UserError, match=f"--run-dir {tmp_path}: not writable"):
            open_run_dir(config_in(tmp_path), "mnist")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def leave_run(name: str, status: str, config: TrainConfig) -> Path:
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"status": status}))
    (folder / "config.json").write_text(json.dumps(to_flat(config)))
    return folder


@pytest.mark.parametrize(
    ("status", "changes", "is_continued"),
    [
        ("running", {}, True),
        ("preempted", {"quiet": True, "num_threads": 3, "data_dir": "elsewhere"}, True),
        ("preempted", {"lr": 0.5}, False),
        ("finished", {}, False),
        ("failed", {}, False),
        ("diverged", {}, False),
    ],
)
def test_the_same_command_continues_an_unfinished_run_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, changes: dict[str, object], is_continued: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    left = leave_run("old", status, evolve(TrainConfig(), **changes))
    assert (open_run_dir(TrainConfig(), "mnist").path == left) is is_continued


def test_a_run_that_is_being_written_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    leave_run("old", "running", TrainConfig())
    first = open_run_dir(TrainConfig(), "mnist")
    second = open_run_dir(TrainConfig(), "mnist")
    assert first.path == Path("runs/old")
    assert second.path.name.startswith("fast-mnist-")


def test_a_restarted_job_continues_whatever_its_command_line_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    anew = evolve(TrainConfig(), resume="never")
    left = leave_run("old", "preempted", anew)
    assert open_run_dir(anew, "mnist").path != left
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert open_run_dir(anew, "mnist").path == left


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    assert open_run_dir(config_in(tmp_path / "a"), "mnist").is_locked
    monkeypatch.setattr(fcntl, "flock", flock)
    assert not open_run_dir(config_in(tmp_path / "b"), "mnist").is_locked


def test_runs_that_start_at_the_same_time_get_a_directory_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def open_several() -> list[str]:
        time.sleep(1 - time.time() % 1)  # all at the beginning of a second
        return [str(open_run_dir(TrainConfig(), "mnist").path) for _ in range(20)]

    paths = [path for of_rank in run_ranks(open_several, 3) for path in of_rank]
    assert len(set(paths)) == 60


def test_two_new_runs_in_one_second_get_two_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [open_run_dir(TrainConfig(), "mnist") for _ in range(3)]
    assert len({run.path for run in runs}) == 3


def test_starting_over_keeps_what_was_there(tmp_path: Path) -> None:
    run = open_run_dir(config_in(tmp_path), "mnist")
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("mine")
    run.set_aside()
    (before,) = tmp_path.glob("before-*")
    assert sorted(path.name for path in before.iterdir()) == ["checkpoints", "metrics.jsonl"]
    assert (tmp_path / "notes.txt").exists()
    run.set_aside()
    assert len(list(tmp_path.glob("before-*"))) == 1
