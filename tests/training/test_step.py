from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mnist.config import DataConfig, ImageConfig, OptimConfig, RuntimeConfig, evolve
from mnist.data.batches import Split, TrainLoader
from mnist.data.datasets import read
from mnist.data.transforms import Augmentation, BatchTransform
from mnist.models import seed_initial_weights
from mnist.recipes import RECIPES
from mnist.runs.records import check_record
from mnist.system.accelerator import build_accelerator, prepare_optimizer
from mnist.training.build import build_train_step
from mnist.training.evaluation import evaluate
from mnist.training.loop import TrainState, train_one_epoch
from mnist.training.losses import build_loss
from mnist.training.metrics import METRICS, TrainSums
from mnist.training.optim import LearningRate, WeightAverage, build_optimizer
from mnist.training.step import DivergedError, TrainStep, warm_up
from tests.networks import INFO, mnist_model
from tests.ranks import run_ranks

EVERYTHING = read("digits", DataConfig())
DIGITS = dataclasses.replace(EVERYTHING, train=EVERYTHING.train[:1_437])  # each image once


def make_step(
    *,
    batch: int = 64,
    accumulation: int = 1,
    dtype: torch.dtype = torch.float32,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    model: nn.Module | None = None,
    cpu: bool = True,
    capturable: bool = False,
    average: float = 0.0,
    **optim: Any,
) -> tuple[TrainStep, TrainLoader]:
    """A training step on the embedded digits with the small network, and its loader, for this rank."""
    accelerator = build_accelerator(RuntimeConfig(cpu=cpu, num_threads=1, deterministic=not cpu))
    config = OptimConfig(**{"optimizer": "adam", "lr": 1e-3, **optim})
    seed_initial_weights(0)
    bare = (model or mnist_model("tinynet")).to(accelerator.device, dtype)
    optimizer = prepare_optimizer(accelerator, build_optimizer(bare.parameters(), config, capturable=capturable))
    wrapped = accelerator.prepare_model(bare)
    transform = BatchTransform(ImageConfig())
    step = TrainStep(
        accelerator=accelerator,
        model=wrapped,
        bare_model=bare,
        optimizer=optimizer,
        learning_rate=LearningRate(optimizer, config, 100, 10),
        loss_fn=loss_fn or build_loss("cross_entropy"),
        transform=lambda images: transform(images).to(dtype),
        augment=Augmentation(ImageConfig(rotation=10, translation=0.1), 0, accelerator.device),
        grad_clip=config.grad_clip,
        average=WeightAverage(accelerator.unwrap_model(wrapped), average) if average else None,
    )
    loader = TrainLoader(
        DIGITS.train.to(accelerator.device),
        global_batch_size=batch,
        seed=0,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulation_steps=accumulation,
    )
    warm_up(wrapped, torch.zeros(8, 1, 28, 28, dtype=dtype, device=accelerator.device))
    return step, loader


def train(num_steps: int, pauses_at: Callable[[int], bool] = lambda step: False, **options: Any) -> dict[str, Any]:
    """Trains; returns weights, records and state."""
    step, loader = make_step(**options)
    state = TrainState()
    records = list(train_one_epoch(step, loader.steps(0, num_steps), state, pauses_at=pauses_at))
    weights = {k: v.clone() for k, v in step.accelerator.unwrap_model(step.model).state_dict().items()}
    return {"weights": weights, "records": records, "state": state}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 2), (3, 1), (2, 3)])
def test_processes_and_accumulation_do_not_change_the_mathematics(world_size: int, accumulation: int) -> None:
    """100 steps through short last batches (1,437 = 22 x 64 + 29), in float64, where only the order of sums differs."""
    options = {"dtype": torch.float64, "grad_clip": 1.0}
    alone = train(100, **options)["weights"]
    for rank in run_ranks(lambda: train(100, accumulation=accumulation, **options)["weights"], world_size):
        assert largest_difference(alone, rank) < 1e-10


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 2)])
def test_in_fp32_twenty_steps_agree_to_the_fifth_digit(world_size: int, accumulation: int) -> None:
    alone = train(20)["weights"]
    for rank in run_ranks(lambda: train(20, accumulation=accumulation)["weights"], world_size):
        assert largest_difference(alone, rank) < 1e-5


