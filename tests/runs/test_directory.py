from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import time
from pathlib import Path

import pytest

from mnist.config import RuntimeConfig, TrainConfig, evolve
from mnist.errors import UserError
from mnist.recipes import fast
from mnist.runs import directory
from mnist.runs.directory import RunDirectory, open_run_directory
from mnist.system import accelerator as accelerator_module
from mnist.system.accelerator import build_accelerator
from tests.ranks import run_ranks
from tests.runs.test_run import SMALL, run


def open_here(config: TrainConfig) -> RunDirectory:
    return open_run_directory(config, "mnist", build_accelerator(RuntimeConfig(cpu=True, num_threads=1)))


def config_in(folder: Path) -> TrainConfig:
    return evolve(TrainConfig(), run_dir=str(folder))


FACTS = {"recipe": "fast", "dataset": "mnist", "seed": 0, "num_params": 1, "world_size": 1, "precision": "fp32"} | {
    "host": "here",
    "pid": 77,
    "origin": None,
}


def test_a_directory_is_made_and_its_result_is_read_by_the_next_start(tmp_path: Path) -> None:
    first = open_here(config_in(tmp_path / "a" / "b"))
    assert (first.config, first.result) == (None, None)
    first.write_result("running", **FACTS)
    assert sorted(path.name for path in first.path.iterdir()) == [".lock", "result.json"]
    first.lock.release()  # type: ignore[union-attr]
    found = open_here(config_in(tmp_path / "a" / "b")).result
    assert found is not None
    assert (found.status, found.recipe, found.pid) == ("running", "fast", 77)


def test_result_json_is_written_after_the_records_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_here(config_in(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "fsync", lambda file: seen.append((os.fstat(file).st_ino, result.exists())))
    result = tmp_path / "result.json"
    run.write_result("running", **FACTS)
    assert seen[0] == ((tmp_path / "metrics.jsonl").stat().st_ino, False)
    assert result.exists()


def test_two_runs_cannot_share_a_directory_and_the_second_learns_who_is_there(tmp_path: Path) -> None:
    first = open_here(config_in(tmp_path))
    with pytest.raises(UserError, match="in use by another process; choose another directory"):
        open_here(config_in(tmp_path))
    first.write_result("running", **FACTS)
    with pytest.raises(UserError, match="in use by pid 77 on here"):
        open_here(config_in(tmp_path))
    first.lock.release()  # type: ignore[union-attr]
    assert open_here(config_in(tmp_path)).path == tmp_path


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run: not writable"):
        open_here(config_in(tmp_path / "file" / "run"))


def test_a_symbolic_link_in_the_place_of_the_lock_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".lock").symlink_to("notes.txt")
    with pytest.raises(UserError, match=r"\.lock: a symbolic link to notes.txt"):
        open_here(config_in(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    assert open_here(config_in(tmp_path / "a")).lock is not None
    monkeypatch.setattr(fcntl, "flock", flock)
    assert open_here(config_in(tmp_path / "b")).lock is None


def test_a_run_without_a_lock_warns_that_no_second_one_may_be_started_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    short = [*SMALL, "--max-steps", "2", "--min-accuracy", "None"]
    assert run_ranks(run, 1, tmp_path / "locked", *short) == [0]
    assert "no locks" not in capfd.readouterr().err
    monkeypatch.setattr(directory, "_lock", lambda path: path.mkdir())
    assert run_ranks(run, 1, tmp_path / "free", *short) == [0]
    line = f"--run-dir {tmp_path / 'free'}: no locks on this file system; start no second run there"
    assert line in capfd.readouterr().err


def test_runs_that_start_at_the_same_time_get_a_directory_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def open_several() -> list[str]:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # not ranks of one job, but jobs
            del os.environ[name]
        time.sleep(1 - time.time() % 1)  # all at the beginning of a second
        return [str(open_here(TrainConfig()).path) for _ in range(20)]

    paths = [path for of_rank in run_ranks(open_several, 3) for path in of_rank]
    assert len(set(paths)) == 60


def test_ranks_share_the_directory_that_rank_0_has_made_and_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def open_one() -> tuple[str, bool]:
        found = open_here(TrainConfig())
        return str(found.path), found.lock is not None

    (first, held), (second, held_too) = run_ranks(open_one, 2)
    assert first == second
    assert (held, held_too) == (True, False)


def test_a_restarted_job_finds_its_own_directory_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    first = open_here(TrainConfig())
    first.write_result("running", **FACTS)
    first.lock.release()  # type: ignore[union-attr]
    (Path("runs") / "broken").mkdir()
    (Path("runs") / "broken" / "result.json").write_text("[" * 100_000)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = open_here(TrainConfig())
    assert again.path == first.path
    assert again.belongs_to_this_job
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert open_here(TrainConfig()).path != first.path


def test_a_launchers_restart_is_the_same_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks are children of the same process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    def attempt(number: str) -> str:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", number)
        directory = open_here(TrainConfig())
        directory.write_result("running", **FACTS)
        return str(directory.path)

    assert run_ranks(attempt, 1, "0") == run_ranks(attempt, 1, "1")


def test_another_runs_damage_does_not_stop_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs", "fifo").mkdir(parents=True)
    os.mkfifo(Path("runs", "fifo", "result.json"))
    Path("runs", "other").mkdir()
    Path("runs", "other", "config.json").write_text(json.dumps([1]))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert open_here(fast()).path.name.startswith("fast-mnist-")


def test_a_disk_without_room_for_a_line_is_named_by_its_flag(tmp_path: Path) -> None:
    def open_on_a_full_disk() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        directory = open_here(config_in(tmp_path))
        try:
            directory.write_result("running", **FACTS)
        except OSError as error:
            return str(error.filename)
        return "written"

    assert run_ranks(open_on_a_full_disk, 1) == [str(tmp_path / ".tmp-result.json")]


def test_all_ranks_agree_on_a_restart_where_each_machine_has_a_launcher_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is named by the launcher's process: another one on another machine."""
    monkeypatch.setattr(directory, "job_id", lambda: f"machine-{os.environ.get('RANK')}")

    def attempt(number: str) -> bool:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", number)
        found = open_here(config_in(tmp_path))
        if found.lock is not None:
            found.write_result("running", **FACTS)
        return found.belongs_to_this_job

    monkeypatch.setattr(accelerator_module, "_restart_with_fresh_keys", lambda *_: None)
    assert run_ranks(attempt, 2, "0") == [False, False]
    assert run_ranks(attempt, 2, "1") == [True, True]
