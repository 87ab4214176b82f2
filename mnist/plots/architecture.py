"""What each layer of a network costs: a table, and a diagram.

In: any bare `nn.Module`. Out: rows of text, and a figure. Letters: C channels, S side of the network's input.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mnist.plots.canvas import GREY, HEAD, INK, LINES, MARGIN, new_canvas, text_width
from mnist.plots.features import INPUT, activations, describe_shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def draw_architecture(layers: Sequence[LayerCost], title: str) -> Figure:
    """A diagram of the network, and the table of its layers: output shapes, parameters, costs, and their sums."""
    rows = as_table(layers)
    line, diagram = 22, 170
    left, middle = (12 + round(max(text_width(row[column], 8) for row in rows)) for column in (0, 1))
    left, middle = max(110, left), max(310, middle)
    rights = [left + middle + right for right in (0, 0, 85, 155, 245, 345, 450)]  # edges of the columns of numbers
    boxes = [layer for number, layer in enumerate(layers) if number == 0 or layer.shape != layers[number - 1].shape]
    labels = [text for layer in boxes for text in (layer.name, describe_shape(layer.shape))]
    widest_label = max((text_width(text, 7) for text in labels), default=0)
    width = 2 * MARGIN + max(rights[-1], round(len(boxes) * (widest_label + 6)))
    height = HEAD + diagram + line * (len(rows) + 1) + MARGIN
    subtitle = (
        "shapes: channels x height x width; connections count biases, MAC (multiply-accumulates per image) do not"
    )
    figure, axes = new_canvas(width, height, title, subtitle)
    _draw_diagram(axes, boxes, width, diagram - 20)
    top = HEAD + diagram
    for number, row in enumerate(rows):
        y = top + line * (number + 0.5) + (6 if number == len(rows) - 1 else 0)
        weight = "bold" if number in (0, len(rows) - 1) else "normal"
        for column, text in enumerate(row):
            x, side = (MARGIN + (0, left)[column], "left") if column < 2 else (MARGIN + rights[column], "right")
            axes.text(x, y, text, size=8, color=INK, weight=weight, ha=side, va="center")
    for y in (top, top + line, top + line * (len(rows) - 1) + 3):
        axes.plot([MARGIN, width - MARGIN], [y, y], color=GREY, linewidth=0.8)
    return figure


def _draw_diagram(axes: Axes, boxes: Sequence[LayerCost], width: int, height: int) -> None:
    """A box per layer that changes the shape: as high as its maps (or its units), as wide as it has channels."""
    step, middle = (width - 2 * MARGIN) / max(len(boxes), 1), HEAD + (height - 34) / 2
    sides = [layer.shape[-1] if len(layer.shape) > 1 else math.sqrt(layer.shape[0]) for layer in boxes]
    depths = [layer.shape[0] if len(layer.shape) > 1 else 0 for layer in boxes]
    ends: list[float] = []
    for number, (layer, side, depth) in enumerate(zip(boxes, sides, depths, strict=True)):
        x, tall = MARGIN + step * (number + 0.5), 8 + (height - 42) * side / max(sides)
        half = 4 + 0.28 * step * depth / max(1, *depths)
        left, right, top, bottom = x - half, x + half, middle - tall / 2, middle + tall / 2
        colour = LINES[5] if depth else LINES[4]
        axes.fill([left, right, right, left], [top, top, bottom, bottom], fc=colour, ec=INK, linewidth=0.8)
        ends += [left, right]
        label = f"{layer.name}\n{describe_shape(layer.shape)}"
        axes.text(x, HEAD + height - 26, label, size=7, color=INK, ha="center", va="top", linespacing=1.3)
    for start, end in zip(ends[1:-1:2], ends[2::2], strict=True):
        axes.annotate("", (end - 1, middle), (start + 1, middle), arrowprops={"arrowstyle": "->", "color": GREY})
