"""What a network does with images: what comes out of each layer, what each layer costs, and where it goes wrong.

In: a bare `nn.Sequential` and images on its device. Out: activations by layer, a table of layers, the worst mistakes.
The network is used in evaluation mode and left in the mode that it was in; no random number is drawn. Letters: B
images, S side of the network's input, N images of a split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

INPUT = "input"
CHUNK = 1000  # images per forward pass, as an evaluation has it


@dataclass(frozen=True)
class LayerCost:
    """A row of the table in a paper.

    Attributes:
        name: in the network; "input" for the images themselves.
        description: what the layer is, in words.
        shape: of its output for one image: channels, height, width, or units.
        num_params: trainable numbers.
        macs: multiply-accumulates per image in convolutions and linear layers, biases left out.
    """

    name: str
    description: str
    shape: tuple[int, ...]
    num_params: int
    macs: int


@dataclass(frozen=True)
class Mistakes:
    """Images that a network takes for something else, the most confident mistake first; tensors on the CPU.

    Attributes:
        indices: (M,) int64, places in the split.
        images: (M, 28, 28) uint8.
        labels: (M,) int64.
        predicted: (M,) int64, never equal to `labels`.
        confidences: (M,) float32, the probability given to `predicted`.
        num_mistakes: in the whole split, M or more.
        num_samples: images in the split.
    """

    indices: Tensor
    images: Tensor
    labels: Tensor
    predicted: Tensor
    confidences: Tensor
    num_mistakes: int
    num_samples: int


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


def activations(model: nn.Sequential, images: Tensor) -> dict[str, Tensor]:
    """The outputs of all layers, in order, by name; the last one is the logits.

    Args:
        model: layers in a row.
        images: (B, 1, S, S) float32, as the network sees them.

    Returns:
        "input" -> `images`, then each layer's name -> (B, channels, height, width) or (B, units).
    """
    outputs = {INPUT: images}
    with evaluation_mode(model):
        x = images
        for name, layer in model.named_children():
            x = layer(x.clone())  # a layer that works in place would change the output before it
            outputs[name] = x
    return outputs


def layer_costs(model: nn.Sequential, image_size: int) -> list[LayerCost]:
    """The table of layers for inputs of `image_size` x `image_size` pixels; the input is its first row."""
    device = next(model.parameters()).device
    outputs = activations(model, torch.zeros(1, 1, image_size, image_size, device=device))
    rows = [LayerCost(INPUT, "image", tuple(outputs[INPUT].shape[1:]), 0, 0)]
    for name, layer in model.named_children():
        output = outputs[name][0]
        macs = output.numel() * layer.weight[0].numel() if isinstance(layer, nn.Conv2d | nn.Linear) else 0
        num_params = sum(p.numel() for p in layer.parameters())
        rows.append(LayerCost(name, _describe(layer), tuple(output.shape), num_params, macs))
    return rows


def _describe(layer: nn.Module) -> str:
    words = type(layer).__name__
    match layer:
        case nn.Conv2d():
            parts = [f"convolution {layer.kernel_size[0]}x{layer.kernel_size[1]}"]
            parts += [f"stride {layer.stride[0]}"] if layer.stride[0] > 1 else []
            parts += [f"padding {layer.padding[0]}"] if layer.padding[0] else []
            parts += [f"{layer.groups} groups"] if layer.groups > 1 else []
            words = ", ".join(parts)
        case nn.MaxPool2d() | nn.AvgPool2d():
            kind = "max" if isinstance(layer, nn.MaxPool2d) else "average"
            words = f"{kind} pooling {layer.kernel_size}x{layer.kernel_size}"
        case nn.LeakyReLU():
            words = f"leaky ReLU, slope {layer.negative_slope:g}"
        case nn.Dropout():
            words = f"dropout {layer.p:g}"
        case nn.BatchNorm2d():
            words = "batch norm"
        case nn.Linear() | nn.Sigmoid() | nn.Flatten():
            words = words.lower()
    return words


def as_table(layers: Sequence[LayerCost]) -> list[tuple[str, ...]]:
    """The layers as text, in columns: head, a row per layer, totals."""
    rows: list[tuple[str, ...]] = [("layer", "what it is", "output", "parameters", "MAC")]
    for layer in layers:
        numbers = (f"{number:,}" if number else "" for number in (layer.num_params, layer.macs))
        rows.append((layer.name, layer.description, describe_shape(layer.shape), *numbers))
    totals = (sum(layer.num_params for layer in layers), sum(layer.macs for layer in layers))
    return [*rows, ("total", "", "", *(f"{total:,}" for total in totals))]


def describe_shape(shape: Sequence[int]) -> str:
    """Channels x height x width, or units, in words."""
    return "x".join(map(str, shape)) if len(shape) > 1 else f"{shape[0]:,} units"


def filters(model: nn.Sequential, image_size: int, most: int = 256) -> dict[str, Tensor]:
    """Weights that can be looked at, by layer.

    Args:
        model: layers in a row.
        image_size: S.
        most: of later convolutions only those with at most so many kernels are taken.

    Returns:
        Of the first layer with weights and of small convolutions after it: (outputs, inputs per group, height, width).
        A linear first layer's rows are images: (outputs, 1, S, S).
    """
    found: dict[str, Tensor] = {}
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear) and not found:
            found[name] = layer.weight.detach().view(-1, 1, image_size, image_size)
        elif isinstance(layer, nn.Conv2d) and (not found or layer.weight.shape[:2].numel() <= most):
            found[name] = layer.weight.detach()
    return found


def find_mistakes(
    model: nn.Module, transform: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, most: int = 28
) -> Mistakes:
    """Predicts a whole split and returns its worst mistakes: the largest probabilities given to a wrong class.

    Args:
        model: images (B, 1, S, S) -> logits (B, 10).
        transform: pixels -> images.
        images: uint8 (N, 28, 28), on the model's device.
        labels: int64 (N,), likewise.
        most: how many to return.
    """
    with evaluation_mode(model):
        chunks = [model(transform(chunk)).float().softmax(dim=1).max(dim=1) for chunk in images.split(CHUNK)]
    confidences, predicted = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    wrong = (predicted != labels).nonzero().squeeze(1)
    worst = wrong[confidences[wrong].argsort(descending=True, stable=True)][:most]
    return Mistakes(
        indices=worst.cpu(),
        images=images[worst].cpu(),
        labels=labels[worst].cpu(),
        predicted=predicted[worst].cpu(),
        confidences=confidences[worst].cpu(),
        num_mistakes=len(wrong),
        num_samples=len(labels),
    )
