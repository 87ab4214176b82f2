"""Traps of Accelerate that this project avoids: what ours does, and what Accelerate does.

The latter so that an upgrade which changes it is noticed. Names carry the thread in which others met the trap (in
Accelerate's tracker, unless they say transformers).
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.tracking import GeneralTracker
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mnist.config import RuntimeConfig
from mnist.data.batches import TrainLoader
from mnist.errors import UserError
from mnist.runs.checkpoint_files import load_checkpoint
from mnist.system.accelerator import build_accelerator
from mnist.training.evaluation import evaluate
from mnist.training.loop import TrainState, train_one_epoch
from mnist.training.losses import build_loss
from tests.networks import INFO
from tests.processes import CONFIGURED, ROOT, TORCHRUN, finish
from tests.ranks import run_ranks
from tests.training.test_step import DIGITS, make_step

COUNT = (
    "from accelerate import Accelerator; print(f'processes {Accelerator().num_processes}\\n', end='')"  # in one piece
)


def seedable(seed: int, accelerator: Accelerator | None = None) -> Any:
    """A loader of 0..19 in batches of 4, prepared as the documentation has it."""
    torch.manual_seed(seed)
    config = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed)
    accelerator = accelerator or Accelerator(cpu=True, dataloader_config=config)
    return accelerator.prepare(DataLoader(TensorDataset(torch.arange(20)), batch_size=4, shuffle=True))


def numbers(loader: Any) -> list[int]:
    return [int(number) for (batch,) in loader for number in batch]


def our_order(seed: int, epoch: int) -> list[int]:
    order: list[int] = TrainLoader(DIGITS.train, global_batch_size=64, seed=seed).order(epoch).tolist()
    return order


def test_seeds_and_epochs_are_not_added_up() -> None:
    theirs = seedable(7), seedable(8)
    theirs[0].set_epoch(1)
    theirs[1].set_epoch(0)
    assert numbers(theirs[0]) == numbers(theirs[1]), "Accelerate: seed 7, epoch 1 is seed 8, epoch 0"
    orders = [our_order(seed, epoch) for seed in (7, 8, 9) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 9


def test_accelerate_issue_3996_a_resumed_run_does_not_replay_the_first_epoch() -> None:
    uninterrupted = seedable(0)
    first, second = numbers(uninterrupted), numbers(uninterrupted)
    assert first != second
    assert numbers(seedable(0)) == first, "Accelerate: a loader made anew for epoch 1 shows epoch 0"
    loader = TrainLoader(DIGITS.train, global_batch_size=64, seed=0)
    whole = [batch.labels.tolist() for micro in loader.steps(0, 60) for batch in micro]
    anew = TrainLoader(DIGITS.train, global_batch_size=64, seed=0)
    assert [batch.labels.tolist() for micro in anew.steps(31, 60) for batch in micro] == whole[31:]


def test_accelerate_issue_2016_the_epoch_after_a_skip_has_an_order_of_its_own() -> None:
    loader = seedable(0)
    rest = numbers(skip_first_batches(loader, 2))
    assert numbers(loader)[8:] == rest, "Accelerate: the next epoch repeats the permutation"
    assert our_order(0, 0) != our_order(0, 1)


def _their_rate_after_one_step() -> float:
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    scheduler.step()
    return float(scheduler.get_last_lr()[0])


def _our_rates() -> list[float]:
    step, loader = make_step(schedule="exponential", gamma=0.5, decay_epochs=0.1)
    state = TrainState()
    return [record.lr for record in train_one_epoch(step, loader.steps(0, 4), state, pauses_at=lambda _: True)]


def test_accelerate_issue_2926_a_schedule_does_not_run_faster_on_more_processes() -> None:
    assert run_ranks(_their_rate_after_one_step, 1) == [0.5]
    assert run_ranks(_their_rate_after_one_step, 2) == [0.25] * 2, "Accelerate: two steps for one call"
    assert (
        run_ranks(_our_rates, 2)[0] == run_ranks(_our_rates, 1)[0] == pytest.approx([1e-3 * 0.5**k for k in range(4)])
    )


def _weights_after_an_epoch(accumulation: int) -> torch.Tensor:
    step, loader = make_step(batch=100, accumulation=accumulation, dtype=torch.float64)  # the last batch has 37
    for _ in train_one_epoch(step, loader.steps(0, loader.epoch_steps), TrainState(), pauses_at=lambda _: False):
        pass
    return torch.cat([p.detach().flatten() for p in step.model.parameters()])


def test_transformers_issue_38837_a_short_last_window_weighs_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    weight = nn.Parameter(torch.ones(1))
    accelerator.backward(weight.sum())  # the only micro-batch of a last window
    assert weight.grad is not None
    assert float(weight.grad) == 0.25, "Accelerate: always divides by the number asked for"
    (once,), (in_parts,) = run_ranks(_weights_after_an_epoch, 1, 1), run_ranks(_weights_after_an_epoch, 1, 8)
    torch.testing.assert_close(once, in_parts, rtol=0, atol=1e-10)


def test_the_environment_does_not_change_what_backward_divides_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    ours = build_accelerator(RuntimeConfig(cpu=True, num_threads=1))
    assert ours.gradient_accumulation_steps == 1
    weight = nn.Parameter(torch.ones(1))
    ours.backward(weight.sum())
    assert weight.grad is not None
    assert float(weight.grad) == 1.0


def _gathered() -> int:
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(10)), batch_size=2))
    return sum(len(accelerator.gather(batch)) for (batch,) in loader)


def _scored(sharded: bool) -> int:
    step, _ = make_step()
    bare = step.accelerator.unwrap_model(step.model)
    return evaluate(
        bare,
        DIGITS.train,
        num_classes=INFO.num_classes,
        accelerator=step.accelerator,
        loss_fn=build_loss("cross_entropy"),
        transform=step.transform,
        sharded=sharded,
    ).num_samples


def test_accelerate_issue_226_every_sample_counts_once_on_three_processes() -> None:
    assert run_ranks(_gathered, 3) == [12] * 3, "Accelerate: 10 samples become 12"
    assert run_ranks(_scored, 3, True) == [len(DIGITS.train)] * 3


def test_accelerate_issue_3861_rank_0_evaluates_alone_without_waiting_for_the_others() -> None:
    assert run_ranks(_scored, 2, False) == [len(DIGITS.train)] * 2


def test_accelerate_issue_3306_checkpoints_are_named_by_step(tmp_path: Path, smoke_run: Path) -> None:
    def save() -> list[str]:
        project = ProjectConfiguration(project_dir=str(tmp_path), automatic_checkpoint_naming=True)
        accelerator = Accelerator(cpu=True, project_config=project)
        accelerator.prepare(nn.Linear(1, 1))
        accelerator.save_state()
        return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    assert save() == ["checkpoint_0"]
    with pytest.raises(ValueError, match="already exists"):
        save()  # Accelerate: a resumed process starts to count at 0 again
    steps = [load_checkpoint(path).step for path in sorted((smoke_run / "checkpoints").iterdir())]
    assert steps == [343]


class Payload:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))

    def state_dict(self) -> Any:
        return self

    def load_state_dict(self, state: Any) -> None:
        pass


def test_a_checkpoint_is_data_and_never_code(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(Payload(tmp_path / "trace"))
    accelerator.save_state(str(tmp_path / "theirs"))
    accelerator.load_state(str(tmp_path / "theirs"))
    assert (tmp_path / "trace").exists(), "Accelerate: custom objects are unpickled"
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "theirs" / "custom_checkpoint_0.pkl", weights_only=True)
    # What ours does with a pickle in its place: test_faults::test_a_pickle_in_a_checkpoint_is_never_executed.


def test_accelerate_issue_2846_looking_below_the_wrapper_leaves_mixed_precision_on() -> None:
    accelerator = build_accelerator(RuntimeConfig(cpu=True, mixed_precision="bf16", num_threads=1))
    model = nn.Sequential(nn.Linear(2, 2))
    prepared = accelerator.prepare(model)
    bare = accelerator.unwrap_model(prepared, keep_torch_compile=False)  # as train_ddp.py does

    def inner_dtype() -> torch.dtype:
        seen = []
        handle = model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        bare(torch.ones(1, 2))
        handle.remove()
        return seen[0]

    assert inner_dtype() == torch.bfloat16
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert inner_dtype() == torch.float32, "Accelerate: autocast is gone from the live model"


def test_half_precision_that_a_cpu_does_not_have_is_refused() -> None:
    model = Accelerator(cpu=True, mixed_precision="fp16").prepare(nn.Linear(2, 2))
    assert model(torch.ones(1, 2)).dtype == torch.float32, "Accelerate: trains in fp32 and says nothing"
    with pytest.raises(UserError, match="fp16: needs a GPU"):
        build_accelerator(RuntimeConfig(cpu=True, mixed_precision="fp16"))


def test_a_tracker_of_another_rank_knows_no_images() -> None:
    assert not hasattr(GeneralTracker(_blank=True), "log_images")  # Accelerate: what get_tracker returns there


@pytest.mark.launch
def test_two_processes_on_a_cpu_are_one_each_for_accelerate(tmp_path: Path) -> None:
    """Ours are two: `test_launch::test_every_launcher_ends_with_the_right_world_size`."""
    (tmp_path / "count.py").write_text(COUNT)
    theirs = finish([*TORCHRUN, "--nproc-per-node", "2", "count.py"], tmp_path, OMP_NUM_THREADS="1")
    assert theirs.out.count("processes 1") == 2, "Accelerate: each rank believes that it is alone"


@pytest.mark.launch
def test_the_cpu_flag_of_the_launcher_starts_one_process(tmp_path: Path) -> None:
    (tmp_path / "count.py").write_text(COUNT)
    launch = [*CONFIGURED[: CONFIGURED.index("--config_file")], "--cpu", "--num_processes", "2"]
    theirs = finish([*launch, "count.py"], tmp_path)
    assert theirs.out.split() == ["processes", "1"], "Accelerate: two were asked for"
    assert "`launch --cpu --num_processes 2` starts one process" in (ROOT / "README.md").read_text()