def test_a_rank_without_images_changes_nothing() -> None:
    """1,437 images in batches of 359 leave a last batch of one image for three ranks."""
    alone = train(5, batch=359, dtype=torch.float64)["weights"]
    for rank in run_ranks(lambda: train(5, batch=359, dtype=torch.float64)["weights"], 3):
        assert largest_difference(alone, rank) < 1e-12


def test_the_gradient_of_a_step_is_that_of_the_mean_loss() -> None:
    step, loader = make_step(batch=30, accumulation=4, optimizer="sgd", lr=1.0)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    (micro_batches,) = list(loader.steps(0, 1))
    step(micro_batches, 0)
    reference = mnist_model("tinynet")
    reference.load_state_dict(before)
    images = torch.cat([step.augment(b.images, 0, b.rows) for b in micro_batches])
    loss = nn.functional.cross_entropy(reference(step.transform(images)), torch.cat([b.labels for b in micro_batches]))
    loss.backward()
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(step.model.state_dict()[name], before[name] - parameter.grad, atol=1e-6, rtol=1e-5)


def test_records_are_sums_divided_once() -> None:
    """Records at steps 10 and 23; together they cover the pass of 1,437 images with its short last batch."""
    records = train(23, pauses_at=lambda step: step in (10, 23))["records"]
    assert [(r.step, r.sums.num_samples) for r in records] == [(10, 640), (23, 797)]
    shared = run_ranks(lambda: train(23, pauses_at=lambda step: step in (10, 23))["records"], 2)
    for rank in shared:
        for ours, theirs in zip(records, rank, strict=True):
            assert ours.sums.num_samples == theirs.sums.num_samples
            assert ours.sums.means() == pytest.approx(theirs.sums.means(), abs=1e-5)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)
            assert ours.lr == theirs.lr


class HostReads(TorchDispatchMode):
    """Collects operations whose result the host needs at once: on a GPU it waits for the device at each of them."""

    SYNCHRONISE = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        has_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.SYNCHRONISE or has_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_of_this_recipe_never_waits_for_the_device(recipe: str) -> None:
    """With clipping or the gradient norm, an average of the weights, and a short batch at the end of a pass."""
    config = evolve(RECIPES[recipe](), ema=0.9)
    accelerator = build_accelerator(RuntimeConfig(cpu=True, num_threads=1))
    step = build_train_step(config, accelerator, INFO)
    loader = TrainLoader(DIGITS.train[:250], global_batch_size=100, seed=0)
    steps = list(loader.steps(0, 3))
    with HostReads() as reads:
        for number, micro_batches in enumerate(steps):
            step(micro_batches, number, measure_grad_norm=True)
        assert reads.found == []
        assert float(step.sums[-1]) == 3.0
    assert reads.found == ["_local_scalar_dense"]


def stop_on_rank(rank_to_stop: int, at_step: int) -> TrainState:
    step, loader = make_step()
    state = TrainState()
    mine = step.accelerator.process_index == rank_to_stop
    epoch = train_one_epoch(
        step,
        loader.steps(0, 500),
        state,
        pauses_at=lambda s: s % 100 == 0,
        heartbeat=lambda: mine and state.step >= at_step,
    )
    list(epoch)
    return state


