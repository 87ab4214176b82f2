"""--init-from: a new run that begins with the weights of another one."""

from __future__ import annotations

import hashlib
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from mnist.config import TrainConfig, fields_on_resume
from mnist.errors import UserError
from mnist.models import build_model
from mnist.runs.initial_weights import misfits
from tests.data.test_datasets import write_files
from tests.ranks import run_ranks
from tests.runs.test_run import SMALL, metrics, result, run, run_and_signal, weights

STANDING_STILL = [*("--optimizer", "sgd", "--lr", "1e-30", "--schedule", "constant", "--max-steps", "1")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few steps, to be read only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run_ranks(run, 1, folder, *SMALL) == [0]
    return folder


def test_the_first_step_sees_better_weights_than_random_ones(tmp_path: Path, trained: Path) -> None:
    arguments = [*SMALL, "--max-steps", "2", "--log-every", "1", "--seed", "5", "--min-accuracy", "None"]
    assert run_ranks(run, 2, tmp_path / "warm", *arguments, "--init-from", str(trained)) == [0, 0]
    assert run_ranks(run, 2, tmp_path / "random", *arguments) == [0, 0]
    warm, random = (metrics(tmp_path / name)[0] for name in ("warm", "random"))
    assert (warm["step"], random["step"]) == (1, 1)
    assert random["accuracy"] < 0.4
    assert warm["accuracy"] > 0.6
    assert warm["loss"] < random["loss"] / 1.5


@pytest.mark.parametrize("extra", [[], ["--ema", "0.9"]], ids=["plain", "averaged"])
@pytest.mark.parametrize("place", ["", "export/last"], ids=["run", "export"])
def test_all_weights_are_those_of_the_other_run_and_result_json_says_so(
    tmp_path: Path, trained: Path, place: str, extra: list[str]
) -> None:
    arguments = [*SMALL, *STANDING_STILL, *extra, "--seed", "5", "--init-from", str(trained / place)]
    assert run_ranks(run, 2, tmp_path, *arguments) == [0, 0]
    assert weights(tmp_path) == weights(trained)
    export = trained / (place or "export/best")
    sha256 = hashlib.sha256(weights(trained)).hexdigest()
    assert result(tmp_path)["initialised_from"] == {"folder": str(export), "sha256": sha256, "skipped": []}


def test_random_weights_are_recorded_as_none(trained: Path) -> None:
    assert result(trained)["initialised_from"] is None


def test_a_run_on_another_data_set_takes_all_weights_where_the_number_of_classes_is_the_same(
    tmp_path: Path, trained: Path
) -> None:
    write_files(tmp_path, "KMNIST")
    other = ["--dataset", "kmnist", "--data-dir", str(tmp_path), "--global-batch-size", "10", "--min-accuracy", "None"]
    arguments = [*SMALL, *STANDING_STILL, *other, "--init-from", str(trained)]
    assert run_ranks(run, 1, tmp_path / "run", *arguments) == [0]
    assert result(tmp_path / "run")["dataset"] == "kmnist"
    assert weights(tmp_path / "run") == weights(trained)


@pytest.mark.parametrize(
    ("wanted", "extra", "message"),
    [
        ("nowhere", [], "/nowhere: no such folder"),
        ("", [], ": no exported model there"),
        ("damaged", [], "/damaged/export/best: model.safetensors has changed since it was written"),
        (
            "trained",
            ["--model", "fastnet"],
            "/trained: weights of the network tinynet, not fastnet; add --model tinynet",
        ),
    ],
)
def test_what_cannot_be_taken_is_one_line_and_leaves_no_run(
    tmp_path: Path, trained: Path, capfd: pytest.CaptureFixture[str], *, wanted: str, extra: list[str], message: str
) -> None:
    for name in ("trained", "damaged"):
        shutil.copytree(trained, tmp_path / name)
    file = tmp_path / "damaged" / "export" / "best" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run_ranks(run, 2, tmp_path / "new", *SMALL, *extra, "--init-from", str(tmp_path / wanted)) == [2, 2]
    error = capfd.readouterr().err
    assert error.count("error:") == 1
    assert f"--init-from {tmp_path}{message}" in error
    assert not (tmp_path / "new").exists(), "no run has begun there"
    assert not list((tmp_path / "new").glob("*.json"))


def test_a_run_that_is_resumed_does_not_read_the_weights_again_and_ends_bit_for_bit_alike(
    tmp_path: Path, trained: Path
) -> None:
    shutil.copytree(trained, tmp_path / "other")
    arguments = [*SMALL, "--seed", "5", "--max-steps", "40", "--init-from", str(tmp_path / "other")]
    assert run_ranks(run, 2, tmp_path / "a", *arguments) == [0, 0]
    assert run_ranks(run_and_signal, 2, signal.SIGTERM, 17, 1, tmp_path / "b", *arguments) == [75, 75]
    shutil.rmtree(tmp_path / "other")
    assert run_ranks(run, 2, tmp_path / "b", *arguments) == [0, 0]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert result(tmp_path / "a")["initialised_from"] == result(tmp_path / "b")["initialised_from"] is not None


def test_other_first_weights_are_another_run(tmp_path: Path, trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained, tmp_path / "run")
    assert run_ranks(run, 1, tmp_path / "run", *SMALL, "--init-from", str(trained)) == [2]
    assert f"--init-from was None, now {trained}" in capfd.readouterr().err
    assert "init_from" in fields_on_resume("fixed")
    assert TrainConfig().optim.init_from is None


def network(num_classes: int, width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, num_classes))


def test_the_last_layer_is_skipped_where_the_number_of_classes_differs() -> None:
    assert misfits(network(10).state_dict(), network(26), "--init-from a") == ["3.weight", "3.bias"]
    assert misfits(network(26).state_dict(), network(26), "--init-from a") == []


def test_the_last_layer_of_each_member_of_a_ensemble_is_skipped() -> None:
    weights = build_model("ensemble", 1, 28, 10).state_dict()
    names = [f"members.{member}.linear.{part}" for member in (0, 1) for part in ("weight", "bias")]
    assert misfits(weights, build_model("ensemble", 1, 28, 26), "--init-from a") == names


@pytest.mark.parametrize(("width", "name"), [(9, "0.weight"), (16, "0.weight")])
def test_another_shape_anywhere_else_is_refused(width: int, name: str) -> None:
    with pytest.raises(
        UserError, match=rf"^--init-from a: {name} has the shape \({width}, 1, 3, 3\), not \(8, 1, 3, 3\)"
    ):
        misfits(network(10, width).state_dict(), network(26), "--init-from a")


def test_a_last_layer_with_other_inputs_is_refused() -> None:
    wide = {**network(10).state_dict(), "3.weight": torch.zeros(10, 9)}
    with pytest.raises(UserError, match=r"3\.weight has the shape"):
        misfits(wide, network(10), "--init-from a")
