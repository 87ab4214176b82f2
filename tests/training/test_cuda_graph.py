"""The recording itself needs a CUDA GPU (test_gpu.py); buffers, seeds and what is left behind are the same on a CPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mnist.config import OptimConfig
from mnist.errors import RunError
from mnist.training import cuda_graph
from mnist.training.cuda_graph import CapturedStep, CaptureError, choose_step_mode, reason_not_capturable
from mnist.training.loop import TrainState, train_one_epoch
from mnist.training.optim import OPTIMIZERS as OPTIMIZER_TABLE
from mnist.training.step import TrainStep
from tests.ranks import run_ranks
from tests.training.test_step import make_step


def recorder(step: TrainStep) -> cuda_graph.Record:
    """Stands in for graphs: replays by doing the work again, into the same memory."""

    def record(work: Callable[[], object]) -> Callable[[], None]:
        work()
        written = step.grad_norm  # a tensor where this work measures it

        def replay() -> None:
            bound = step.grad_norm
            work()
            if isinstance(written, torch.Tensor) and step.grad_norm is not bound:
                written.copy_(torch.as_tensor(step.grad_norm))
            step.grad_norm = bound  # a graph knows nothing of Python's names

        return replay

    return record


def weights(step: TrainStep) -> torch.Tensor:
    modules = [step.model, *([step.average.module] if step.average else [])]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())] + [step.sums]
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def train(step: TrainStep, loader: Any, stop: int) -> list[Any]:
    return [
        (record.sums.means(), record.grad_norm, record.lr)
        for record in train_one_epoch(step, loader.steps(0, stop), TrainState(), pauses_at=lambda s: s % 5 == 0)
    ]


OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "adamw", "schedule": "one_cycle", "warmup": 0.3, "grad_clip": 0.5},
    {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    {"optimizer": "adadelta", "lr": 1.0},
]


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda optim: optim["optimizer"])
def test_a_replayed_run_is_the_eager_one(optim: dict[str, Any]) -> None:
    eager, loader = make_step(batch=100, model=network(), average=0.9, **optim)  # the last batch of a pass has 37
    replayed, _ = make_step(batch=100, model=network(), average=0.9, **optim)
    before = weights(replayed)
    both_sizes = [next(loader.steps(number, number + 1))[0] for number in (0, 14)]
    captured = CapturedStep(replayed, both_sizes, recorder(replayed))
    assert torch.equal(weights(replayed), before), "capturing leaves no trace"
    replayed.replay = captured
    assert train(replayed, loader, 20) == train(eager, loader, 20)
    assert torch.equal(weights(replayed), weights(eager))


def network() -> torch.nn.Sequential:
    """Batch norm and dropout: buffers, and random numbers inside the network."""
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 5, stride=3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(256, 10),
    )


def test_a_step_in_the_middle_of_a_run_can_be_captured() -> None:
    eager, loader = make_step(batch=64, optimizer="adamw")
    replayed, _ = make_step(batch=64, optimizer="adamw")
    for step in (eager, replayed):
        train(step, loader, 10)
    replayed.replay = CapturedStep(replayed, [next(loader.steps(0, 1))[0]], recorder(replayed))
    for step in (eager, replayed):
        for number, micro_batches in enumerate(loader.steps(10, 20), start=10):
            step(micro_batches, number)
    assert torch.equal(weights(replayed), weights(eager))


@pytest.mark.parametrize(("mode", "is_warned"), [("auto", False), ("eager", False), ("captured", True)])
def test_on_a_cpu_steps_are_eager_and_only_captured_warns(mode: str, is_warned: bool) -> None:
    step, loader = make_step()
    used, warning = choose_step_mode(step, mode, 1, loader)
    assert used == "eager"
    assert warning == ("--step-mode captured needs a CUDA GPU: steps are eager" if is_warned else None)
    assert step.replay is None


def test_the_reason_why_a_step_cannot_be_captured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, model = make_step()[0].accelerator, network()
    monkeypatch.setattr(type(accelerator), "device", torch.device("cuda"))
    assert reason_not_capturable(accelerator, model, torch.optim.AdamW, 1) is None
    assert "one micro-batch" in (reason_not_capturable(accelerator, model, torch.optim.AdamW, 2) or "")
    assert "starts at zero" in (reason_not_capturable(accelerator, model, torch.optim.NAdam, 1) or "")
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert "--sync-bn" in (reason_not_capturable(accelerator, synchronised, torch.optim.AdamW, 1) or "")


@pytest.mark.parametrize("optimizer", OPTIMIZER_TABLE)
def test_the_state_of_every_optimizer_that_is_captured_starts_at_zero(optimizer: str) -> None:
    """What `restored_afterwards` relies on: a step from zeros is the first step."""
    kind, arguments = OPTIMIZER_TABLE[optimizer]
    if not issubclass(kind, cuda_graph.STARTS_AT_ZERO):
        pytest.skip("is not captured")
    results = []
    for has_zeros in (False, True):
        weight = torch.nn.Parameter(torch.ones(3))
        update = kind([weight], lr=0.1, **arguments(OptimConfig(optimizer=optimizer, momentum=0.9)))
        for number in range(4):
            if has_zeros and number == 1:
                with torch.no_grad():
                    weight.fill_(1)
                for value in update.state[weight].values():
                    value.zero_()
            weight.grad = torch.full((3,), 0.5 if number else 0.7)
            if has_zeros or number:
                update.step()
        results.append(weight.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize(("mode", "is_captured"), [("auto", True), ("eager", False), ("captured", True)])
def test_on_a_gpu_steps_are_captured_unless_eager_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, mode: str, is_captured: bool
) -> None:
    step, loader = make_step(batch=64)
    monkeypatch.setattr(cuda_graph, "reason_not_capturable", lambda *_: None)
    monkeypatch.setattr(cuda_graph, "record_cuda_graph", recorder(step))
    used, warning = choose_step_mode(step, mode, 1, loader)
    assert (used, warning) == ("captured" if is_captured else "eager", None)
    assert (step.replay is not None) is is_captured


def fails(work: Callable[[], object]) -> Callable[[], object]:
    raise CaptureError("operation not permitted when stream is capturing")


def test_where_capturing_fails_steps_are_eager_and_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    step, loader = make_step()
    monkeypatch.setattr(cuda_graph, "reason_not_capturable", lambda *_: None)
    monkeypatch.setattr(cuda_graph, "record_cuda_graph", fails)
    before = weights(step)
    cause = "capturing the step failed on rank 0 (operation not permitted when stream is capturing)"
    assert choose_step_mode(step, "captured", 1, loader) == ("eager", f"{cause}: steps are eager")
    assert torch.equal(weights(step), before)
    assert step.replay is None


def test_both_sizes_of_a_pass_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a run starts just before the short batch."""
    step, loader = make_step(batch=100)  # 15 steps a pass, the last of 37 images
    monkeypatch.setattr(cuda_graph, "reason_not_capturable", lambda *_: None)
    monkeypatch.setattr(cuda_graph, "record_cuda_graph", recorder(step))
    assert choose_step_mode(step, "captured", 1, loader) == ("captured", None)
    assert step.replay is not None
    assert [step.replay(step, batches, number) for number, batches in enumerate(loader.steps(14, 17))] == [True] * 3


def _record_fails_on_rank_1() -> str:
    step, loader = make_step(batch=100)
    cuda_graph.reason_not_capturable = lambda *_: None
    cuda_graph.record_cuda_graph = fails if step.rank else lambda work: work
    with pytest.raises(RunError) as caught:
        choose_step_mode(step, "auto", 1, loader)
    return str(caught.value)


def test_all_ranks_end_where_one_cannot_record() -> None:
    message = "capturing the step failed on rank 1 (operation not permitted when stream is capturing)"
    assert run_ranks(_record_fails_on_rank_1, 2) == [f"{message}; add --step-mode eager"] * 2


def test_a_recording_goes_with_its_step() -> None:
    """Not later, when garbage is collected: perhaps while another step is recorded."""
    step, loader = make_step(batch=100)
    step.replay = CapturedStep(step, [next(loader.steps(0, 1))[0]], lambda _: lambda: None)
    recording = weakref.ref(step.replay)
    gc.disable()
    try:
        del step
        assert recording() is None
    finally:
        gc.enable()
