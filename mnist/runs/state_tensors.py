"""The tensors of a model and its optimizer: copied, compared with those of a checkpoint, and restored.

In: module, optimizer, or a `Checkpoint`. Out: tensors by name, on the CPU; or the objects with that state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist.config import from_flat
from mnist.runs.checkpoint_files import Checkpoint, CheckpointError
from mnist.training.optim import build_optimizer


def check_fits(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, ema: nn.Module | None) -> None:
    """Compares names, shapes and types of all tensors with what these objects need; changes nothing.

    Args:
        checkpoint: of a run with the same configuration.
        model: bare.
        optimizer: of the model's parameters.
        ema: moving average of the model, or None.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or type; names it.
    """
    needed = {
        "model": model.state_dict(),
        "ema": {} if ema is None else ema.state_dict(),
        "optimizer": _moments_after_a_step(checkpoint, optimizer),
    }
    for group, tensors in needed.items():
        found = checkpoint.tensors[group]
        for name in sorted(tensors.keys() | found.keys()):
            was, now = _describe(found.get(name)), _describe(tensors.get(name))
            if was != now:
                raise CheckpointError(f"checkpoint of step {checkpoint.step}: {group}.{name} is {was}, must be {now}")


def _describe(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


def _moments_after_a_step(checkpoint: Checkpoint, optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimizer holds from its first step on, by a trial with a parameter of one number."""
    has_no_step = checkpoint.step == 0 or checkpoint.scaler is not None  # fp16 skips the first ones
    if has_no_step and not checkpoint.tensors["optimizer"]:
        return {}
    number = nn.Parameter(torch.zeros(1))
    number.grad = torch.zeros(1)
    trial = build_optimizer([number], from_flat(checkpoint.config).optim)
    trial.step()
    moments = {key.partition(".")[2]: value for key, value in optimizer_tensors(trial).items()}
    return {
        f"{index}.{name}": parameter if value.dim() else value
        for index, parameter in enumerate(_parameters(optimizer))
        for name, value in moments.items()
    }


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments as "<parameter index>.<name>" -> tensor; all else about it is configuration."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value.detach().cpu()
        for index, values in state.items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts moments back, in the memory layout of their parameters: fused kernels need equal layouts."""
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for key, saved in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        is_moment = saved.shape == parameter.shape and saved.dim() > 0
        value = torch.empty_like(parameter, dtype=saved.dtype, device="cpu").copy_(saved) if is_moment else saved
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of a bare module, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
