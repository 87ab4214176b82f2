import copy
import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from mnist.config import OptimConfig
from mnist.training import optim
from mnist.training.optim import LearningRate, WeightAverage, build_optimizer, lr_factor
from tests.processes import PYTHON, finish

NUM_STEPS = 24
EPOCH_STEPS = 6

OPTIMIZERS = [
    (
        OptimConfig(optimizer="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    (OptimConfig(optimizer="sgd", lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    (
        OptimConfig(optimizer="adam", lr=0.01, beta1=0.7, beta2=0.9, weight_decay=0.01),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.7, 0.9), weight_decay=0.01),
    ),
    (
        OptimConfig(optimizer="adamw", lr=0.01, beta1=0.8, beta2=0.99, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.99), weight_decay=0.1),
    ),
    (
        OptimConfig(optimizer="adadelta", lr=1.0, weight_decay=0.01),
        lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=0.01),
    ),
]


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 2))


def train_steps(model, optimizer, count):
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(count):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


def sgd(lr=1.0):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def rates(schedule, steps):
    """The learning rates that our schedule sets for `steps`."""
    seen = []
    for step in steps:
        returned = schedule.set_step(step)
        seen.append(schedule.optimizer.param_groups[0]["lr"])
        assert returned == seen[-1]
    return seen


def torch_rates(scheduler, count):
    """The learning rates of the next `count` steps of one of torch's."""
    seen = []
    for _ in range(count):
        seen.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def test_no_optimizer_imports_torch_compile(tmp_path):
    """In a process of its own, because other tests do import it."""
    program = """
import sys, torch
from mnist.config import OptimConfig
from mnist.training.optim import build_optimizer
for name in ("sgd", "adam", "adamw", "adadelta"):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([weight], OptimConfig(optimizer=name))
    weight.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    assert weight.grad is None and not weight.equal(torch.ones(2))
    assert "torch._dynamo" not in sys.modules, name
"""
    done = finish([*PYTHON, "-c", program], tmp_path)
    assert done.code == 0, done.err


def test_a_class_is_given_the_kernel_options_that_it_knows(monkeypatch):
    arguments = {"momentum": 0.5}
    monkeypatch.setitem(optim.OPTIMIZERS, "sgd", (torch.optim.RMSprop, lambda _config: arguments))
    optimizer = build_optimizer([nn.Parameter(torch.ones(2))], OptimConfig(optimizer="sgd", lr=0.1))
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert {name: optimizer.defaults[name] for name in ("lr", "momentum", "capturable")} == {
        "lr": 0.1,
        "momentum": 0.5,
        "capturable": False,
    }