@pytest.mark.parametrize("rank_to_stop", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(rank_to_stop: int) -> None:
    first, second = run_ranks(lambda: stop_on_rank(rank_to_stop, 30), 2)
    assert first == second
    assert first.is_stopping
    assert 30 <= first.step < 500
    assert first.interval_sums.num_samples > 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_record_after_a_resume_has_the_sums_of_the_whole_interval(world_size: int) -> None:
    """Stopped after 7 of 10 steps, the state as a checkpoint holds it, and resumed on `world_size` ranks."""

    def train_again(saved: dict[str, Any]) -> tuple[TrainSums, TrainSums]:
        step, loader = make_step(optimizer="sgd", lr=1e-30)
        state = check_record(Path("state"), json.loads(json.dumps(saved)), TrainState)
        (record,) = train_one_epoch(step, loader.steps(state.step, 10), state, pauses_at=lambda s: s == 10)
        return record.sums, state.run_sums

    (whole,) = train(10, pauses_at=lambda s: s == 10, optimizer="sgd", lr=1e-30)["records"]
    step, loader = make_step(optimizer="sgd", lr=1e-30)
    state = TrainState()
    stopped = train_one_epoch(
        step, loader.steps(0, 10), state, pauses_at=lambda s: s == 10, heartbeat=lambda: state.step == 7
    )
    assert list(stopped) == []
    saved = {**dataclasses.asdict(state), "is_stopping": False}
    assert (saved["step"], saved["interval_sums"]["num_samples"]) == (7, 7 * 64)
    for interval, run in run_ranks(lambda: train_again(saved), world_size):
        assert interval.num_samples == run.num_samples == 640
        assert interval.totals == pytest.approx(whole.sums.totals, rel=1e-6)
        assert interval.time_s > saved["interval_sums"]["time_s"]


def test_a_new_metric_is_one_line_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "ones", lambda _loss_sum, _logits, labels: (labels == 1).sum())
    done = train(23, pauses_at=lambda s: s in (10, 23), batch=64)
    means = [record.sums.means() for record in done["records"]]
    assert [list(mean) for mean in means] == [[*METRICS]] * 2
    ones = int((DIGITS.train.labels == 1).sum())
    assert done["state"].run_sums.totals["ones"] == ones
    assert dataclasses.asdict(done["state"])["epoch_sums"]["totals"]["ones"] == ones


def diverge(bad_rank: int, bad_step: int) -> tuple[int, int]:
    calls = 0

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses * float("nan") if calls == bad_step and step.rank == bad_rank else losses

    step, loader = make_step(loss_fn=loss_fn)
    try:
        list(train_one_epoch(step, loader.steps(0, 60), TrainState(), pauses_at=lambda s: s == 60))
    except DivergedError as error:
        return error.step, error.rank
    raise AssertionError("nobody noticed")


@pytest.mark.parametrize(("bad_rank", "bad_step"), [(0, 1), (1, 1), (1, 17)])
def test_a_loss_of_nan_is_named_by_step_and_rank_on_all_ranks(bad_rank: int, bad_step: int) -> None:
    assert run_ranks(lambda: diverge(bad_rank, bad_step), 2) == [(bad_step, bad_rank)] * 2


def score(num_samples: int, sharded: bool, model_name: str = "tinynet") -> tuple[float, Any]:
    accelerator = build_accelerator(RuntimeConfig(cpu=True, num_threads=1))
    seed_initial_weights(0)
    model = mnist_model(model_name)
    if accelerator.process_index > 0:  # as after a training step: buffers of ranks differ, rank 0's count
        for buffer in model.buffers():
            buffer.add_(1)
    everything = Split(
        torch.cat([DIGITS.train.images, DIGITS.test.images]).repeat(2, 1, 1),
        torch.cat([DIGITS.train.labels, DIGITS.test.labels]).repeat(2),
    )
    split = everything[:num_samples]
    options = {"loss_fn": build_loss("cross_entropy"), "transform": BatchTransform(ImageConfig())}
    scores = evaluate(model, split, num_classes=INFO.num_classes, accelerator=accelerator, sharded=sharded, **options)  # type: ignore[arg-type]
    return scores.loss, scores.confusion


@pytest.mark.parametrize("num_samples", [1, 999, 1000, 1001, 3594])
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_image_is_counted_once_in_both_modes(num_samples: int, world_size: int) -> None:
    alone = score(num_samples, sharded=False)
    assert sum(map(sum, alone[1])) == num_samples
    for sharded in (False, True):
        assert run_ranks(lambda sharded=sharded: score(num_samples, sharded), world_size) == [alone] * world_size


def test_sharded_evaluation_uses_the_batch_norm_statistics_of_rank_0() -> None:
    alone = score(3594, sharded=False, model_name="mycnn")
    assert run_ranks(lambda: score(3594, True, "mycnn"), 2) == [alone] * 2


def test_warming_up_leaves_no_trace() -> None:
    step, _ = make_step(model=mnist_model("mycnn"))
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    warm_up(step.model, torch.rand(8, 1, 28, 28))
    assert all(torch.equal(before[name], value) for name, value in step.model.state_dict().items())
    assert all(parameter.grad is None for parameter in step.model.parameters())
    assert not step.optimizer.state_dict()["state"]
