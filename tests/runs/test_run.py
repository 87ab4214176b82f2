"""Whole runs, in this process and on forked ranks: the same code as the command, without the seconds of a launcher."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.nn.parallel import DistributedDataParallel

import train_ddp
from mnist import models
from mnist.cli import parse_command_line
from mnist.config import to_flat
from mnist.data import datasets
from mnist.data.batches import TrainLoader
from mnist.data.datasets import Dataset
from mnist.errors import RunError
from mnist.runs.checkpoint_files import load_checkpoint, load_newest
from mnist.system import signals
from mnist.training.step import TrainStep
from tests.ranks import run_ranks

SMALL = [
    *("--recipe", "smoke", "--global-batch-size", "64", "--lr", "5e-3", "--log-every", "10"),
    *("--max-steps", "69", "--eval-every", "23", "--checkpoint-every", "23"),
    *("--num-threads", "1", "--min-accuracy", "0.5", "--no-pictures"),
]
# Everything that has a state or draws random numbers, in few steps.
EVERYTHING = [
    *("--dataset", "digits", "--val-size", "1433"),  # 4 images, 42 times: epochs of 5 steps, the last one short
    *("--recipe", "yannet", "--epochs", "4", "--global-batch-size", "36"),
    *("--optimizer", "adamw", "--lr", "1e-3", "--schedule", "one_cycle", "--warmup", "0.3", "--ema", "0.9"),
    *("--rotation", "10", "--translation", "0.1", "--elastic", "0.5", "--grad-clip", "1"),
    *("--gradient-accumulation-steps", "2", "--checkpoint-every", "4", "--log-every", "3"),
    *("--num-threads", "1", "--wandb", "disabled", "--no-pictures"),
]


@pytest.fixture
def few_to_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations of 50 images: on the 1,433 that are not trained on they would take most of the time."""

    def load(*arguments: Any) -> Dataset:
        dataset = original(*arguments)
        assert dataset.val is not None
        return dataclasses.replace(dataset, val=dataset.val[:50], test=dataset.test[:50])

    original = datasets.load
    monkeypatch.setattr(datasets, "load", load)


def run(folder: Path, *arguments: str) -> int:
    """One run on this rank, as the command line would have it."""
    return train_ddp.main(parse_command_line([*arguments, "--run-dir", str(folder), "--quiet"]))


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records, without the times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = {"images_per_s", "images_per_s_per_device", "memory_mb", "epoch_time_s"}
    return [{key: value for key, value in record.items() if key not in times} for record in records]


def weights(folder: Path) -> bytes:
    return (folder / "export" / "last" / "model.safetensors").read_bytes()


def run_and_signal(number: int, at_step: int, on_rank: int, folder: Path, *arguments: str) -> int:
    """A run that gets a real signal when it is about to take step `at_step`."""
    signals.install()
    original = TrainLoader.steps

    def steps(self: TrainLoader, first: int, stop: int) -> Iterator[Any]:
        for index, micro_batches in enumerate(original(self, first, stop), start=first):
            if index == at_step and self.rank == on_rank:
                os.kill(os.getpid(), number)
            yield micro_batches

    TrainLoader.steps = steps  # type: ignore[method-assign]
    return run(folder, *arguments)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_run_ends_with_the_promised_files(tmp_path: Path, world_size: int) -> None:
    assert run_ranks(run, world_size, tmp_path, *SMALL) == [0] * world_size
    found = result(tmp_path)
    assert found["status"] == "finished"
    assert found["world_size"] == world_size
    assert (found["dataset"], found["steps"], found["epochs"]) == ("digits", 69, round(69 / 944, 4))
    assert found["test"]["num_samples"] == 360
    assert found["test"]["accuracy"] == found["test"]["num_correct"] / 360
    assert json.loads((tmp_path / "config.json").read_text())["recipe"] == "smoke"
    assert len(json.loads((tmp_path / "environment.json").read_text())["ranks"]) == world_size
    assert {record["split"] for record in metrics(tmp_path)} == {"train", "test"}
    assert {record["dataset"] for record in metrics(tmp_path)} == {"digits"}
    assert [record["step"] for record in metrics(tmp_path) if record["split"] == "test"] == [23, 46, 69]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000046", "step-00000069"]
    exported = {name: {path.name for path in (tmp_path / "export" / name).iterdir()} for name in ("last", "best")}
    assert exported["last"] == {"config.json", "model.safetensors"}
    assert exported["best"] == exported["last"] | {"README.md"}


