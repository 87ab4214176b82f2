import dataclasses

import pytest
import torch

from mnist.config import DataConfig, TrainConfig, evolve
from mnist.data.batches import Split, TrainLoader
from mnist.data.datasets import read
from mnist.errors import UserError
from mnist.recipes import RECIPES
from mnist.training.plan import build_plan
from tests.test_recipes import OURS

MNIST = 60_000
DIGITS = 42 * 1_437  # as many as are stored


def plan_of(num_train=MNIST, world_size=1, accumulation_steps=1, **changes):
    fixed = {"global_batch_size": 256, "epochs": 2, "gradient_accumulation_steps": accumulation_steps}
    return build_plan(evolve(TrainConfig(), **(fixed | changes)), num_train, world_size)


def steps_where(plan, predicate):
    return [step for step in range(1, plan.num_steps + 1) if predicate(step)]


@pytest.mark.parametrize(
    ("num_train", "changes", "epoch_steps", "num_steps"),
    [
        (MNIST, {}, 235, 470),
        (MNIST, {"global_batch_size": 60_000}, 1, 2),
        (MNIST, {"global_batch_size": 250}, 240, 480),
        (MNIST - 5_000, {"val_size": 5_000}, 215, 430),
        (DIGITS, {}, 236, 472),
        (1_437, {}, 6, 12),
        (MNIST, {"max_steps": 100}, 235, 100),
        (MNIST, {"max_steps": 300}, 235, 300),
        (MNIST, {"max_steps": 1000}, 235, 470),
        (DIGITS, {"max_steps": 20}, 236, 20),
    ],
)
def test_the_length_of_a_run(num_train, changes, epoch_steps, num_steps):
    plan = plan_of(num_train, **changes)
    assert (plan.epoch_steps, plan.num_steps) == (epoch_steps, num_steps)


@pytest.mark.parametrize("recipe", OURS)
def test_a_recipe_is_as_long_on_the_digits_as_on_mnist_to_1_percent(recipe):
    config, num_train = RECIPES[recipe](), len(read("digits", DataConfig()).train)
    on_mnist, on_digits = (build_plan(config, size, 1).num_steps for size in (MNIST, num_train))
    assert on_mnist <= on_digits <= 1.01 * on_mnist


@pytest.mark.parametrize("batch", [256, 250, 60_000])
def test_an_epoch_is_as_long_as_the_loader_says(batch):
    split = Split(torch.zeros(MNIST, 1, 1, dtype=torch.uint8), torch.zeros(MNIST, dtype=torch.int64))
    loader = TrainLoader(split, global_batch_size=batch, seed=0)
    assert plan_of(global_batch_size=batch).epoch_steps == loader.epoch_steps


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_the_length_and_the_batch_do_not_depend_on_the_number_of_ranks(world_size, accumulation_steps):
    plan = plan_of(world_size=world_size, accumulation_steps=accumulation_steps)
    assert dataclasses.replace(plan, world_size=1, accumulation_steps=1) == plan_of()
    assert (plan.world_size, plan.accumulation_steps) == (world_size, accumulation_steps)


@pytest.mark.parametrize(
    ("world_size", "accumulation_steps", "micro_batch_size"),
    [(1, 1, 256), (2, 1, 128), (3, 1, 86), (2, 3, 43), (256, 1, 1)],
)
def test_the_micro_batch_is_the_largest_share(world_size, accumulation_steps, micro_batch_size):
    assert plan_of(world_size=world_size, accumulation_steps=accumulation_steps).micro_batch_size == micro_batch_size


@pytest.mark.parametrize(
    ("num_train", "changes", "words"),
    [
        (MNIST, {}, "470 steps, 2 epochs"),
        (MNIST, {"epochs": 1}, "235 steps, 1 epoch"),
        (MNIST, {"epochs": 10}, "2,350 steps, 10 epochs"),
        (DIGITS, {}, "472 steps, 2 epochs"),
        (DIGITS, {"max_steps": 59}, "59 steps, 0.25 epochs"),
        (MNIST, {"epochs": 1000}, "235,000 steps, 1,000 epochs"),
    ],
)
def test_the_length_is_told_in_words(num_train, changes, words):
    assert plan_of(num_train, **changes).describe_length() == words


SHORT = {"num_train": 20, "global_batch_size": 5, "epochs": 2}


@pytest.mark.parametrize(
    ("changes", "evaluations", "checkpoints", "pauses"),
    [
        ({"log_every": 0}, [4, 8], [4, 8], [4, 8]),
        ({"log_every": 3}, [4, 8], [4, 8], [3, 4, 6, 8]),
        ({"log_every": 0, "eval_every": 3}, [3, 4, 6, 8], [4, 8], [3, 4, 6, 8]),
        ({"log_every": 0, "checkpoint_every": 3}, [4, 8], [3, 6, 8], [3, 4, 6, 8]),
        ({"log_every": 0, "checkpoint_every": 100}, [4, 8], [8], [4, 8]),
        ({"log_every": 100, "eval_every": 100}, [4, 8], [4, 8], [4, 8]),
        ({"log_every": 0, "max_steps": 6}, [4, 6], [4, 6], [4, 6]),
        ({"log_every": 0, "max_steps": 1}, [1], [1], [1]),
        ({"log_every": 1, "max_steps": 3}, [3], [3], [1, 2, 3]),
    ],
)
def test_what_happens_after_which_step(changes, evaluations, checkpoints, pauses):
    plan = plan_of(**SHORT, **changes)
    assert steps_where(plan, plan.evaluates_at) == evaluations
    assert steps_where(plan, plan.saves_at) == checkpoints
    assert steps_where(plan, plan.pauses_at) == pauses


def test_an_epoch_ends_with_its_last_step_and_with_the_run():
    plan = plan_of(**SHORT, max_steps=6)
    assert steps_where(plan, plan.epoch_ends_at) == [4, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 255}, r"^--global-batch-size 256: .*255 images"),
        ({"world_size": 257}, r"^--global-batch-size 256: too small for 257 processes"),
        (
            {"world_size": 100, "accumulation_steps": 3},
            r"^--global-batch-size 256: .*--gradient-accumulation-steps.* at least 300$",
        ),
    ],
)
def test_a_batch_that_fits_neither_data_nor_processes_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        plan_of(**arguments)


def test_a_batch_may_be_as_small_as_the_processes_and_as_large_as_the_data():
    assert plan_of(world_size=128, accumulation_steps=2).micro_batch_size == 1
    assert plan_of(num_train=256).epoch_steps == 1
