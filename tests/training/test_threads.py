from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mnist.runs import run as run_module
from mnist.training import threads
from mnist.training.threads import advise_on_threads
from tests.networks import mnist_model
from tests.ranks import run_ranks
from tests.runs.test_run import SMALL, run


@pytest.fixture(autouse=True)
def two_threads() -> object:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def advise(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> str | None:
    monkeypatch.setattr(threads, "_time_pass", lambda *_: seconds[torch.get_num_threads()])
    return advise_on_threads(nn.Linear(4, 4), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ({2: 0.5, 1: 1.0}, None),
        ({2: 1.2, 1: 1.0}, None),
        ({2: 4.8, 1: 1.0}, "2 threads are 4.8 times slower than one here, now: add --num-threads 1"),
    ],
)
def test_threads_that_are_slower_than_one_by_30_percent_are_named(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], words: str | None
) -> None:
    assert advise(monkeypatch, seconds) == words
    assert torch.get_num_threads() == 2


def test_one_thread_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    assert advise(monkeypatch, {}) is None


def test_measuring_changes_neither_weights_nor_buffers_nor_gradients() -> None:
    def measure() -> None:  # in a process of its own: this one must not start threads, or its later forks could not
        model = mnist_model("mycnn").train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        advise_on_threads(model, torch.zeros(8, 1, 28, 28))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    run_ranks(measure, 1)


def test_a_run_passes_the_advice_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "advise_on_threads", lambda *_: "add --num-threads 1")
    assert run_ranks(run, 1, tmp_path, *SMALL, "--max-steps", "2", "--min-accuracy", "None") == [0]
    assert "warning  add --num-threads 1" in capfd.readouterr().err
