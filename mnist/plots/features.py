"""What a network does with images: the output of each layer, its filters, and which images it gets wrong.

In: any bare `nn.Module` and images on its device. Out: outputs by layer, weights by layer, the worst mistakes. The
network is used in evaluation mode and left in the mode that it was in; no random number is drawn. Letters: B images of
a batch, C channels, S side of the network's input, N images of a split, M mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mnist.data.batches import Split

INPUT, OUTPUT = "input", "output"
CHUNK = 1000  # images per forward pass, as an evaluation has it
MOST_KERNELS = 256  # of a convolution after the first layer whose filters are shown


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


def describe_shape(shape: Sequence[int]) -> str:
    """Channels x height x width, or units, in words."""
    return "x".join(map(str, shape)) if len(shape) > 1 else f"{shape[0]:,} units"


def filters(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Weights that can be looked at, by layer, for images of shape (C, S, S).

    Returns:
        Of the first layer with weights and of small convolutions after it: (outputs, inputs per group, height, width).
        A linear first layer's rows are images: (outputs, C, S, S).
    """
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not found and layer.in_features == math.prod(image_shape):
            found[name] = layer.weight.detach().view(-1, *image_shape)
        elif isinstance(layer, nn.Conv2d) and (not found or layer.weight.shape[:2].numel() <= MOST_KERNELS):
            found[name] = layer.weight.detach()
    return found


def find_mistakes(
    model: nn.Module, transform: Callable[[Tensor], Tensor], split: Split
) -> tuple[Tensor, Tensor, Tensor]:
    """Predicts a whole split with a model (B, C, S, S) -> logits (B, classes); `transform` makes its input of pixels.

    Returns:
        Places of the mistakes (M,), the most confident one first; of all N images the predicted class (N,), and the
        probability given to it (N,).
    """
    with evaluation_mode(model):
        chunks = [model(transform(chunk)).float().softmax(dim=1).max(dim=1) for chunk in split.images.split(CHUNK)]
    confidences, predicted = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    wrong = (predicted != split.labels).nonzero().squeeze(1)
    return wrong[confidences[wrong].argsort(descending=True, stable=True)], predicted, confidences