def test_the_accurate_recipe_takes_its_steps_on_a_cpu_too(tmp_path: Path) -> None:
    arguments = ["--recipe", "accurate", "--dataset", "digits", "--max-steps", "3", "--global-batch-size", "32"]
    assert run_ranks(run, 1, tmp_path, *arguments, "--num-threads", "1", "--no-pictures") == [0]
    assert result(tmp_path)["steps"] == 3


def test_both_evaluation_modes_count_the_same(tmp_path: Path) -> None:
    for mode in ("rank0", "sharded"):
        run_ranks(run, 2, tmp_path / mode, *SMALL, "--evaluation", mode)
    rank0, sharded = (result(tmp_path / mode)["test"] for mode in ("rank0", "sharded"))
    assert rank0 == sharded


@pytest.mark.usefixtures("few_to_score")
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path: Path, world_size: int) -> None:
    """Stopped at steps 3, 8 and 16 of 20, five an epoch: on the last rank, then on the first."""
    assert run_ranks(run, world_size, tmp_path / "a", *EVERYTHING) == [0] * world_size
    for at_step, rank in ((3, world_size - 1), (8, 0), (16, 0)):
        codes = run_ranks(run_and_signal, world_size, signal.SIGTERM, at_step, rank, tmp_path / "b", *EVERYTHING)
        assert codes == [75] * world_size
        assert result(tmp_path / "b")["status"] == "preempted"
    assert run_ranks(run, world_size, tmp_path / "b", *EVERYTHING) == [0] * world_size
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_records_of_a_start_without_a_checkpoint_are_continued_by_the_same_configuration_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rare = [*SMALL, "--log-every", "5", "--checkpoint-every", "1000"]
    with pytest.raises(RuntimeError, match="a rank died"):
        run_ranks(run_and_signal, 1, signal.SIGKILL, 18, 0, tmp_path / "a", *rare)
    assert metrics(tmp_path / "a")[-1]["step"] == 15
    for flag, value in (("--seed", "5"), ("--lr", "0.001")):
        assert run_ranks(run, 1, tmp_path / "a", *rare, flag, value) == [2]
        assert f"{flag} was" in capfd.readouterr().err
    for folder in ("a", "b"):
        assert run_ranks(run, 1, tmp_path / folder, *rare) == [0]
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_a_stop_between_evaluations_claims_no_scores_of_its_weights(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--eval-every", "10", "--val-size", "300"]
    assert run_ranks(run_and_signal, 1, signal.SIGTERM, 16, 0, tmp_path, *arguments) == [75]
    manifests = sorted((tmp_path / "checkpoints").glob("*/manifest.json"))
    scores = {path.parent.name: set(json.loads(path.read_text())["scores"]) for path in manifests}
    assert scores == {"step-00000010": {"val"}, "step-00000017": set()}
    assert f"python train_ddp.py --resume {tmp_path}" in capfd.readouterr().out


@pytest.mark.usefixtures("few_to_score")
def test_a_killed_run_replays_the_lost_steps_and_doubles_no_record(tmp_path: Path) -> None:
    run_ranks(run, 1, tmp_path / "a", *EVERYTHING)
    with pytest.raises(RuntimeError, match="a rank died"):
        run_ranks(run_and_signal, 1, signal.SIGKILL, 14, 0, tmp_path / "b", *EVERYTHING)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "spl')  # torn by the kill
    assert run_ranks(run, 1, tmp_path / "b", *EVERYTHING) == [0]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_a_run_continues_on_another_number_of_processes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], before: int, after: int
) -> None:
    """Within 1e-5 of the uninterrupted run 19 steps after the change."""
    arguments = [*SMALL, "--max-steps", "40", "--schedule", "constant", "--lr", "1e-3", "--min-accuracy", "0.01"]
    run_ranks(run, 1, tmp_path / "a", *arguments)
    assert run_ranks(run_and_signal, before, signal.SIGTERM, 20, 0, tmp_path / "b", *arguments) == [75] * before
    assert run_ranks(run, after, tmp_path / "b", *arguments) == [0] * after
    assert f"processes {before} -> {after} (same global batches)" in capfd.readouterr().err
    pairs = zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True)
    assert all(a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5) for a, b in pairs)
    ours, theirs = safetensors.torch.load(weights(tmp_path / "a")), safetensors.torch.load(weights(tmp_path / "b"))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5


