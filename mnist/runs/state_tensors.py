"""The tensors of a model and its optimizer: copied to the CPU, and restored.

In: a module or an optimizer, or tensors by name. Out: tensors by name, or the optimizer with that state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of a bare module, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}


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
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, saved in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        is_moment = saved.shape == parameter.shape and saved.dim() > 0
        value = torch.empty_like(parameter, dtype=saved.dtype, device="cpu").copy_(saved) if is_moment else saved
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
