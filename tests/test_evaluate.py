from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mnist.cli import parse_options, run_command
from mnist.config import DataConfig
from mnist.data.datasets import read
from mnist.data.sources import DatasetInfo, info_of
from mnist.errors import UserError
from mnist.evaluate import Options, check_fits, main, mcnemar
from tests.processes import PYTHON, TORCHRUN, finish
from tests.ranks import run_ranks
from tests.runs.test_run import SMALL, result, run

EVALUATE = ["-m", "mnist.evaluate"]


class Command:
    """`python -m mnist.evaluate` in a fork of this process, which has imported torch."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd
        self.err = ""

    def __call__(self, *arguments: str, code: int = 0, world_size: int = 1) -> str:
        """Standard output; standard error is then in `err`."""

        def evaluate() -> int | str | None:
            sys.argv = ["evaluate", *arguments]
            try:
                run_command(main, parse_options(Options, "evaluate", None, has_ranks=True))
            except SystemExit as end:
                return end.code

        self._capfd.readouterr()
        codes = run_ranks(evaluate, world_size)
        out, self.err = self._capfd.readouterr()
        assert codes == [code] * world_size, self.err
        return out


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(capfd)


@pytest.mark.launch
def test_the_numbers_of_the_training_come_again(smoke_run: Path, tmp_path: Path) -> None:
    done = finish([*PYTHON, *EVALUATE, "--run", str(smoke_run), "--json"], tmp_path)
    assert done.code == 0, done.err
    found, result = json.loads(done.out), json.loads((smoke_run / "result.json").read_text())
    assert {key: found[key] for key in result["test"]} == result["test"]
    assert found["as_trained"].items() <= result["test"].items()
    assert found["confusion"] == result["test_confusion"]
    assert found["accuracy_per_class"]["0"] == found["confusion"][0][0] / sum(found["confusion"][0])


def test_accuracy_of_each_batch_and_of_all_so_far(tmp_path: Path, evaluate: Command) -> None:
    assert run_ranks(run, 1, tmp_path / "run", *SMALL, "--max-steps", "12", "--min-accuracy", "None") == [0]
    command = ["--run", "run", "--split", "train", "--per-batch"]
    found = json.loads(evaluate(*command, "--json"))
    total = found["num_samples"]
    sizes = [1000] * (total // 1000) + [total % 1000]
    batches, so_far = found["accuracy_per_batch"], found["accuracy_so_far"]
    assert len(sizes) > 10
    assert so_far[-1] == found["accuracy"]
    right = [round(rate * size) for rate, size in zip(batches, sizes, strict=True)]
    assert [rate * size for rate, size in zip(batches, sizes, strict=True)] == pytest.approx(right)
    assert so_far[9] == sum(right[:10]) / 10_000
    assert (sum(right), len(set(batches)) > 1) == (found["num_correct"], True)
    lines = evaluate(*command).splitlines()
    assert lines[9] == f"10,000 images: accuracy of this batch {batches[9]:7.2%}, so far {so_far[9]:7.2%}"
    assert lines[len(sizes) - 1].startswith(f"{total:,} images: ")


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [(0, 0, 1.0), (5, 5, 1.0), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (0, 6, 2 / 64), (40, 60, 0.0568879)],
)
def test_mcnemars_exact_test_is_twice_the_tail_of_a_fair_coin(
    only_first: int, only_second: int, p_value: float
) -> None:
    assert mcnemar(only_first, only_second) == pytest.approx(p_value, rel=1e-5)


def test_versus_counts_the_images_that_one_model_alone_gets_right(
    smoke_run: Path, tmp_path: Path, evaluate: Command
) -> None:
    """The other model calls every digit a 3."""
    export = tmp_path / "other"
    shutil.copytree(smoke_run / "export" / "best", export)
    weights = load_file(export / "model.safetensors")
    weights["linear2.weight"] = torch.zeros_like(weights["linear2.weight"])
    weights["linear2.bias"] = torch.eye(10)[3]
    save_file(weights, export / "model.safetensors")
    written = json.loads((export / "config.json").read_text())
    written["weights_sha256"] = hashlib.sha256((export / "model.safetensors").read_bytes()).hexdigest()
    (export / "config.json").write_text(json.dumps(written))
    command = ["--run", str(smoke_run), "--versus", str(export)]
    found = json.loads(evaluate(*command, "--json"))
    threes = found["confusion"][3]
    only = {"only_first_correct": found["num_correct"] - threes[3], "only_versus_correct": sum(threes) - threes[3]}
    assert found["versus"] | only == found["versus"]
    assert found["versus"]["num_correct"] == sum(threes)
    assert found["versus"]["p_value"] == mcnemar(*only.values()) < 0.001
    *_, line = evaluate(*command).splitlines()
    assert line.startswith(f"images that one model alone gets right: {only['only_first_correct']} the first, ")
    assert line.endswith(": they differ")


@pytest.mark.launch
def test_two_processes_of_a_launcher_find_the_same_and_one_prints(smoke_run: Path, tmp_path: Path) -> None:
    command = [*TORCHRUN, "--nproc-per-node", "2", *EVALUATE, "--run-dir", str(smoke_run), "--evaluation", "sharded"]
    done = finish(command, tmp_path, OMP_NUM_THREADS="1")
    assert done.code == 0, done.err
    assert done.out.count("exactly as in training") == 1


def test_rank_0_scores_alone_among_two_and_one_prints(smoke_run: Path, evaluate: Command) -> None:
    assert evaluate("--run", str(smoke_run), world_size=2).count("exactly as in training") == 1


def test_digits_in_place_of_mnist_cannot_be_missed(
    smoke_run: Path, evaluate: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_MIRROR", "http://127.0.0.1:9")
    monkeypatch.setenv("MNIST_DATA_DIR", "")
    evaluate("--run", str(smoke_run), "--dataset", "auto", "--data-dir", "nowhere")
    words = "NOT MNIST: these are the 1,797 embedded digits, because MNIST is not in nowhere/MNIST/raw"
    assert words in evaluate.err


def test_bf16_and_averaged_weights_come_again_too(tmp_path: Path, evaluate: Command) -> None:
    options = ["--mixed-precision", "bf16", "--ema", "0.9", "--val-size", "200", "--min-accuracy", "0.1"]
    folder = tmp_path / "runs" / "a"
    assert run_ranks(run, 1, folder, *SMALL, *options) == [0]
    assert "exactly as in training" in evaluate()
    val = json.loads(evaluate("--split", "val", "--json"))
    assert val["num_correct"] == result(folder)["best"]["num_correct"]


def test_other_weights_are_noticed(smoke_run: Path, tmp_path: Path, evaluate: Command) -> None:
    shutil.copytree(smoke_run, tmp_path / "run")
    other = result(tmp_path / "run")
    other["test"]["num_correct"] -= 1
    (tmp_path / "run" / "result.json").write_text(json.dumps(other))
    assert f"in training {other['test']['num_correct']}" in evaluate("--run", "run")


def test_a_model_of_another_machine_is_evaluated_as_well_as_this_one_can(
    smoke_run: Path, tmp_path: Path, evaluate: Command
) -> None:
    shutil.copytree(smoke_run / "export" / "best", tmp_path / "best")
    config = json.loads((tmp_path / "best" / "config.json").read_text())
    config |= {"mixed_precision": "fp16", "num_threads": 512, "val_size": 5000, "dataset": "mnist"}
    (tmp_path / "best" / "config.json").write_text(json.dumps(config))
    found = json.loads(evaluate("--run", "best", "--dataset", "digits", "--cpu", "--json"))
    assert found["num_correct"] == result(smoke_run)["test"]["num_correct"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--run", "nowhere"], "error: --run nowhere: no such folder"),
        ([], "error: --run: no finished run below runs/"),
        (["--per-batch", "--evaluation", "sharded"], "error: --per-batch: needs --evaluation rank0"),
        (["--versus", "a", "--evaluation", "sharded"], "error: --versus: needs --evaluation rank0"),
    ],
)
def test_a_mistake_is_one_line(evaluate: Command, arguments: list[str], line: str) -> None:
    assert evaluate(*arguments, code=2) == ""
    assert evaluate.err.startswith(line)
    assert evaluate.err.count("\n") == 1


def test_a_split_that_was_not_held_out_is_a_mistake(smoke_run: Path, evaluate: Command) -> None:
    evaluate("--run", str(smoke_run), "--split", "val", code=2)
    assert "--split val" in evaluate.err


@pytest.mark.launch
def test_help_answers_without_torch(tmp_path: Path) -> None:
    done = finish([sys.executable, "-X", "importtime", *EVALUATE, "--help"], tmp_path)
    assert done.code == 0
    assert "Run directory" in done.out
    assert "torch" not in done.err


@pytest.mark.parametrize(
    ("info", "what"),
    [
        (info_of("emnist_letters"), "26 classes, but the model was trained for 10"),
        (DatasetInfo((3, 28, 28), tuple("0123456789")), "3 channels, but the model was trained for 1"),
    ],
)
def test_a_data_set_of_other_classes_or_channels_is_refused(info: DatasetInfo, what: str) -> None:
    other = dataclasses.replace(read("digits", DataConfig()), name="other", info=info)
    with pytest.raises(UserError, match=f"--dataset other: has {what}"):
        check_fits(info_of("mnist"), other)
