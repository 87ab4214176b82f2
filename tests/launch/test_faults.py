"""What machines do to runs: real processes, real signals, real limits. The map is docs/reliability.md."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import train_ddp
from mnist.cli import parse_command_line
from mnist.config import Fault, TrainConfig, evolve, parse_fault
from mnist.errors import UserError
from mnist.runs import checkpoint_files, checkpointing
from mnist.runs.checkpointing import Checkpointing
from mnist.runs.run import Run
from mnist.runs.validation import Validation
from mnist.system import signals
from mnist.system.fault_injection import inject
from mnist.system.files import remove_leftovers
from mnist.training.plan import build_plan
from tests.launch.test_launch import LONG, has_records, wait_until
from tests.processes import CONFIGURED, PYTHON, ROOT, TORCHRUN, Finished, finish, started, train
from tests.ranks import run_ranks
from tests.runs.test_checkpoint_files import make_checkpoint
from tests.runs.test_run import SMALL, metrics, result, run, run_and_signal, weights

TWO = [*TORCHRUN, "--nproc-per-node", "2"]
ONE_THREAD = ["--num-threads", "1"]


# --- a process that dies while it saves ------------------------------------------------------------------------------


def save_and_die_at(folder: Path, event_number: int) -> bool:
    """Saves step 2 in a child that ends at its n-th file operation; whether it got that far."""
    child = os.fork()
    if child == 0:
        count = 0

        def die(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir"):
                count += 1
                if count == event_number:
                    os._exit(9)

        sys.addaudithook(die)
        try:
            checkpoint_files.save_checkpoint(folder, make_checkpoint(2), 1, 0)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 9


def test_a_process_killed_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    outcomes = []
    for event_number in range(1, 200):
        folder = tmp_path / str(event_number)
        checkpoint_files.save_checkpoint(folder, make_checkpoint(1), 1, 0)
        died = save_and_die_at(folder, event_number)
        found, skipped = checkpoint_files.load_newest(folder)
        assert found is not None
        assert not skipped
        outcomes.append(found.step)
        remove_leftovers(folder)
        assert {path.name for path in folder.iterdir()} <= {"step-00000001", "step-00000002"}
        checkpoint_files.save_checkpoint(folder, make_checkpoint(3), 1, 0)
        assert sorted(checkpoint_files.list_steps(folder)) == [3], "whatever was left does not disturb the next save"
        if not died:
            break
    assert len(outcomes) > 10
    assert outcomes == sorted(outcomes), "the new checkpoint appears at one point, and stays"
    assert set(outcomes) == {1, 2}


class Payload:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_a_pickle_in_a_checkpoint_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = checkpoint_files.save_checkpoint(tmp_path, make_checkpoint(1), 1, 0)
    content = pickle.dumps(Payload())
    (path / name).write_bytes(content)
    if name != "manifest.json":  # an attacker would mend the manifest too
        manifest = json.loads((path / "manifest.json").read_text())
        manifest |= {"tensors": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
        manifest["sha256"] = checkpoint_files._digest(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint_files.CheckpointError):
        checkpoint_files.load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


# --- signals at awkward moments --------------------------------------------------------------------------------------


def signal_when(moment: str, folder: Path, *arguments: str) -> int:
    """A run that sends itself SIGTERM just before the named step of its life."""
    signals.install()
    sent = False

    def before(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **options: Any) -> Any:
            nonlocal sent
            if not sent:
                sent = True
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # signals arrive twice
            return original(*args, **options)

        setattr(owner, name, wrapper)

    before(*{
        "start": (Run, "warm_up"),
        "evaluation": (Validation, "_evaluate"),
        "save": (checkpointing, "save_checkpoint"),
        "end": (Run, "finish"),
    }[moment])  # fmt: skip
    return run(folder, *arguments)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("moment", "status"),
    [("start", "preempted"), ("evaluation", "preempted"), ("save", "preempted"), ("end", "finished")],
)
def test_a_signal_at_any_moment_is_safe(tmp_path: Path, moment: str, status: str, world_size: int) -> None:
    codes = run_ranks(signal_when, world_size, moment, tmp_path / "b", *SMALL)
    assert codes == [75 if status == "preempted" else 0] * world_size
    assert result(tmp_path / "b")["status"] == status
    assert run_ranks(run, world_size, tmp_path / "b", *SMALL) == [0] * world_size
    run_ranks(run, world_size, tmp_path / "a", *SMALL)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


@pytest.mark.parametrize(
    ("number", "to_rank"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGXCPU, 0)]
)
def test_a_signal_to_one_rank_ends_both_after_one_checkpoint(tmp_path: Path, number: int, to_rank: int) -> None:
    assert run_ranks(run_and_signal, 2, number, 30, to_rank, tmp_path, *SMALL) == [75, 75]
    found = result(tmp_path)
    assert (found["status"], found["signal"]) == ("preempted", signal.Signals(number).name if to_rank == 0 else None)
    newest = max((tmp_path / "checkpoints").iterdir()).name
    assert newest == f"step-{found['steps']:08d}"


@pytest.mark.launch
def test_a_second_ctrl_c_ends_a_run_that_does_not_listen(tmp_path: Path) -> None:
    command = train("--recipe", "smoke", "--run-dir", "run", "--inject", "hang@30")
    with started(command, tmp_path) as process:
        wait_until((tmp_path / "run" / "metrics.jsonl").exists)
        time.sleep(1)
        os.kill(process.pid, signal.SIGINT)
        time.sleep(signals.FORCE_AFTER_S + 0.2)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 130


# --- ranks that fail -------------------------------------------------------------------------------------------------


def pid_of_rank(folder: Path, rank: int) -> int:
    return int(json.loads((folder / "environment.json").read_text())["ranks"][rank]["pid"])


def drill(tmp_path: Path, fault: str, *launcher: str, arguments: tuple[str, ...] = ()) -> Finished:
    command = train(*SMALL, *arguments, "--run-dir", "run", "--inject", fault, launcher=launcher or TWO)
    return finish(command, tmp_path)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("kill@rank1:33", ["rank 0 after step", "lost another rank", "SIGKILL"]),
        ("raise@rank1:33", ["on rank 1 after step 32", "--inject asked for this"]),
        ("exit@rank1:33", ["rank 0 after step", "lost another rank"]),
    ],
)
def test_a_rank_that_fails_ends_the_job_in_seconds_and_the_next_start_goes_on(
    tmp_path: Path, fault: str, words: list[str]
) -> None:
    done = drill(tmp_path, fault)
    assert done.code != 0
    assert all(word in done.err for word in words), done.err
    assert result(tmp_path / "run")["status"] == "failed"
    for folder in ("run", "a"):
        assert run_ranks(run, 2, tmp_path / folder, *SMALL) == [0, 0]
    assert weights(tmp_path / "a") == weights(tmp_path / "run")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "run")


@pytest.mark.launch
@pytest.mark.parametrize(
    "launcher",
    [[*TWO, "--max-restarts", "1"], [*CONFIGURED, "--num_processes", "2", "--max_restarts", "1"]],
    ids=["torchrun", "accelerate"],
)
def test_a_launcher_that_restarts_goes_on_by_itself(tmp_path: Path, launcher: list[str]) -> None:
    done = drill(tmp_path, "kill@rank1:33", *launcher)
    assert done.code == 0, done.err
    assert "resuming run at step 23" in done.out
    run_ranks(run, 2, tmp_path / "a", *SMALL)
    assert weights(tmp_path / "a") == weights(tmp_path / "run")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "run")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named_shows_where_and_the_run_has_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], rank: int
) -> None:
    with pytest.raises(RuntimeError, match="a rank died"):
        run_ranks(run, 2, tmp_path, *SMALL, "--timeout-s", "6", "--inject", f"hang@rank{rank}:33")
    line = f"rank {rank} on {socket.gethostname()} after step 32 hangs: no progress for 6 s, and the other ranks wait"
    error = capfd.readouterr().err
    assert error.count(f"error: {line}") == 1, error
    assert "fault_injection.py" in error, "the stack of the rank that hangs"
    assert "_cause" in error
    found = result(tmp_path)
    assert (found["status"], found["reason"][: len(line)]) == ("failed", line)


@pytest.mark.launch
def test_a_single_process_that_hangs_has_failed(tmp_path: Path) -> None:
    done = finish(train(*SMALL, "--run-dir", "run", "--inject", "hang@33", "--timeout-s", "6"), tmp_path)
    assert done.code == 1
    assert "error: no progress for 6 s after step 32" in done.err
    assert result(tmp_path / "run")["status"] == "failed"


@pytest.mark.launch
@pytest.mark.parametrize("by", ["time-out", "signal"])
def test_a_rank_that_does_not_answer_is_named_and_the_run_has_failed(tmp_path: Path, by: str) -> None:
    timeout = ["--timeout-s", "6" if by == "time-out" else "600"]
    with started(train(*LONG, *timeout, "--run-dir", "run", launcher=TWO), tmp_path) as process:
        wait_until(lambda: has_records(tmp_path / "run"))
        os.kill(pid_of_rank(tmp_path / "run", 1), signal.SIGSTOP)
        if by == "signal":
            os.kill(pid_of_rank(tmp_path / "run", 0), signal.SIGTERM)
        wait_until(lambda: result(tmp_path / "run")["status"] != "running", timeout=60)
        found = result(tmp_path / "run")
        os.kill(pid_of_rank(tmp_path / "run", 1), signal.SIGKILL)
        process.wait(timeout=60)
        assert process.stderr is not None
        error = process.stderr.read()
    assert found["status"] == "failed"
    assert re.match(r"rank 1 on \S+ after step \d+ no longer answers \(no progress", found["reason"])
    assert "was not obeyed in time" not in error


def standing_in(change: str, *arguments: str, launcher: Sequence[str]) -> list[str]:
    """The command line of a run in which `change` has been made to `mnist.system.accelerator`."""
    program = f"import runpy, time\nfrom mnist.system import accelerator\n{change}\n"
    program += f"runpy.run_path({str(ROOT / 'train_ddp.py')!r}, run_name='__main__')\n"
    return [*launcher, *(["--no-python"] if launcher is TWO else []), *PYTHON, "-c", program, *arguments]


@pytest.mark.launch
def test_an_error_is_printed_and_ends_the_run_where_the_end_of_nccl_would_block_for_ever(tmp_path: Path) -> None:
    change = "accelerator._backend = lambda: 'nccl'\n"
    change += "accelerator.torch.distributed.destroy_process_group = lambda: time.sleep(10_000)"
    arguments = [*SMALL, "--run-dir", "run", "--inject", "raise@rank1:33"]
    done = finish(standing_in(change, *arguments, launcher=TWO), tmp_path)
    assert done.code != 0
    assert "RuntimeError: --inject asked for this" in done.err
    assert "on rank 1 after step 32" in done.err
    assert "rank 0 after step" in done.err
    assert "was not obeyed in time" not in done.err
    assert result(tmp_path / "run")["status"] == "failed"


@pytest.mark.launch
def test_a_finished_run_whose_process_group_does_not_close_ends_with_its_stacks(tmp_path: Path) -> None:
    change = "accelerator.torch.distributed.destroy_process_group = lambda: time.sleep(10_000)\n"
    change += "accelerator.CLOSE_S = 3"
    done = finish(standing_in(change, *SMALL, "--run-dir", "run", launcher=TWO), tmp_path)
    assert "in _close" in done.err
    assert result(tmp_path / "run")["status"] == "finished"


@pytest.mark.launch
def test_a_busy_port_does_not_matter(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # somebody else has it: as good
            taken.bind(("127.0.0.1", 29500))
            taken.listen()
        done = finish(train(*SMALL, "--run-dir", "run", launcher=[*CONFIGURED, "--num_processes", "2"]), tmp_path)
    assert done.code == 0, done.err
    assert result(tmp_path / "run")["world_size"] == 2


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("nan@30", Fault("nan", 0, step=30)),
        ("kill@rank1:50", Fault("kill", 1, step=50)),
        ("slow@rank12:0.05", Fault("slow", 12, seconds=0.05)),
        ("slow@2", Fault("slow", 0, seconds=2.0)),
    ],
)
def test_a_drill_in_words(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault
    assert evolve(TrainConfig(), inject=(text,)).output.inject == (text,)


@pytest.mark.parametrize("text", ["", "nan", "nan@0", "nan@1.5", "kill@1:50", "burn@3", "slow@rank1", "kill@rank1:"])
def test_a_drill_that_makes_no_sense_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"--inject .*: give KIND@STEP") as caught:
        evolve(TrainConfig(), inject=("nan@30", text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["kill@rank2:5", "kill@rank1:201", "slow@rank2:1"])
def test_a_drill_that_would_never_happen_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--inject {text}: would never happen in 200 steps of ranks 0 to 1"):
        build_plan(evolve(TrainConfig(), max_steps=200, inject=(text,)), 60_000, 2)


def test_a_slow_rank_loses_its_time_before_every_step_and_the_others_none(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for rank in (0, 1):
        assert list(inject(iter([1, 2, 3]), ["slow@rank1:0.05"], rank, 0, [])) == [1, 2, 3]
    assert slept == [0.05] * 3


def test_a_drilled_nan_is_found_where_it_was_put_and_the_next_start_is_spared(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fault = ["--inject", "nan@rank1:30"]
    assert run_ranks(run, 2, tmp_path, *SMALL, *fault) == [1, 1]
    error = capfd.readouterr().err
    assert "DRILL: --inject nan@rank1:30: this run is made to fail" in error
    assert "nan or inf at step 30 on rank 1" in error
    assert result(tmp_path)["status"] == "diverged"
    checkpoint_23 = str(tmp_path / "checkpoints" / "step-00000023")
    assert run_ranks(run, 2, tmp_path / "branch", *SMALL, *fault, "--resume", checkpoint_23) == [0, 0]
    assert "not repeated, because this run was resumed" in capfd.readouterr().err


# --- disks -----------------------------------------------------------------------------------------------------------


def run_with_small_files(limit: int, folder: Path, *arguments: str) -> int:
    """A run in which no file may grow beyond `limit` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return run(folder, *arguments)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("limit", [20_000, 80_000], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_the_old_checkpoint_and_says_where(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], limit: int, world_size: int
) -> None:
    constant = [*SMALL, "--schedule", "constant"]
    assert run_ranks(run, 1, tmp_path, *constant, "--max-steps", "23") == [0]
    capfd.readouterr()
    assert run_ranks(run_with_small_files, world_size, limit, tmp_path, *constant) == [1] * world_size
    error = capfd.readouterr().err
    assert f"{tmp_path}/checkpoints/step-00000046: not written" in error
    assert error.count("error:") == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000023"]
    assert result(tmp_path)["status"] == "failed"
    assert run_ranks(run, 1, tmp_path, *constant) == [0], "and once there is room the run goes on"


