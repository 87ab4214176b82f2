from __future__ import annotations

import pytest
import torch
from torch import nn

from mnist.config import OptimConfig
from mnist.runs.state_tensors import module_tensors, optimizer_tensors, restore_optimizer
from mnist.training.optim import build_optimizer
from tests.networks import mnist_model


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
