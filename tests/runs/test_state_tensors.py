from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from mnist.config import OptimConfig, TrainConfig, evolve, to_flat
from mnist.errors import RunError
from mnist.runs.checkpoint_files import load_newest, save_checkpoint
from mnist.runs.state_tensors import check_fits, module_tensors, optimizer_tensors, restore_optimizer
from mnist.training.optim import build_optimizer
from tests.networks import mnist_model
from tests.runs.test_damaged_checkpoints import make_checkpoint


@pytest.mark.parametrize("kind", ["adam", "adamw", "adadelta", "sgd"])
def test_a_restored_optimizer_continues_bit_for_bit(kind: str) -> None:
    """Channels-last weights included: fused kernels take equal layouts of weight and moments for granted."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(step))
            model(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    config = OptimConfig(optimizer=kind, lr=0.01, momentum=0.9, nesterov=True)  # type: ignore[arg-type]
    torch.manual_seed(0)
    whole = mnist_model("tinynet")
    optimizer = build_optimizer(whole.parameters(), config)
    train(whole, optimizer, range(3))
    saved = {k: v.clone() for k, v in module_tensors(whole).items()}
    moments = {k: v.clone().contiguous() for k, v in optimizer_tensors(optimizer).items()}
    train(whole, optimizer, range(3, 6))
    resumed = mnist_model("tinynet")
    resumed.load_state_dict(saved)
    optimizer = build_optimizer(resumed.parameters(), config)
    restore_optimizer(optimizer, moments)
    train(resumed, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(model="tinynet", optimizer="sgd"),
        OptimConfig(model="tinynet", optimizer="sgd", momentum=0.9),
        OptimConfig(model="tinynet", optimizer="adam"),
        OptimConfig(model="lenet5", optimizer="adamw"),
        OptimConfig(model="convnet", optimizer="adadelta"),
    ],
    ids=lambda config: f"{config.optimizer} {config.momentum}",
)
def test_saved_tensors_fit_the_objects_that_they_are_from(tmp_path: Path, config: OptimConfig) -> None:
    size = 32 if config.model == "lenet5" else 28
    model = mnist_model(config.model)
    optimizer = build_optimizer(model.parameters(), config)
    fresh = build_optimizer(model.parameters(), config)
    model(torch.rand(4, 1, size, size)).square().mean().backward()
    optimizer.step()
    saved = make_checkpoint(3, model, optimizer, copy.deepcopy(model))
    names = {name: getattr(config, name) for name in ("model", "optimizer", "momentum")}
    saved.config = to_flat(evolve(TrainConfig(), image_size=size, **names))
    save_checkpoint(tmp_path, saved, 1, 0)
    found, _ = load_newest(tmp_path, lambda found: check_fits(found, model, fresh, model))
    assert found is not None
    with pytest.raises(RunError, match=r"no valid checkpoint .* ema.* must be missing"):
        load_newest(tmp_path, lambda found: check_fits(found, model, fresh, None))
