"""Drawing: tensors and plain numbers in, a matplotlib figure out.

In: what a run or a network has to show. Out: `Figure`, and with `save_picture` a file. In all pictures positive values
are red, negative ones blue, zero is white. Letters: N images.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mnist.errors import RunError
from mnist.plots.canvas import (
    BLUE,
    DPI,
    GAP,
    GREY,
    HEAD,
    INK,
    LABEL,
    LINES,
    MARGIN,
    PALE,
    PITCH,
    RED,
    ROW_GAP,
    TILE,
    add_axes,
    draw_label,
    draw_tiles,
    new_canvas,
    new_figure,
    on_paper,
    signed,
)
from mnist.plots.features import INPUT, LayerCost, Mistakes, as_table, describe_shape
from mnist.system.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
MOST_MAPS, MOST_FILTERS = 32, 64  # of one layer
LEAST_PITCH = 28  # pixels from filter to filter
COLUMNS = 16  # of maps
MAPS_WIDTH = COLUMNS * PITCH - GAP  # in pixels


def save_picture(figure: Figure, path: Path) -> None:
    """Writes a figure as .png, .pdf or .svg, whole or not at all.

    Raises:
        RunError: `path` cannot be written.
    """
    buffer = io.BytesIO()
    kind = path.suffix[1:].lower()
    quick: dict[str, Any] = {"pil_kwargs": {"compress_level": 2}} if kind == "png" else {}  # a little larger
    figure.savefig(buffer, format=kind, dpi=DPI, **quick)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise RunError(f"{path}: picture not written ({error.strerror or error})") from error


def draw_samples(
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    title: str,
    subtitle: str,
    *,
    augmented: Tensor | None = None,
) -> Figure:
    """Images in a labelled grid of ten columns.

    Args:
        images: (N, 28, 28) pixels in 0..255.
        labels: (N,) int64.
        class_names: by label.
        title: of the picture.
        subtitle: likewise.
        augmented: shown below `images`, if given: same shape.
    """
    columns, tiles = 10, images.cpu().float()
    if augmented is not None:
        gap = tiles.new_full((len(tiles), 1, 28), 70)
        tiles = torch.cat([tiles, gap, augmented.cpu().float()], dim=1)
    pitch = (78, 2 * tiles.shape[1] + 24)
    rows = math.ceil(len(tiles) / columns)
    width, height = 2 * MARGIN + columns * pitch[0] - 20, HEAD + rows * pitch[1] + MARGIN // 2
    figure, axes = new_canvas(width, height, title, subtitle)
    places = draw_tiles(axes, on_paper(tiles), left=MARGIN, top=HEAD, columns=columns, pitch=pitch, size=56)
    for (x, y), label in zip(places, labels.tolist(), strict=True):
        axes.text(x, y + 13, class_names[label], size=7.5, color=INK, ha="center")
    return figure


def draw_features(outputs: Mapping[str, Tensor], class_names: Sequence[str], title: str, subtitle: str) -> Figure:
    """What one image becomes from layer to layer: maps as tiles, vectors as bars, the logits over the classes.

    Args:
        outputs: of each layer for one image, by name: (channels, height, width) or (units,); first "input", last the
            logits.
        class_names: by label.
        title: of the picture.
        subtitle: likewise.
    """
    *hidden, logits_name = outputs
    heights = [_grid(min(len(outputs[n]), MOST_MAPS))[1] * PITCH if outputs[n].ndim == 3 else 48 for n in hidden]
    last, left = 130, MARGIN + LABEL
    height = HEAD + sum(heights) + ROW_GAP * len(outputs) + last
    figure, axes = new_canvas(left + MAPS_WIDTH + MARGIN, height, title, subtitle)
    top = HEAD
    for name, row_height in zip(hidden, heights, strict=True):
        values = outputs[name].detach().cpu().float()
        lines = [describe_shape(values.shape), f"{float(values.min()):.2g} to {float(values.max()):.2g}"]
        if values.ndim == 3:
            shown = values[:MOST_MAPS]
            lines += [f"first {len(shown)} of {len(values)} maps"] if len(shown) < len(values) else []
            tiles = _input_tiles(shown) if name == INPUT else signed(shown, float(shown.abs().max()))
            draw_tiles(axes, tiles, left=left, top=top, columns=_grid(len(shown))[0], pitch=(PITCH, PITCH), size=TILE)
        else:
            _draw_bars(axes, values, left=left, top=top, height=row_height)
        draw_label(axes, top, name, *lines)
        top += row_height + ROW_GAP
    draw_label(axes, top, logits_name, "10 logits", "with their softmax")
    _draw_logits(add_axes(figure, left, top, MAPS_WIDTH, last - 30), outputs[logits_name], class_names)
    return figure


def _grid(num_maps: int) -> tuple[int, int]:
    """Columns and rows, the rows as even as they can be."""
    rows = math.ceil(num_maps / COLUMNS)
    return math.ceil(num_maps / rows), rows


def _input_tiles(images: Tensor) -> Tensor:
    """What the network sees, normalised as it is, from white for its least value to black."""
    low, high = images.min(), images.max()
    return on_paper(255 * (images - low) / (high - low).clamp(min=1e-6))


def _draw_bars(axes: Axes, values: Tensor, *, left: int, top: int, height: int) -> None:
    """A vector (units,) as bars up and down from a line at zero, in the space given in pixels."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = height / ((high - low) or 1.0)
    zero = top + high * scale
    edges = torch.linspace(left, left + MAPS_WIDTH, len(values) + 1).numpy()
    for part, colour in ((values.clamp(min=0), RED), (values.clamp(max=0), BLUE)):
        axes.stairs((zero - part * scale).numpy(), edges, baseline=zero, fill=True, color=colour, linewidth=0)
    axes.plot([left, left + MAPS_WIDTH], [zero, zero], color=GREY, linewidth=0.6)