@pytest.mark.parametrize(("config", "reference"), OPTIMIZERS)
def test_an_optimizer_steps_as_torch_documents_it(config, reference):
    ours, theirs = new_model(), new_model()
    train_steps(ours, build_optimizer(ours.parameters(), config), 5)
    train_steps(theirs, reference(theirs.parameters()), 5)
    for a, b, start in zip(ours.parameters(), theirs.parameters(), new_model().parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert not torch.equal(a, start)


@pytest.mark.parametrize("num_steps", [12, 24, 235])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3, 0.5])
def test_one_cycle_is_that_of_torch(warmup, num_steps):
    config = OptimConfig(lr=0.02, schedule="one_cycle", warmup=warmup)
    ours = LearningRate(sgd(), config, num_steps, EPOCH_STEPS)
    theirs = lr_scheduler.OneCycleLR(
        sgd(), max_lr=0.02, total_steps=num_steps, pct_start=warmup, anneal_strategy="cos", cycle_momentum=False
    )
    expected = [theirs.get_last_lr()[0]]
    for _ in range(num_steps - 1):
        theirs.optimizer.step()
        theirs.step()
        expected.append(theirs.get_last_lr()[0])
    assert rates(ours, range(num_steps)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({"schedule": "constant"}, lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        ({"schedule": "cosine"}, lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=NUM_STEPS)),
        (
            {"schedule": "step", "gamma": 0.5},
            lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=EPOCH_STEPS, gamma=0.5),
        ),
        (
            {"schedule": "step", "gamma": 0.5, "decay_epochs": 1.5},
            lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=9, gamma=0.5),
        ),
        (
            {"schedule": "exponential", "gamma": 0.7},
            lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.7 ** (1 / EPOCH_STEPS)),
        ),
    ],
)
def test_a_schedule_is_that_of_torch_at_every_step(changes, reference):
    ours = LearningRate(sgd(), OptimConfig(lr=0.5, **changes), NUM_STEPS, EPOCH_STEPS)
    expected = torch_rates(reference(sgd(0.5)), NUM_STEPS)
    assert rates(ours, range(NUM_STEPS)) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_exponential_decay_per_epoch_is_that_of_torch_per_epoch():
    ours = LearningRate(sgd(), OptimConfig(lr=1.0, schedule="exponential", gamma=0.7), NUM_STEPS, EPOCH_STEPS)
    expected = torch_rates(lr_scheduler.ExponentialLR(sgd(), gamma=0.7), NUM_STEPS // EPOCH_STEPS)
    assert rates(ours, range(0, NUM_STEPS, EPOCH_STEPS)) == pytest.approx(expected)


@pytest.mark.parametrize("decay_epochs", [0.1, 0.2, 0.4, 0.7])
@pytest.mark.parametrize("epoch_steps", [157, 235, 469, 938])
def test_a_rate_falls_at_the_end_of_an_epoch_whatever_a_quotient_rounds_to(epoch_steps, decay_epochs):
    config = OptimConfig(schedule="step", gamma=0.5, decay_epochs=decay_epochs)
    factor = lr_factor(config, 7 * epoch_steps, epoch_steps)
    assert factor(7 * epoch_steps) == 0.5 ** math.floor(7 / Fraction(str(decay_epochs)))


def test_cosine_with_warm_up_rises_linearly_and_falls_to_zero():
    factor = lr_factor(OptimConfig(schedule="cosine", warmup=0.25), NUM_STEPS, EPOCH_STEPS)
    assert [factor(step) for step in range(7)] == pytest.approx([k / 7 for k in range(1, 8)])
    assert factor(6 + 9) == pytest.approx(0.5)
    assert factor(NUM_STEPS) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("schedule", ["constant", "step", "exponential", "cosine", "one_cycle"])
def test_the_shortest_runs_learn_at_a_sane_rate(schedule, warmup, num_steps):
    factor = lr_factor(OptimConfig(schedule=schedule, warmup=warmup), num_steps, num_steps)
    factors = [factor(step) for step in range(num_steps + 1)]
    assert all(math.isfinite(value) and 0 <= value <= 1 for value in factors)
    assert factors[0] > 0


@pytest.mark.parametrize("schedule", ["constant", "step", "exponential", "cosine", "one_cycle"])
def test_a_schedule_begun_in_the_middle_goes_on_as_if_never_interrupted(schedule):
    config = OptimConfig(lr=0.1, schedule=schedule, warmup=0.25)
    whole = rates(LearningRate(sgd(), config, NUM_STEPS, EPOCH_STEPS), range(NUM_STEPS))
    assert rates(LearningRate(sgd(), config, NUM_STEPS, EPOCH_STEPS), range(10, NUM_STEPS)) == whole[10:]


def test_the_configured_peak_wins_over_the_one_in_a_checkpoint():
    config = OptimConfig(lr=0.1, schedule="step", gamma=0.5)
    optimizer = sgd(0.1)
    ours = LearningRate(optimizer, config, NUM_STEPS, EPOCH_STEPS)
    optimizer.load_state_dict(sgd(0.7).state_dict())
    expected = [0.05] * EPOCH_STEPS + [0.025]
    assert rates(ours, range(EPOCH_STEPS, 2 * EPOCH_STEPS + 1)) == pytest.approx(expected)


def test_a_rate_that_lives_on_the_device_is_written_where_it_is():
    rate = torch.tensor(7.0)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=rate, capturable=True)
    assert LearningRate(optimizer, OptimConfig(lr=0.5), NUM_STEPS, EPOCH_STEPS).set_step(3) == 0.5
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.5


def test_the_average_follows_its_formula():
    model = new_model()
    optimizer = build_optimizer(model.parameters(), OptimConfig(optimizer="sgd", lr=0.01))
    average = WeightAverage(model, decay=0.3)
    expected = copy.deepcopy(model.state_dict())
    for step, decay in enumerate([2 / 11, 3 / 12, 0.3, 0.3]):
        train_steps(model, optimizer, 1)
        average.set_step(step)
        average.update()
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_the_average_includes_batch_statistics_and_copies_counters():
    model = new_model()
    average = WeightAverage(model, decay=0.5)
    train_steps(model, build_optimizer(model.parameters(), OptimConfig(optimizer="sgd", lr=0.01)), 4)
    average.set_step(100)
    average.update()
    assert average.module[1].num_batches_tracked.item() == 4
    torch.testing.assert_close(average.module[1].running_var, (1 + model[1].running_var) / 2)


def test_the_average_is_ready_for_evaluation_and_needs_no_gradient():
    model = new_model()
    average = WeightAverage(model, decay=0.9)
    assert not average.module.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training


def test_updating_the_average_leaves_the_model_alone():
    model = new_model()
    average = WeightAverage(model, decay=0.9)
    train_steps(model, build_optimizer(model.parameters(), OptimConfig(optimizer="sgd", lr=0.01)), 1)
    before = copy.deepcopy(model.state_dict())
    average.set_step(1)
    average.update()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