def test_a_finished_run_says_so_and_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(run, 1, tmp_path, *SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    assert train_ddp.main(parse_command_line([*SMALL, "--run-dir", str(tmp_path)])) == 0
    assert f"finished  {tmp_path}: 69 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"} == before


def test_a_finished_run_leaves_six_pictures_and_warns_of_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(run, 1, tmp_path / "$...^{$", *SMALL, "--pictures") == [0]
    names = ["confusion", "curves", "features", "filters", "mistakes", "samples"]
    assert sorted(path.stem for path in (tmp_path / "$...^{$" / "pictures").iterdir()) == names
    assert "not drawn" not in capfd.readouterr().err


def test_a_finished_run_prints_its_closing_lines_with_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(run, 1, tmp_path, *SMALL)
    capfd.readouterr()
    assert run_ranks(run, 1, tmp_path, *SMALL) == [0]
    assert f"finished  {tmp_path}: 69 steps, test accuracy" in capfd.readouterr().out


@pytest.mark.parametrize(("schedule", "is_offered"), [("constant", True), ("one_cycle", False)])
def test_a_finished_run_offers_more_steps_where_its_schedule_allows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], schedule: str, is_offered: bool
) -> None:
    arguments = [*SMALL, "--max-steps", "23", "--min-accuracy", "0.01", "--schedule", schedule]
    run_ranks(run, 1, tmp_path, *arguments)
    capsys.readouterr()
    train_ddp.main(parse_command_line([*arguments, "--run-dir", str(tmp_path)]))
    assert ("with a larger --max-steps continues it" in capsys.readouterr().out) == is_offered


def test_a_run_that_reached_its_target_goes_on_without_one(tmp_path: Path) -> None:
    arguments = [*SMALL, "--min-accuracy", "0.01"]
    run_ranks(run, 1, tmp_path / "a", *arguments)
    run_ranks(run, 1, tmp_path / "b", *arguments, "--target-accuracy", "0.02")
    assert result(tmp_path / "b")["stop_reason"] == "target reached"
    assert result(tmp_path / "b")["steps"] == 23
    assert run_ranks(run, 1, tmp_path / "b", *arguments) == [0]
    assert result(tmp_path / "b")["stop_reason"] is None
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_finished_run_is_not_taken_for_one_with_another_learning_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--max-steps", "23", "--min-accuracy", "0.01"]
    run_ranks(run, 1, tmp_path, *arguments)
    capsys.readouterr()
    assert train_ddp.main(parse_command_line([*arguments, "--lr", "1e-3", "--run-dir", str(tmp_path)])) == 2
    assert "--lr was 0.005, now 0.001" in capsys.readouterr().err
    assert train_ddp.main(parse_command_line([*arguments, "--min-accuracy", "0.99", "--run-dir", str(tmp_path)])) == 1
    assert "--min-accuracy 0.99: missed with" in capsys.readouterr().err


def test_validation_scores_survive_a_restart_after_the_last_of_them(tmp_path: Path) -> None:
    arguments = [*SMALL, "--val-size", "300"]
    run_ranks(run, 1, tmp_path, *arguments)
    whole = result(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({**whole, "status": "running"}))  # killed before the closing lines
    assert run_ranks(run, 1, tmp_path, *arguments) == [0]
    assert result(tmp_path)["val"] == whole["val"] is not None


