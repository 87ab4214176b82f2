"""What only a CUDA GPU can show: `python -m pytest -m gpu`. All other tests hide GPUs from themselves."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mnist.config import StepMode, evolve
from mnist.data.batches import TrainLoader
from mnist.data.transforms import uniform
from mnist.recipes import RECIPES
from mnist.seeding import derive_seed
from mnist.system.accelerator import build_accelerator
from mnist.training.build import build_train_step
from mnist.training.cuda_graph import choose_step_mode
from tests.networks import INFO
from tests.processes import ROOT, finish, together, train
from tests.ranks import free_port
from tests.training.test_cuda_graph import OPTIMIZERS, network, weights
from tests.training.test_cuda_graph import train as train_steps
from tests.training.test_step import DIGITS, make_step
from train_ddp import train as train_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda optim: optim["optimizer"])
def test_a_cuda_graph_gives_the_same_weights(optim: dict[str, Any]) -> None:
    """Twenty steps, two of them of a short batch; batch norm, dropout, augmentation and an average are in them."""
    options = {"batch": 100, "cpu": False, "capturable": True, "average": 0.9, **optim}
    eager, loader = make_step(model=network(), **options)
    replayed, _ = make_step(model=network(), **options)
    assert choose_step_mode(replayed, "captured", 1, loader) == ("captured", None)
    assert train_steps(replayed, loader, 20) == train_steps(eager, loader, 20)
    assert torch.equal(weights(replayed), weights(eager))


def test_augmentation_has_the_random_numbers_of_a_cpu() -> None:
    key = torch.tensor(derive_seed(3, "augmentation", 7))
    assert torch.equal(uniform(key.cuda(), slice(100, 356), 1574).cpu(), uniform(key, slice(100, 356), 1574))


def test_where_recording_breaks_off_steps_are_eager_and_the_same() -> None:
    """A loss that the host reads cannot be recorded."""

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses * (1.0 if losses.sum().item() >= 0 else 0.0)

    options = {"cpu": False, "capturable": True, "loss_fn": loss_fn}
    eager, loader = make_step(model=network(), **options)
    broken, _ = make_step(model=network(), **options)
    mode, remark = choose_step_mode(broken, "captured", 1, loader)
    assert mode == "eager"
    assert "capturing the step failed" in (remark or "")
    assert train_steps(broken, loader, 10) == train_steps(eager, loader, 10)
    assert torch.equal(weights(broken), weights(eager))


@pytest.mark.parametrize("mode", ["eager", "captured"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_of_this_recipe_never_wait_for_the_device(recipe: str, mode: StepMode) -> None:
    """Across the end of a pass, where the next order is copied to the device."""
    config = evolve(RECIPES[recipe](), step_mode=mode)
    accelerator = build_accelerator(config.runtime)
    step = build_train_step(config, accelerator, INFO)
    loader = TrainLoader(DIGITS.train.to(accelerator.device), global_batch_size=100, seed=0)
    assert choose_step_mode(step, mode, 1, loader) == (mode, None)
    for number, micro_batches in enumerate(loader.steps(0, 2)):
        step(micro_batches, number, measure_grad_norm=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, micro_batches in enumerate(loader.steps(2, 20), start=2):
            step(micro_batches, number, measure_grad_norm=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(step.sums[-1]) == 20


FIXED = ["--dataset", "digits", "--deterministic", "--no-pictures", "--min-accuracy", "None"]


def run(folder: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The result and the last weights of a run of the command."""
    done = finish(train(*arguments, *FIXED, "--run-dir", str(folder)), folder.parent)
    assert done.code == 0, done.err
    return read(folder)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The result and the last weights that a run has left."""
    return json.loads((folder / "result.json").read_text()), load_file(folder / "export" / "last" / "model.safetensors")


@pytest.mark.launch
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("recipe", ["fast", "accurate", "convnet", "lenet5_original", "mlp", "mycnn", "yannet"])
def test_a_captured_run_is_the_eager_one(tmp_path: Path, recipe: str, precision: str) -> None:
    """With evaluations between the replays: resizing, flips, elastic distortion, averages, every loss."""
    arguments = ["--recipe", recipe, "--mixed-precision", precision, "--max-steps", "12", "--eval-every", "5"]
    captured, replayed = run(tmp_path / "captured", *arguments)
    eager, expected = run(tmp_path / "eager", *arguments, "--step-mode", "eager")
    assert (captured["step_mode"], eager["step_mode"]) == ("captured", "eager")
    assert captured["test"] == eager["test"]
    assert all(torch.equal(replayed[name], value) for name, value in expected.items())


@pytest.mark.launch
def test_a_captured_run_goes_on_as_if_it_had_not_been_interrupted(tmp_path: Path) -> None:
    arguments = ["--recipe", "mycnn", "--ema", "0.9", "--step-mode", "captured"]
    _, expected = run(tmp_path / "whole", *arguments, "--max-steps", "20")
    run(tmp_path / "parts", *arguments, "--max-steps", "9")
    result, weights = run(tmp_path / "parts", *arguments, "--max-steps", "20")
    assert result["step_mode"] == "captured"
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_the_caller_has_its_stream_back(tmp_path: Path) -> None:
    torch.cuda.set_stream(torch.cuda.default_stream())  # other tests have left another one
    before = torch.cuda.current_stream()
    config = evolve(RECIPES["smoke"](), max_steps=5, min_accuracy=None, pictures=False)
    for name in ("first", "second"):
        assert train_run(evolve(config, run_dir=str(tmp_path / name))).record.step_mode == "captured"
        assert torch.cuda.current_stream() == before


@pytest.mark.launch
@pytest.mark.parametrize("recipe", ["fast", "mycnn"])
def test_two_ranks_replay_their_eager_steps(tmp_path: Path, recipe: str) -> None:
    """With NCCL, on one GPU: NCCL_HOSTID makes it believe in two machines, which it connects by sockets."""
    arguments = [*FIXED, "--recipe", recipe, "--max-steps", "12", "--eval-every", "5"]
    arguments += ["--global-batch-size", "6000"]  # the 11th step is the short one of the pass
    command = [str(ROOT / "launch" / "multi_node.sh"), *arguments]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = {}
    for mode in ("captured", "eager"):
        shared = {"PATH": path, "NNODES": "2", "NPROC_PER_NODE": "1", "RUN_DIR": mode, "NCCL_SOCKET_IFNAME": "lo"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [{**shared, "NODE_RANK": str(rank), "NCCL_HOSTID": f"machine{rank}"} for rank in range(2)]
        outputs = together([[*command, "--step-mode", mode]] * 2, ranks, tmp_path)
        assert "UserWarning" not in "".join(outputs)
        found[mode] = read(tmp_path / mode)
    (captured, replayed), (eager, expected) = found["captured"], found["eager"]
    assert (captured["step_mode"], captured["world_size"]) == ("captured", 2)
    assert captured["test"] == eager["test"]
    assert all(torch.equal(replayed[name], value) for name, value in expected.items())
