"""Optimizers and learning-rate schedules.

In: parameters, the `optim` section and the run's length in optimizer steps. Out: an optimizer of torch, the learning
rate of each step, an average of the weights. A schedule is a factor on the peak learning rate, a pure function of the
step, so that nothing but the step needs to be remembered.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist.config import OptimConfig

ONE_CYCLE_START = 1 / 25  # of the peak, as torch's OneCycleLR has it
ONE_CYCLE_END = ONE_CYCLE_START / 1e4


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig, *, capturable: bool = False) -> Optimizer:
    """The optimizer of the recipe, as one fused kernel per step where torch has one (CPU and CUDA; not Adadelta).

    Args:
        parameters: on their device.
        config: names the update rule.
        capturable: for a step that is captured: keep learning rate (in fp32) and step count on the GPU, where a CUDA
            graph reads them.
    """
    if capturable:  # torch warns at each eager step, and a captured run has a few of them
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
    parameters = list(parameters)
    lr = torch.tensor(config.lr, device=parameters[0].device) if capturable else config.lr
    kind, arguments = OPTIMIZERS[config.optimizer]
    kernel = {"fused": all(p.device.type in ("cpu", "cuda") for p in parameters), "capturable": capturable}
    accepted = {name: value for name, value in kernel.items() if name in inspect.signature(kind).parameters}
    return _without_compiler(kind)(parameters, lr=lr, **arguments(config), **accepted)


def _without_compiler(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    """A subclass of `kind` whose methods have lost the wrappers that torch.compile needs.

    Such a wrapper imports torch.compile when it is first called, which takes most of a second.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict", "step")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    methods["step"] = torch.no_grad()(methods["step"])
    return type(kind.__name__, (kind,), methods)


def _adam_arguments(config: OptimConfig) -> dict[str, Any]:
    return {"betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}


# Name -> a class, and its arguments besides `params` and `lr`, from the `optim` section.
OPTIMIZERS: dict[str, tuple[type[Optimizer], Callable[[OptimConfig], dict[str, Any]]]] = {
    "sgd": (
        torch.optim.SGD,
        lambda config: {
            "momentum": config.momentum,
            "nesterov": config.nesterov,
            "weight_decay": config.weight_decay,
        },
    ),
    "adam": (torch.optim.Adam, _adam_arguments),
    "adamw": (torch.optim.AdamW, _adam_arguments),
    "adadelta": (torch.optim.Adadelta, lambda config: {"weight_decay": config.weight_decay}),
}


def lr_factor(config: OptimConfig, num_steps: int, epoch_steps: int) -> Callable[[int], float]:
    """The schedule as a function: optimizer steps done -> factor on `config.lr` for the next one.

    Args:
        config: names the schedule.
        num_steps: length of the run.
        epoch_steps: steps that count as one epoch for `decay_epochs`.

    Returns:
        A function of the step in [0, num_steps]:
        constant     1
        step         gamma ** whole decay periods passed
        exponential  gamma ** decay periods passed, fractions included
        cosine       a linear rise over the warm-up, then half a cosine down to 0
        one_cycle    half a cosine up from 1/25, half a cosine down to 4e-6 (Smith & Topin 2017; momentum stays)
    """
    decay_steps = config.decay_epochs * epoch_steps
    warmup_steps = config.warmup * num_steps

    def cosine(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return _half_cosine(1.0, 0.0, (step - warmup_steps) / (num_steps - warmup_steps))

    def one_cycle(step: int) -> float:
        peak, last = warmup_steps - 1, num_steps - 1
        if step < peak:
            return _half_cosine(ONE_CYCLE_START, 1.0, step / peak)
        return _half_cosine(1.0, ONE_CYCLE_END, (step - peak) / max(last - peak, 1.0))

    return {
        "constant": lambda _: 1.0,
        "step": lambda step: config.gamma ** math.floor(step / decay_steps + 1e-9),
        "exponential": lambda step: config.gamma ** (step / decay_steps),
        "cosine": cosine,
        "one_cycle": one_cycle,
    }[config.schedule]


def _half_cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(fraction, 1.0))) / 2


class LearningRate:
    """Writes each step's rate into the optimizer.

    It has no state: nothing to save, step or prepare. (A prepared scheduler of torch would step once per process,
    accelerate#2926. Where the gradient scaler of fp16 skips an update, the schedule does not stop: asking it would
    wait for the device.)

    Args:
        optimizer: of which all parameters have one rate.
        config: names the schedule; its `lr` is the peak.
        num_steps: length of the run.
        epoch_steps: steps that count as one epoch.
    """

    def __init__(self, optimizer: Optimizer, config: OptimConfig, num_steps: int, epoch_steps: int) -> None:
        self.optimizer = optimizer
        self.peak = config.lr
        self.factor = lr_factor(config, num_steps, epoch_steps)

    def set_step(self, step: int) -> float:
        """Sets the rate of the step that follows `step` steps; returns it."""
        rate = self.peak * self.factor(step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # a CUDA graph reads it where it is
            else:
                group["lr"] = rate
        return rate


class WeightAverage:
    """An exponential moving average of weights and floating-point buffers; integer buffers are copied.

    The decay starts low, min(decay, (1 + t) / (10 + t)) after t steps, so that short runs are not dominated by their
    initial weights (as in TensorFlow's ExponentialMovingAverage).

    Args:
        model: the bare, prepared module; the average keeps its precision wrapper.
        decay: the final decay.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weight = torch.empty((), device=next(model.parameters()).device)  # of the next update
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self._averages = [average for average, _ in pairs if average.is_floating_point()]
        self._sources = [source for average, source in pairs if average.is_floating_point()]
        self._counters = [average for average, _ in pairs if not average.is_floating_point()]
        self._counter_sources = [source for average, source in pairs if not average.is_floating_point()]

    def set_step(self, step: int) -> None:
        """Writes the weight of the step that follows `step` steps to the device, where a CUDA graph can read it."""
        updates = step + 1
        self._weight.fill_(1 - min(self.decay, (1 + updates) / (10 + updates)))

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the model."""
        changes = torch._foreach_sub(self._sources, self._averages)
        torch._foreach_mul_(changes, self._weight)
        torch._foreach_add_(self._averages, changes)
        if self._counters:
            torch._foreach_copy_(self._counters, self._counter_sources)