def test_more_epochs_continue_a_finished_run_exactly(tmp_path: Path) -> None:
    constant = [*SMALL, "--schedule", "constant"]
    run_ranks(run, 1, tmp_path / "a", *constant)
    run_ranks(run, 1, tmp_path / "b", *constant, "--max-steps", "46")
    assert run_ranks(run, 1, tmp_path / "b", *constant) == [0]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_finished_directory_does_not_answer_for_another_recipe(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(run, 1, tmp_path, *SMALL)
    assert run_ranks(run, 1, tmp_path, *SMALL, "--model", "mycnn") == [2]
    assert "--model was tinynet, now mycnn" in capfd.readouterr().err


def test_a_refused_resume_changes_nothing(tmp_path: Path) -> None:
    run_ranks(run, 1, tmp_path, *SMALL)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    earlier = str(tmp_path / "checkpoints" / "step-00000046")
    assert run_ranks(run, 1, tmp_path, *SMALL, "--resume", earlier, "--seed", "5") == [2]
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_broken_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    arguments = [*SMALL, "--schedule", "constant"]
    run_ranks(run, 1, tmp_path, *arguments, "--max-steps", "46")
    broken = tmp_path / "checkpoints" / "step-00000046" / "state.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    assert run_ranks(run, 1, tmp_path, *arguments, "--keep-last", "3") == [0]
    found, skipped = load_newest(tmp_path / "checkpoints")
    assert not skipped
    assert found is not None
    load_checkpoint(tmp_path / "checkpoints" / "step-00000046")


def test_a_network_whose_code_has_changed_is_one_line_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--schedule", "constant"]
    run_ranks(run, 1, tmp_path, *arguments, "--max-steps", "23")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setitem(models.MODELS, "tinynet", models.MODELS["mycnn"])
    assert run_ranks(run, 2, tmp_path, *arguments) == [1, 1]
    error = capfd.readouterr().err
    assert error.count("error: the checkpoint of step 23 is of another network: ") == 1
    assert "Missing key(s) in state_dict" in error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_branch_finds_its_own_best_weights(tmp_path: Path) -> None:
    arguments = [*SMALL, "--val-size", "300", "--schedule", "constant"]
    run_ranks(run, 1, tmp_path / "a", *arguments)
    start = str(min((tmp_path / "a" / "checkpoints").iterdir()))
    assert run_ranks(run, 1, tmp_path / "b", *arguments, "--lr", "1e-9", "--resume", start) == [0]
    found = result(tmp_path / "b")
    assert (found["status"], found["origin"]) == ("finished", start)
    assert found["best"]["step"] in [record["step"] for record in metrics(tmp_path / "b")]


def test_weights_that_the_last_step_broke_are_not_called_finished(tmp_path: Path) -> None:
    """The loss of a step is that of the weights before it."""

    def break_the_last_step() -> int:
        original = TrainStep.update

        def update(self: TrainStep, measure_grad_norm: bool) -> None:
            original(self, measure_grad_norm)
            next(self.bare_model.parameters()).data.fill_(float("inf"))

        TrainStep.update = update  # type: ignore[method-assign]
        return run(tmp_path, *SMALL, "--max-steps", "1", "--schedule", "constant")

    assert run_ranks(break_the_last_step, 2) == [1, 1]
    assert result(tmp_path)["status"] == "diverged"
    assert not (tmp_path / "export").exists()
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_target_ends_the_run_at_the_evaluation_that_reaches_it(tmp_path: Path, world_size: int) -> None:
    """Not at the end of the epoch, 23 steps later."""
    arguments = [*SMALL, "--min-accuracy", "None", "--eval-every", "3", "--target-accuracy", "0.02"]
    assert run_ranks(run, world_size, tmp_path, *arguments) == [0] * world_size
    assert (result(tmp_path)["steps"], result(tmp_path)["stop_reason"]) == (3, "target reached")
    assert run_ranks(run, world_size, tmp_path, *arguments) == [0] * world_size, "and it is finished"


def test_a_branch_that_was_killed_before_its_first_checkpoint_begins_at_its_origin_again(tmp_path: Path) -> None:
    constant = [*SMALL, "--schedule", "constant"]
    run_ranks(run, 1, tmp_path / "a", *constant, "--keep-last", "3")
    start = str(tmp_path / "a" / "checkpoints" / "step-00000023")
    branch = [*constant, "--lr", "1e-3", "--resume", start]
    with pytest.raises(RuntimeError, match="a rank died"):
        run_ranks(run_and_signal, 1, signal.SIGKILL, 35, 0, tmp_path / "b", *branch)
    assert run_ranks(run, 1, tmp_path / "b", *branch) == [0], "and again the same command"
    assert run_ranks(run, 1, tmp_path / "c", *branch) == [0]
    assert weights(tmp_path / "b") == weights(tmp_path / "c")
    assert metrics(tmp_path / "b") == metrics(tmp_path / "c")
    assert min(record["step"] for record in metrics(tmp_path / "b")) == 30


def test_resume_never_holds_for_the_first_attempt_of_a_job_and_its_restarts_continue_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--resume", "never"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert run_ranks(run_and_signal, 1, signal.SIGTERM, 30, 0, tmp_path, *arguments) == [75]
    assert run_ranks(run, 1, tmp_path, *arguments) == [2]
    assert f"--resume never: {tmp_path} holds a run already" in capfd.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert run_ranks(run, 1, tmp_path, *arguments) == [2], "a restart of another job, whose first attempt died early"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert run_ranks(run, 1, tmp_path, *arguments) == [0]


def test_the_average_of_a_compiled_model_has_plain_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert run_ranks(run, 1, tmp_path, *SMALL, "--max-steps", "2", "--ema", "0.9", "--min-accuracy", "0.01") == [0]
    assert b"_orig_mod" not in weights(tmp_path)


def test_a_schedule_laid_out_for_a_length_is_not_stretched(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(run, 1, tmp_path, *SMALL)
    assert run_ranks(run, 1, tmp_path, *SMALL, "--max-steps", "92") == [2]
    assert "the one_cycle schedule was laid out for 69 steps" in capfd.readouterr().err
    assert result(tmp_path)["status"] == "finished"


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--model", "fastnet"), ("--seed", "1"), ("--global-batch-size", "32"), ("--loss", "nll"), ("--ema", "0.9")],
)
def test_another_configuration_is_refused_with_both_values(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    arguments = [*SMALL, "--schedule", "constant", "--max-steps", "23"]
    run_ranks(run, 1, tmp_path, *arguments)
    assert run_ranks(run, 1, tmp_path, *arguments, "--max-steps", "46", flag, value) == [2]
    error = capfd.readouterr().err
    assert f"{flag} was" in error
    assert f"now {value}" in error


def test_another_learning_rate_is_another_run_that_may_branch_off(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--schedule", "constant"]
    run_ranks(run, 1, tmp_path / "a", *arguments, "--max-steps", "23")
    assert run_ranks(run, 1, tmp_path / "a", *arguments, "--lr", "1e-3") == [2]
    assert "--lr was 0.005, now 0.001" in capfd.readouterr().err
    start = str(tmp_path / "a" / "checkpoints" / "step-00000023")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    assert run_ranks(run, 1, tmp_path / "b", *arguments, "--lr", "1e-3", "--resume", start) == [0]
    assert "from here on: --lr was 0.005, now 0.001" in capfd.readouterr().err
    assert {record["lr"] for record in metrics(tmp_path / "b") if record["split"] == "train"} == {1e-3}
    assert min(record["step"] for record in metrics(tmp_path / "b")) == 30
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")} == before


def test_the_best_on_validation_is_what_the_test_set_sees_once(tmp_path: Path) -> None:
    rising = ["--schedule", "one_cycle", "--warmup", "0.8", "--lr", "1"]  # to a rate that undoes what was learnt
    often = ["--max-steps", "108", "--eval-every", "18", "--checkpoint-every", "18", "--val-size", "300"]
    run_ranks(run, 1, tmp_path, *SMALL, *often, *rising, "--min-accuracy", "0.2")
    records = metrics(tmp_path)
    validation = [(record["accuracy"], record["step"]) for record in records if record["split"] == "val"]
    best = max(accuracy for accuracy, _ in validation)
    best_step = next(step for accuracy, step in validation if accuracy == best)
    found = result(tmp_path)
    assert found["best"]["step"] == best_step
    assert sum(record["split"] == "test" for record in records) == 1
    assert (tmp_path / "checkpoints" / f"step-{best_step:08d}").is_dir()
    assert best_step != found["steps"], "choose a learning rate that harms in the end"
    assert (tmp_path / "export" / "best" / "model.safetensors").read_bytes() != weights(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--target-accuracy", "0.8"], "target reached"),
        (["--target-loss", "1.0"], "target reached"),
        (["--val-size", "300", "--patience", "2", "--lr", "1e-9"], "no better for 2 evaluations"),
    ],
)
def test_a_run_stops_early(tmp_path: Path, arguments: list[str], reason: str) -> None:
    run_ranks(run, 2, tmp_path, *SMALL, "--max-steps", "345", "--min-accuracy", "0.01", *arguments)
    found = result(tmp_path)
    assert found["stop_reason"] == reason
    assert found["steps"] < found["planned_steps"]
    assert found["status"] == "finished"


def test_a_missed_gate_is_exit_code_1_now_and_when_asked_again(tmp_path: Path) -> None:
    assert run_ranks(run, 1, tmp_path, *SMALL, "--max-steps", "23", "--min-accuracy", "0.999") == [1]
    assert result(tmp_path)["gate_passed"] is False
    assert run_ranks(run, 1, tmp_path, *SMALL, "--max-steps", "23", "--min-accuracy", "0.999") == [1]


def test_a_diverged_run_says_where_and_is_not_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--optimizer", "sgd", "--lr", "1e30", "--schedule", "constant"]
    assert run_ranks(run, 2, tmp_path, *arguments) == [1, 1]
    found = result(tmp_path)
    assert found["status"] == "diverged"
    assert f"at step {found['steps']} on rank" in capfd.readouterr().err
    assert run_ranks(run, 2, tmp_path, *arguments) == [1, 1]
    assert "this run diverged at step" in capfd.readouterr().err


def test_a_restart_before_the_first_checkpoint_says_that_nothing_was_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = [*SMALL, "--max-steps", "3", "--min-accuracy", "None", "--run-dir", str(tmp_path)]
    said = "the earlier start saved no checkpoint; the run begins at its first step"
    with pytest.raises(RuntimeError):
        train_ddp.train(parse_command_line([*config, "--inject", "raise@2"]))
    assert said not in capfd.readouterr().err
    train_ddp.train(parse_command_line(config))
    assert said in capfd.readouterr().err


def test_resume_never_refuses_a_directory_that_holds_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(run, 1, tmp_path, *SMALL, "--epochs", "1", "--min-accuracy", "None", "--resume", "never") == [0]
    before = weights(tmp_path)
    assert run_ranks(run, 1, tmp_path, *SMALL, "--seed", "5", "--resume", "never") == [2]
    assert f"--resume never: {tmp_path} holds a run already; choose another --run-dir" in capfd.readouterr().err
    assert weights(tmp_path) == before


def test_without_a_run_dir_a_start_is_a_new_run_and_resume_names_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def start(stop: bool, *arguments: str) -> int:
        if stop:
            monkeypatch.setattr(signals, "stop_requested", lambda: True)
        return train_ddp.main(parse_command_line(arguments))

    assert run_ranks(start, 1, True, *SMALL) == [75]
    (first,) = Path("runs").iterdir()
    assert first.name.startswith("smoke-changed-digits-")
    (command,) = re.findall(r"continue  (.*)", capfd.readouterr().out)
    assert run_ranks(start, 1, False, *SMALL) == [0]
    assert result(first)["status"] == "preempted"
    assert run_ranks(start, 1, False, *command.split()[2:]) == [0], "the command that was printed, without other flags"
    assert result(first)["status"] == "finished"
    assert len(list(Path("runs").iterdir())) == 2
    second = next(path for path in Path("runs").iterdir() if path != first)
    assert weights(first) == weights(second)
    assert metrics(first) == metrics(second)


def test_resume_last_is_the_run_that_was_started_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        assert run_ranks(run, 1, Path("runs", name), *SMALL, "--epochs", "1", "--min-accuracy", "None") == [0]
    config = parse_command_line(["--resume", "last", "--log-every", "7"])
    assert config.output.run_dir == "runs/b"
    assert (config.recipe, config.loop.epochs, config.loop.log_every) == ("smoke", 1, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "last"], "--resume last: no run below runs/"),
        (["--resume", "nowhere"], "--resume nowhere: no run there; give auto, never, last, a run directory"),
        (["--resume", "made", "--recipe", "lenet5"], "--recipe lenet5: --resume made is of recipe smoke"),
        (["--resume", "made", "--run-dir", "other"], "--run-dir other: --resume made continues the run in made"),
    ],
)
def test_a_resume_that_cannot_be_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("made").mkdir()
    Path("made", "config.json").write_text(json.dumps(to_flat(parse_command_line(SMALL))))
    with pytest.raises(SystemExit) as end:
        parse_command_line(arguments)
    assert end.value.code == 2
    assert capfd.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--global-batch-size", "70000"],
            "--global-batch-size 70000: larger than the training set of 60,354 images; give 60354 or less",
        ),
        (["--val-size", "1437"], "--val-size 1437: must be below"),
        (["--mixed-precision", "fp16"], "--mixed-precision fp16: needs a GPU"),
        (["--gradient-accumulation-steps", "65"], "--global-batch-size 64: too small"),
        (["--model", "lenet5", "--image-size", "28"], "--model lenet5: needs --image-size 32, not 28"),
        (["--resume", "nowhere"], "--resume nowhere: no run there"),
        (["--run-dir", "/dev/null/x"], "--run-dir /dev/null/x: not writable"),
    ],
)
def test_a_users_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    def start() -> int:
        try:
            return train_ddp.main(parse_command_line([*SMALL, "--run-dir", str(tmp_path / "run"), *arguments]))
        except SystemExit as end:
            return int(end.code or 0)

    assert run_ranks(start, 2) == [2, 2]
    error = capfd.readouterr().err
    assert message in error
    assert error.count("error:") + error.count("Value error") == 1
    assert not list(tmp_path.rglob("*.json*"))


