"""Shared set-up: one thread, no accounts, no network, no GPU, a fresh Accelerate in every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from mnist.system.process import num_usable_cores
from tests.processes import finish, train

for name in [name for name in os.environ if name.startswith(("WANDB_", "ACCELERATE_", "MNIST_MIRROR"))]:
    del os.environ[name]
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["NETRC"] = os.devnull
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and what they start, ignore it
torch.set_num_threads(1)  # also what makes forking safe


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs, except from the tests that are about them.

    What the others show must not depend on the machine; and ranks that are forked cannot train once torch has one.
    """
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_xdist_auto_num_workers() -> int:
    """As many workers as cores that may be used, which its own count does not ask; a test starts up to 4 processes."""
    return min(8, num_usable_cores())


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """No test hands variables to the next: W&B's agent, for one, sets WANDB_DIR, which every later job would follow."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """Accelerate keeps its state in singletons."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `smoke`, made by the real command; to be read only."""
    folder = tmp_path_factory.mktemp("smoke")
    done = finish(train("--recipe", "smoke", "--num-threads", "1", "--run-dir", "run"), folder)
    assert done.code == 0, done.err
    return folder / "run"
