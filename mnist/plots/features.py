"""What a network does with images: the output of each layer, what each layer costs, and which images it gets wrong.

In: any bare `nn.Module` and images on its device. Out: outputs by layer, a table of layers, the worst mistakes. The
network is used in evaluation mode and left in the mode that it was in; no random number is drawn. Letters: B images of
a batch, C channels, S side of the network's input, N images of a split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

INPUT, OUTPUT = "input", "output"
CHUNK = 1000  # images per forward pass, as an evaluation has it
NUM_MISTAKES = 4 * 7  # that are shown
# What `repr` says of a layer although it is the default.
_DEFAULTS = re.compile(
    r"(, |(?<=\())(stride=1|padding=0|dilation=1|ceil_mode=False|count_include_pad=True|bias=True|inplace=False|"
    r"start_dim=1, end_dim=-1|eps=1e-05|momentum=0.1|affine=True|track_running_stats=True)(?=[,)])|(in|out)_features="
)


@dataclass(frozen=True)
class LayerCost:
    """A row of the table in a paper, for one image.

    Attributes:
        name: in the network; "input" for the images themselves, "output" for what the network itself computes last.
        description: of the layer, as PyTorch prints it, without defaults.
        shape: of its output: channels, height, width, or units.
        num_params: trainable numbers.
        macs: multiply-accumulates in convolutions and linear layers, biases left out.
        connections: the same with a connection for each bias, as LeCun et al. 1998 count them.
    """

    name: str
    description: str
    shape: tuple[int, ...]
    num_params: int = 0
    macs: int = 0
    connections: int = 0

    @property
    def neurons(self) -> int:
        """Numbers in the output."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Mistakes:
    """Images that a network takes for something else, the most confident mistake first; tensors on the CPU.

    Attributes:
        num_mistakes: in the whole split, M or more.
        num_samples: images in the split.
        indices: (M,) int64, places in the split.
        images: (M, H, W) or (M, C, H, W) uint8.
        labels: (M,) int64.
        predicted: (M,) int64, never equal to `labels`.
        confidences: (M,) float32, the probability given to `predicted`.
    """

    num_mistakes: int
    num_samples: int
    indices: Tensor
    images: Tensor
    labels: Tensor
    predicted: Tensor
    confidences: Tensor


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off, batch norm by its statistics, no gradients; afterwards the model is in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def activations(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The outputs of all layers by name, in the order in which the network computes them; the last one is the logits.

    A module that holds others is listed where it computes something itself, such as the sum in a residual block. A
    layer that is used again is listed again, as "relu #2".

    Args:
        model: any network.
        images: (B, C, S, S) float32, as the network sees them.

    Returns:
        "input" -> `images`, then each layer's name -> (B, channels, height, width) or (B, units).
    """
    outputs, newest = {INPUT: images.clone()}, images

    def remember(name: str, module: nn.Module, output: Any) -> None:
        nonlocal newest
        is_leaf = next(module.children(), None) is None
        if isinstance(output, Tensor) and (is_leaf or output is not newest):
            newest, key, count = output, name, 1
            while key in outputs:
                count += 1
                key = f"{name} #{count}"
            outputs[key] = output.clone()  # a layer that works in place would change it

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: remember(name or OUTPUT, module, output))
        for name, module in model.named_modules()
    ]
    try:
        with evaluation_mode(model):
            model(images.clone())
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def main_activations(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fewer rows: of layers in a row with outputs of one shape the last one, under the names of the first and the last.

    Convolution, norm and ReLU become one row, "conv1 to relu1"; each block of a residual network has a row of its own.
    What only changes the shape is left out.
    """
    groups: list[list[str]] = []
    for name, output in outputs.items():
        before = outputs[groups[-1][-1]] if groups else output
        if groups and output.numel() == before.numel() and torch.equal(output.flatten(1), before.flatten(1)):
            continue
        if len(groups) > 1 and output.shape == before.shape and _is_same_block(groups[-1][-1], name):
            groups[-1].append(name)
        else:
            groups.append([name])
    return {" to ".join(dict.fromkeys((names[0], names[-1]))): outputs[names[-1]] for names in groups}


def _is_same_block(name: str, next_name: str) -> bool:
    """Whether two layers belong to the same module, or one to a part of the other's ("a.b" and "a.shortcut.b")."""
    module, next_module = (f"{name.rpartition('.')[0]}." for name in (name, next_name))
    if "." in (module, next_module):  # layers of the network itself; or what a block computes after its last layer
        return module in (next_module, f"{next_name}.")
    return module.startswith(next_module) or next_module.startswith(module)


def layer_costs(model: nn.Module, image_shape: tuple[int, int, int]) -> list[LayerCost]:
    """The table of layers for images of shape (C, S, S); the input is its first row."""
    device = next(model.parameters()).device
    outputs = activations(model, torch.zeros(1, *image_shape, device=device))
    modules, counted = dict(model.named_modules()), set()
    rows = [LayerCost(INPUT, "image", image_shape)]
    for name, output in list(outputs.items())[1:]:
        layer, macs, connections = modules.get(name.partition(" #")[0], model), 0, 0
        if isinstance(layer, nn.Conv2d | nn.Linear):
            macs = output.numel() * layer.weight[0].numel()
            connections = macs + (0 if layer.bias is None else output.numel())
        new = [p for p in layer.parameters() if p not in counted]
        counted |= set(new)
        num_params = sum(p.numel() for p in new)
        rows.append(LayerCost(name, _describe(layer), tuple(output.shape[1:]), num_params, macs, connections))
    return rows


def _describe(layer: nn.Module) -> str:
    """Conv2d(1, 6, kernel_size=5): what PyTorch prints, without defaults and with one number for a square."""
    if next(layer.children(), None) is not None:
        return type(layer).__name__
    return _DEFAULTS.sub("", re.sub(r"\((\d+), \1\)", r"\1", repr(layer)))


def as_table(layers: Sequence[LayerCost]) -> list[tuple[str, ...]]:
    """The layers as text, in columns: head, a row per layer, totals."""
    columns = ("neurons", "parameters", "connections", "MAC")
    numbers = [(layer.neurons, layer.num_params, layer.connections, layer.macs) for layer in layers]
    totals = [sum(column) for column in zip(*numbers, strict=True)]
    rows = [
        (layer.name, layer.description, describe_shape(layer.shape), *(f"{n:,}" if n else "" for n in row))
        for layer, row in zip(layers, numbers, strict=True)
    ]
    return [("layer", "what it is", "output", *columns), *rows, ("total", "", "", "", *(f"{n:,}" for n in totals[1:]))]


def describe_shape(shape: Sequence[int]) -> str:
    """Channels x height x width, or units, in words."""
    return "x".join(map(str, shape)) if len(shape) > 1 else f"{shape[0]:,} units"


def filters(model: nn.Module, image_shape: tuple[int, int, int], most: int = 256) -> dict[str, Tensor]:
    """Weights that can be looked at, by layer.

    Args:
        model: any network.
        image_shape: (C, S, S).
        most: of later convolutions only those with at most so many kernels are taken.

    Returns:
        Of the first layer with weights and of small convolutions after it: (outputs, inputs per group, height, width).
        A linear first layer's rows are images: (outputs, C, S, S).
    """
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not found and layer.in_features == math.prod(image_shape):
            found[name] = layer.weight.detach().view(-1, *image_shape)
        elif isinstance(layer, nn.Conv2d) and (not found or layer.weight.shape[:2].numel() <= most):
            found[name] = layer.weight.detach()
    return found


def find_mistakes(
    model: nn.Module, transform: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, most: int = NUM_MISTAKES
) -> Mistakes:
    """Predicts a whole split and returns its worst mistakes: the largest probabilities given to a wrong class.

    Args:
        model: images (B, C, S, S) -> logits (B, classes).
        transform: pixels -> images.
        images: uint8 (N, H, W) or (N, C, H, W), on the model's device.
        labels: int64 (N,), likewise.
        most: how many to return.
    """
    with evaluation_mode(model):
        chunks = [model(transform(chunk)).float().softmax(dim=1).max(dim=1) for chunk in images.split(CHUNK)]
    confidences, predicted = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    wrong = (predicted != labels).nonzero().squeeze(1)
    worst = wrong[confidences[wrong].argsort(descending=True, stable=True)][:most]
    shown = (fact[worst].cpu() for fact in (images, labels, predicted, confidences))
    return Mistakes(len(wrong), len(labels), worst.cpu(), *shown)
