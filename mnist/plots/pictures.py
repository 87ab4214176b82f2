"""Drawing: tensors and plain numbers in, a matplotlib figure out.

In: what a run or a network has to show. Out: `Figure`, and with `save_picture` a file. In all pictures positive values
are red, negative ones blue, zero is white. Letters: N images.
"""

from __future__ import annotations

import importlib
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mnist.data.batches import Split
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
    add_axes,
    as_rgb,
    draw_label,
    draw_tiles,
    fit,
    new_canvas,
    new_figure,
    signed,
    text_width,
)
from mnist.plots.features import INPUT, describe_shape
from mnist.system.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
MOST_MAPS, MOST_FILTERS = 32, 64  # of one layer
COLUMNS = 16  # of maps
MAPS_WIDTH = COLUMNS * PITCH - GAP  # in pixels
# Where matplotlib's own font lacks a letter of a class name, the first of these that is installed has it.
FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "Yu Gothic", "Microsoft YaHei", "Arial Unicode MS")
SMALL_PITCH, LEAST_PITCH = 40, MAPS_WIDTH // 40  # pixels from map to map of several images, and from filter to filter


def save_picture(figure: Figure, path: Path) -> Path:
    """Writes a figure as .png, .pdf or .svg, whole or not at all; returns `path`.

    Raises:
        RunError: `path` cannot be written.
    """
    buffer = io.BytesIO()
    kind = path.suffix[1:].lower()
    quick: dict[str, Any] = {"pil_kwargs": {"compress_level": 2}} if kind == "png" else {}  # a little larger
    installed = {font.name for font in importlib.import_module("matplotlib.font_manager").fontManager.ttflist}
    for text in figure.findobj(importlib.import_module("matplotlib.text").Text):
        text.set(parse_math=False, usetex=False)  # names of runs and classes may hold any character
        if not text.get_text().isascii():
            text.set_fontfamily([*text.get_fontfamily(), *(font for font in FONTS if font in installed)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # drawn as a box
        figure.savefig(buffer, format=kind, dpi=DPI, **quick)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise RunError(f"{path}: picture not written ({error.strerror or error})") from error
    return path


def draw_samples(
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    title: str,
    subtitle: str,
    *,
    augmented: Tensor | None = None,
) -> Figure:
    """Images (N, H, W) or (N, C, H, W) in 0..255 in a grid of ten columns, with their labels (N,).

    `augmented`, of the same shape, is shown below them.
    """
    columns, tiles, size = 10, as_rgb(images), 56
    if augmented is not None:
        tiles = torch.cat([tiles, torch.full_like(tiles[:, :1], 0.73), as_rgb(augmented)], dim=1)
    pitch = (size + 22, round(size / tiles.shape[2] * tiles.shape[1]) + 24)
    rows = math.ceil(len(tiles) / columns)
    width, height = 2 * MARGIN + columns * pitch[0] - 20, HEAD + rows * pitch[1] + MARGIN // 2
    figure, axes = new_canvas(width, height, title, subtitle)
    places = draw_tiles(axes, tiles, left=MARGIN, top=HEAD, columns=columns, pitch=pitch, size=size)
    for (x, y), label in zip(places, labels.tolist(), strict=True):
        axes.text(x, y + 13, fit(class_names[label], pitch[0], 7.5), size=7.5, color=INK, ha="center")
    return figure


@dataclass(frozen=True)
class _Block:
    """A layer's place in a picture: its label, RGB tiles (N, H, W, 3) in a grid or vectors (N, units) as bars."""

    name: str
    lines: list[str]
    content: Tensor
    columns: int = 1
    pitch: int = PITCH

    @property
    def height(self) -> int:
        """In pixels, the label included."""
        return max(math.ceil(len(self.content) / self.columns) * self.pitch, 16 * (len(self.lines) + 1))


def _draw_blocks(blocks: Sequence[_Block], gap: int, foot: int, title: str, subtitle: str) -> tuple[Figure, int]:
    """A figure with one block below the other and `foot` pixels of room below them, and where that begins."""
    left, top = MARGIN + LABEL, HEAD
    height = top + sum(block.height + gap for block in blocks) + foot
    figure, axes = new_canvas(left + MAPS_WIDTH + MARGIN, height, title, subtitle)
    for block in blocks:
        draw_label(axes, top, block.name, *block.lines)
        pitch = (block.pitch, block.pitch)
        if block.content.ndim == 4:
            size = block.pitch - 4
            draw_tiles(axes, block.content, left=left, top=top, columns=block.columns, pitch=pitch, size=size)
        else:
            for row, values in enumerate(block.content):
                _draw_bars(axes, values, left=left, top=top + row * block.pitch, height=block.pitch - 2)
        top += block.height + gap
    return figure, top


def draw_features(
    outputs: Mapping[str, Tensor], class_names: Sequence[str], title: str, subtitle: str, captions: Sequence[str]
) -> Figure:
    """What N images become from layer to layer: maps as tiles, vectors as bars, the logits over the classes.

    `outputs` are by layer (N, channels, height, width) or (N, units), first "input", last the logits; `captions` are
    written beside the logits of the images where there are several.
    """
    *hidden, logits_name = outputs
    logits = outputs[logits_name].detach().cpu().float()
    slot = MAPS_WIDTH / logits.shape[1]
    names = [fit(name, max(slot, 120), 8) for name in class_names]
    is_turned = any(text_width(name, 8) > slot for name in names)
    foot = (130 if len(logits) == 1 else 30 + 22 * len(logits)) + 70 * is_turned
    blocks = [_feature_block(name, outputs[name].detach().cpu().float()) for name in hidden]
    figure, top = _draw_blocks(blocks, ROW_GAP, foot + ROW_GAP, title, subtitle)
    draw_label(figure.axes[0], top, logits_name, f"{logits.shape[1]} logits", "and probabilities" * (len(logits) == 1))
    if len(logits) == 1:
        axes = add_axes(figure, MARGIN + LABEL, top, MAPS_WIDTH, foot - 30 - 70 * is_turned)
        _draw_logits(axes, logits[0], names)
    else:
        left = min(520, max(210, 14 + round(max(text_width(text, 8) for text in captions))))
        axes = add_axes(figure, MARGIN + LABEL + left, top, MAPS_WIDTH - left, 22 * len(logits))
        rows = [fit(text, left, 8) for text in captions]
        _draw_table(axes, 100 * logits.softmax(dim=1), "{:.0f}", names, rows, diagonal=False)
        axes.set_xlabel("probabilities, %", size=8, color=GREY)
    if is_turned:
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    return figure


def _feature_block(name: str, values: Tensor) -> _Block:
    """The output of a layer for N images: all maps of one image, or a row of maps for each of several."""
    lines = [describe_shape(values.shape[1:]), f"{float(values.min()):.2g} to {float(values.max()):.2g}"]
    is_single, pitch = len(values) == 1, PITCH if len(values) == 1 else SMALL_PITCH
    if values.ndim != 4:
        return _Block(name, lines, values.flatten(1), pitch=48 if is_single else 24)
    if name == INPUT and values.shape[1] in (1, 3):  # from white for the least value to black
        low, high = values.min(), values.max()
        return _Block(
            name, lines, as_rgb(255 * (values - low) / (high - low).clamp(min=1e-6)), MAPS_WIDTH // pitch, pitch
        )
    shown = values[:, : MOST_MAPS if is_single else MAPS_WIDTH // pitch]
    num_shown = shown.shape[1]
    lines += [f"first {num_shown} of {values.shape[1]} maps"] if num_shown < values.shape[1] else []
    columns = math.ceil(num_shown / math.ceil(num_shown / COLUMNS)) if is_single else num_shown  # rows of equal length
    return _Block(name, lines, signed(shown.flatten(0, 1), float(shown.abs().max())), columns, pitch)


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
    """Logits (classes,) as bars over the classes, the largest one in colour, with their probabilities."""
    winner, places = int(logits.argmax()), range(len(logits))
    colours = [LINES[0] if k == winner else "#b0b0b0" for k in places]
    bars = axes.bar(places, logits.tolist(), color=colours, width=0.7)
    form = "{:.1%}" if len(logits) <= 30 else "{:.0%}"  # as there is room
    axes.bar_label(bars, [form.format(p) for p in logits.softmax(dim=0).tolist()], size=7.5, color=INK, padding=2)
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.set_xticks(places, class_names)
    axes.margins(x=0.01, y=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def draw_filters(weights: Mapping[str, Tensor], title: str, subtitle: str) -> Figure:
    """The weights of layers, (outputs, inputs per group, height, width), as small images, an input a row.

    Those of a first layer that sees colours are shown in colour.
    """
    blocks = [
        _colour_block(name, weight) if number == 0 and weight.shape[1] == 3 else _filter_block(name, weight)
        for number, (name, weight) in enumerate(weights.items())
    ]
    return _draw_blocks(blocks, 2 * ROW_GAP, 0, title, subtitle)[0]


def _colour_block(name: str, weight: Tensor) -> _Block:
    """Filters (outputs, 3, height, width) of red, green and blue, in rows of sixteen; grey is zero."""
    shown = weight[:MOST_FILTERS].detach().cpu().float()
    limit = float(shown.abs().flatten()[: 2**20].quantile(0.995))
    lines = [f"{len(weight)} filters, {weight.shape[2]}x{weight.shape[3]}", "of red, green and blue"]
    lines += [f"grey is 0, black {-limit:.2g}"] + ([f"first {len(shown)} shown"] if len(shown) < len(weight) else [])
    return _Block(name, lines, as_rgb(127.5 * (1 + shown / (limit or 1.0))), COLUMNS, PITCH)


def _filter_block(name: str, weight: Tensor) -> _Block:
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
    return _Block(name, lines, tiles, columns, pitch)


def draw_confusion(confusion: Sequence[Sequence[int]], class_names: Sequence[str], title: str) -> Figure:
    """Two tables of how many images of class i were taken for class j: counts, and shares of each true class."""
    counts = torch.tensor(confusion, dtype=torch.float64)
    num_samples, num_mistakes = int(counts.sum()), int(counts.sum() - counts.diagonal().sum())
    names = [fit(name, 150, 8) for name in class_names]
    longest = round(max(text_width(name, 8) for name in names))
    side, has_words = max(430, 26 * len(names)), longest > 30
    edge, foot = 44 + longest, 40 + round(0.7 * longest) if has_words else 56
    width = 2 * (edge + side) + 2 * MARGIN
    subtitle = f"{num_mistakes:,} mistakes among {num_samples:,} test images; only mistakes are coloured"
    figure = new_figure(width, HEAD + 22 + side + foot, title, subtitle)
    rates = 100 * counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    for number, (name, values) in enumerate((("images", counts), ("% of the true class", rates))):
        left = edge + number * (edge + side + MARGIN)
        axes = add_axes(figure, left, HEAD + 22, side, side)
        _draw_table(axes, values, "{:,.0f}" if number == 0 else "{:.1f}", names, names, diagonal=True)
        axes.set_title(name, size=9, color=INK, loc="left")
        if has_words:
            axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_xlabel("predicted", size=8.5, color=GREY)
        axes.set_ylabel("true", size=8.5, color=GREY)
    return figure


def _draw_table(
    axes: Axes, values: Tensor, form: str, columns: Sequence[str], rows: Sequence[str], *, diagonal: bool
) -> None:
    """Numbers (rows, columns) in cells, the larger the darker; with `diagonal`, that one is not coloured."""
    coloured = values.clone()
    if diagonal:
        coloured.fill_diagonal_(0)
    share = (coloured / (float(coloured.max()) or 1.0)).sqrt()  # the root lets single mistakes show beside many
    colours = signed(share * 0.95, 1.0)
    if diagonal:
        colours[range(len(values)), range(len(values))] = 0.95
    axes.imshow(colours.numpy(), interpolation="nearest", aspect="auto")
    for row, column in values.nonzero().tolist():
        is_pale = diagonal and row == column
        colour = GREY if is_pale else "white" if share[row, column] > 0.6 else INK
        number = form.format(float(values[row, column])).replace("100.0", "100")  # which is wider than its cell
        axes.text(column, row, number, size=7.5, color=colour, ha="center", va="center")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)


def draw_mistakes(
    split: Split, mistakes: tuple[Tensor, Tensor, Tensor], class_names: Sequence[str], title: str
) -> Figure:
    """What `find_mistakes` has found in a split: images, both classes, the confidence, and the place in the split."""
    columns, pitch, line = 7, (140, 146), 14
    wrong, predicted, confidences = mistakes
    shown = wrong[: 4 * columns]
    rate = f"{len(wrong):,} mistakes among {len(split):,} test images"
    subtitle = f"{rate}; the most confident first" if len(wrong) else f"{rate}: nothing to show"
    height = HEAD + math.ceil(len(shown) / columns) * pitch[1]
    figure, axes = new_canvas(2 * MARGIN + columns * pitch[0] - 30, height, title, subtitle)
    if not len(shown):
        return figure
    tiles = as_rgb(split.images[shown])
    places = draw_tiles(axes, tiles, left=MARGIN, top=HEAD, columns=columns, pitch=pitch, size=84)
    facts = (fact.tolist() for fact in (shown, split.labels[shown], predicted[shown], confidences[shown]))
    for (x, y), index, label, guess, confidence in zip(places, *facts, strict=True):
        left = x - 43
        axes.text(left, y + line, fit(f"true {class_names[label]}", pitch[0] - 6, 8), size=8, color=INK)
        taken_for = fit(f"taken for {class_names[guess]}", pitch[0] - 6, 8)
        axes.text(left, y + 2 * line, taken_for, size=8, color=LINES[1])
        axes.text(left, y + 3 * line, f"{confidence:.1%}  #{index}", size=7, color=GREY)
    return figure


def draw_pixels(image: Tensor, title: str, subtitle: str) -> Figure:
    """The numbers 0..255 of an image (H, W) or (C, H, W), one channel below the other, each on its own grey."""
    pixels = image.detach().cpu().reshape(-1, image.shape[-1])
    cell = 24
    height, width = (cell * side for side in pixels.shape)
    figure = new_figure(width + 2 * MARGIN, height + HEAD + MARGIN, title, subtitle)
    axes = add_axes(figure, MARGIN, HEAD, width, height)
    axes.imshow(as_rgb(pixels.unsqueeze(0))[0].numpy(), interpolation="nearest", aspect="auto")
    for row, values in enumerate(pixels.tolist()):
        for column, value in enumerate(values):
            colour = "white" if value > 127 else INK if value else PALE
            axes.text(column, row, str(round(value)), size=6.5, color=colour, ha="center", va="center")
    axes.set(xticks=[], yticks=[])
    return figure
