"""Shared set-up: one thread, no accounts, no network, a fresh Accelerate in every test."""

from __future__ import annotations

import os

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

for name in [name for name in os.environ if name.startswith(("WANDB_", "ACCELERATE_", "MNIST_MIRROR"))]:
    del os.environ[name]
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["NETRC"] = os.devnull
torch.set_num_threads(1)  # also what makes forking safe


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """Accelerate keeps its state in singletons."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()