def test_metrics_that_cannot_be_written_end_the_run_with_their_path(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rare = ["--checkpoint-every", "5000", "--eval-every", "5000"]
    arguments = [*SMALL, "--max-steps", "2300", "--log-every", "1", *rare]
    assert run_ranks(run_with_small_files, 1, 8_000, tmp_path, *arguments) == [1]
    assert f"{tmp_path}/metrics.jsonl: not written" in capfd.readouterr().err


@pytest.mark.parametrize("goes", ["removed", "moved", "one file"])
def test_a_directory_that_goes_in_mid_run_is_noticed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], goes: str
) -> None:
    folder = tmp_path / "run"

    def lose() -> int:
        original = Checkpointing.save

        def save(self: Checkpointing) -> None:
            original(self)
            if goes == "removed":
                shutil.rmtree(folder)
            elif goes == "moved":
                folder.rename(tmp_path / "elsewhere")
            else:
                (folder / "metrics.jsonl").unlink()

        Checkpointing.save = save  # type: ignore[method-assign]
        return run(folder, *SMALL)

    assert run_ranks(lose, 1) == [1]
    assert f"error: {folder}/metrics.jsonl: removed or moved" in capfd.readouterr().err
    assert folder.exists() == (goes == "one file")


def test_a_directory_that_disappears_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def lose_directory() -> int:
        original = Validation.score

        def score(self: Validation) -> None:
            original(self)
            (tmp_path / "run").rename(tmp_path / "gone")
            (tmp_path / "run").write_text("a file where the directory was")

        Validation.score = score  # type: ignore[method-assign]
        return run(tmp_path / "run", *SMALL)

    assert run_ranks(lose_directory, 1) == [1]
    assert f"{tmp_path}/run/metrics.jsonl: removed or moved" in capfd.readouterr().err


# --- the machine -----------------------------------------------------------------------------------------------------


def test_out_of_memory_is_one_line_with_a_way_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def starve() -> int:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), used + (300 << 20)))
        arguments = ["--recipe", "yannet", "--dataset", "digits", "--global-batch-size", "1437", *ONE_THREAD]
        return train_ddp.main(parse_command_line([*arguments, "--wandb", "disabled", "--run-dir", str(tmp_path)]))

    assert run_ranks(starve, 1) == [1]
    error = capfd.readouterr().err
    assert "out of memory" in error
    assert "--gradient-accumulation-steps" in error