def _draw_logits(axes: Axes, logits: Tensor, class_names: Sequence[str]) -> None:
    """Logits (10,) as bars over the classes, the largest one in colour, with their probabilities."""
    values = logits.detach().cpu().float()
    winner = int(values.argmax())
    colours = [LINES[0] if k == winner else "#b0b0b0" for k in range(len(values))]
    bars = axes.bar(range(len(values)), values.tolist(), color=colours, width=0.7)
    axes.bar_label(bars, [f"{p:.1%}" for p in values.softmax(dim=0).tolist()], size=7.5, color=INK, padding=2)
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.set_xticks(range(len(values)), class_names)
    axes.margins(x=0.01, y=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def draw_filters(weights: Mapping[str, Tensor], title: str, subtitle: str) -> Figure:
    """The weights of layers as small images; one row per input where a layer has several.

    Args:
        weights: by layer: (outputs, inputs per group, height, width).
        title: of the picture.
        subtitle: likewise.
    """
    blocks = [_filter_block(name, weight) for name, weight in weights.items()]
    height = HEAD + sum(block.height + 2 * ROW_GAP for block in blocks)
    figure, axes = new_canvas(MARGIN + LABEL + MAPS_WIDTH + MARGIN, height, title, subtitle)
    top = HEAD
    for block in blocks:
        pitch, size = (block.pitch, block.pitch), TILE if block.pitch == PITCH else block.pitch - 4
        draw_tiles(axes, block.tiles, left=MARGIN + LABEL, top=top, columns=block.columns, pitch=pitch, size=size)
        draw_label(axes, top, block.name, *block.lines)
        top += block.height + 2 * ROW_GAP
    return figure


@dataclass(frozen=True)
class _FilterBlock:
    """The filters of one layer: RGB tiles, tiles in a row, pixels from tile to tile, and of the whole."""

    name: str
    lines: list[str]
    tiles: Tensor
    columns: int
    pitch: int
    height: int


def _filter_block(name: str, weight: Tensor) -> _FilterBlock:
    """Filters of one input in rows of sixteen; of several inputs a column each, an input a row."""
    num_filters, num_inputs, height, width = weight.shape
    most = MOST_FILTERS if num_inputs == 1 else MAPS_WIDTH // LEAST_PITCH
    shown = weight[:most].detach().cpu().float()
    limit = float(shown.abs().flatten().quantile(0.995))  # a single large weight would leave the others pale
    columns, pitch = COLUMNS, PITCH
    if num_inputs > 1:  # as wide as there is room, but no tower
        columns, pitch = len(shown), max(LEAST_PITCH, min(PITCH, MAPS_WIDTH // len(shown), 720 // num_inputs))
    tiles = signed(shown.transpose(0, 1).flatten(0, 1), limit)  # input by input
    lines = [f"{num_filters} filters, {height}x{width}"]
    lines = [f"{num_filters} filters (across)", f"{num_inputs} inputs (down)"] if num_inputs > 1 else lines
    lines += [f"full colour at {limit:.2g}"]
    lines += [f"first {len(shown)} shown"] if len(shown) < num_filters else []
    block_height = max(math.ceil(len(tiles) / columns) * pitch, 16 * (len(lines) + 1))
    return _FilterBlock(name, lines, tiles, columns, pitch, block_height)


def draw_confusion(confusion: Sequence[Sequence[int]], class_names: Sequence[str], title: str) -> Figure:
    """Two tables: counts, and shares of each true class. Only mistakes are coloured.

    Args:
        confusion: confusion[i][j] = images of class i taken for class j.
        class_names: by label.
        title: of the picture.
    """
    counts = torch.tensor(confusion, dtype=torch.float64)
    num_samples, num_mistakes = int(counts.sum()), int(counts.sum() - counts.diagonal().sum())
    has_words = max(map(len, class_names)) > 3
    side, edge, foot = 430, 96 if has_words else 60, 84 if has_words else 56
    width = 2 * (edge + side) + 2 * MARGIN
    subtitle = f"{num_mistakes:,} mistakes among {num_samples:,} test images; only mistakes are coloured"
    figure = new_figure(width, HEAD + 22 + side + foot, title, subtitle)
    rates = 100 * counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    for number, (name, values) in enumerate((("images", counts), ("% of the true class", rates))):
        left = edge + number * (edge + side + MARGIN)
        axes = add_axes(figure, left, HEAD + 22, side, side)
        _draw_table(axes, values, "{:,.0f}" if number == 0 else "{:.1f}")
        axes.set_title(name, size=9, color=INK, loc="left")
        axes.set_xticks(range(10), class_names, rotation=40 if has_words else 0, ha="right" if has_words else "center")
        axes.set_yticks(range(10), class_names)
        axes.set_xlabel("predicted", size=8.5, color=GREY)
        axes.set_ylabel("true", size=8.5, color=GREY)
    return figure


def _draw_table(axes: Axes, values: Tensor, form: str) -> None:
    """Numbers (10, 10) in cells, the larger the darker, except on the diagonal."""
    mistakes = values * (1 - torch.eye(len(values), dtype=values.dtype))
    share = (mistakes / (float(mistakes.max()) or 1.0)).sqrt()  # the root lets single mistakes show beside many
    colours = signed(share * 0.95, 1.0)
    colours[range(len(values)), range(len(values))] = 0.95
    axes.imshow(colours.numpy(), interpolation="nearest")
    for row, column in values.nonzero().tolist():
        is_dark = row != column and share[row, column] > 0.6
        colour = "white" if is_dark else GREY if row == column else INK
        text = form.format(float(values[row, column]))
        axes.text(column, row, text, size=7.5, color=colour, ha="center", va="center")
    axes.tick_params(length=0)


def draw_mistakes(mistakes: Mistakes, class_names: Sequence[str], title: str) -> Figure:
    """Images that were taken for something else, with both classes, the confidence, and their place in the test set."""
    columns, pitch = 7, (140, 146)
    rows = max(1, math.ceil(len(mistakes.labels) / columns))
    rate = f"{mistakes.num_mistakes:,} mistakes among {mistakes.num_samples:,} test images"
    subtitle = f"{rate}; the most confident first" if mistakes.num_mistakes else f"{rate}: nothing to show"
    height = HEAD + rows * pitch[1] if mistakes.num_mistakes else HEAD
    figure, axes = new_canvas(2 * MARGIN + columns * pitch[0] - 30, height, title, subtitle)
    if not mistakes.num_mistakes:
        return figure
    places = draw_tiles(axes, on_paper(mistakes.images), left=MARGIN, top=HEAD, columns=columns, pitch=pitch, size=84)
    facts = (mistakes.indices, mistakes.labels, mistakes.predicted, mistakes.confidences)
    for (x, y), index, label, predicted, confidence in zip(places, *(fact.tolist() for fact in facts), strict=True):
        left = x - 43
        axes.text(left, y + 14, f"true {class_names[label]}", size=8, color=INK)
        axes.text(left, y + 28, f"taken for {class_names[predicted]}", size=8, color=LINES[1])
        axes.text(left, y + 41, f"{confidence:.1%}  #{index}", size=7, color=GREY)
    return figure


def draw_architecture(layers: Sequence[LayerCost], title: str) -> Figure:
    """The table of layers: output shapes, parameters, multiply-accumulates, and their sums."""
    rows = as_table(layers)
    line, rights = 22, (0, 0, 520, 640, 760)  # right edges of the columns of numbers
    width, height = 2 * MARGIN + rights[-1], HEAD + line * (len(rows) + 1) + MARGIN
    subtitle = "output shapes are channels x height x width; MAC = multiply-accumulates per image"
    figure, axes = new_canvas(width, height, title, subtitle)
    for number, row in enumerate(rows):
        y = HEAD + line * (number + 0.5) + (6 if number == len(rows) - 1 else 0)
        weight = "bold" if number in (0, len(rows) - 1) else "normal"
        for column, text in enumerate(row):
            x, side = (MARGIN + (0, 110)[column], "left") if column < 2 else (MARGIN + rights[column], "right")
            axes.text(x, y, text, size=8.5, color=INK, weight=weight, ha=side, va="center")
    for y in (HEAD, HEAD + line, HEAD + line * (len(rows) - 1) + 3):
        axes.plot([MARGIN, width - MARGIN], [y, y], color=GREY, linewidth=0.8)
    return figure


def draw_prediction(
    source: npt.NDArray[np.uint8],
    seen: npt.NDArray[np.uint8],
    probabilities: Sequence[float],
    class_names: Sequence[str],
    box: tuple[int, int, int, int],
) -> Figure:
    """Three panels: a person's picture, what the network sees of it, what it says.

    Args:
        source: grey (H, W) or RGB (H, W, 3).
        seen: (28, 28), 255 = ink.
        probabilities: of the ten classes.
        class_names: likewise.
        box: left, top, right, bottom of the digit in `source`.
    """
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    title = f"{class_names[best]}, {probabilities[best]:.1%}"
    figure = new_figure(960, 360, title, "left the picture, with the digit framed")
    picture = add_axes(figure, MARGIN, HEAD, 270, 270)
    network = add_axes(figure, MARGIN + 300, HEAD, 270, 270)
    bars = add_axes(figure, MARGIN + 660, HEAD, 240, 270)
    picture.imshow(source, cmap="gray", vmin=0, vmax=255)
    left, top, right, bottom = (edge - 0.5 for edge in box)
    picture.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=RED, linewidth=1.5)
    network.imshow(seen, cmap="gray_r", vmin=0, vmax=255)
    network.set_title("what the network sees", size=9, color=GREY)
    for axes in (picture, network):
        axes.set(xticks=[], yticks=[])
    rows = range(len(class_names))
    bars.barh(rows, probabilities, color=[BLUE if row == best else PALE for row in rows])
    for row, probability in enumerate(probabilities):
        bars.text(probability + 0.02, row, f"{probability:.1%}", va="center", size=8, color=INK)
    bars.set(xlim=(0, 1.3), xticks=[], yticks=rows)
    bars.set_yticklabels(class_names)
    bars.tick_params(length=0)  # a tick before a number looks like a minus sign
    bars.invert_yaxis()
    bars.set_title("what it says", size=9, color=GREY)
    return figure