def test_bf16_is_what_the_record_says(tmp_path: Path) -> None:
    assert run_ranks(run, 1, tmp_path, *SMALL, "--mixed-precision", "bf16") == [0]
    assert result(tmp_path)["precision"] == "bf16"


def test_the_launchers_precision_holds_unless_a_flag_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for name, extra in (("launcher", []), ("flag", ["--mixed-precision", "no"])):
        run_ranks(run, 1, tmp_path / name, *SMALL, "--max-steps", "23", "--min-accuracy", "0.1", *extra)
    assert [result(tmp_path / name)["precision"] for name in ("launcher", "flag")] == ["bf16", "fp32"]


@pytest.mark.parametrize(("lr", "is_remarked"), [("10", True), ("0.005", False)])
def test_an_accuracy_of_guessing_is_remarked_at_the_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], lr: str, is_remarked: bool
) -> None:
    arguments = [*SMALL, "--model", "lenet5", "--image-size", "32", "--lr", lr, "--max-steps", "69"]
    assert run_ranks(run, 1, tmp_path, *arguments, "--min-accuracy", "None") == [0]
    assert ("no better than one answer for all images" in capfd.readouterr().out) == is_remarked


@pytest.mark.parametrize("arguments", [(), ("--inject", "raise@2")])
def test_no_ddp_model_is_left_when_the_process_group_closes(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Freeing one later would free the group too, and can wait for gloo's threads for ever."""

    def count_models_at_the_end() -> list[int]:
        found: list[int] = []
        destroy = torch.distributed.destroy_process_group

        def count_and_destroy() -> None:
            found.append(sum(type(thing) is DistributedDataParallel for thing in gc.get_objects()))
            destroy()

        torch.distributed.destroy_process_group = count_and_destroy
        config = parse_command_line([*SMALL, "--max-steps", "3", "--run-dir", str(tmp_path), "--quiet", *arguments])
        with contextlib.suppress(RuntimeError, RunError):
            train_ddp.train(config)
        torch.distributed.destroy_process_group = destroy
        return found

    assert run_ranks(count_models_at_the_end, 2) == [[0], [0]]
