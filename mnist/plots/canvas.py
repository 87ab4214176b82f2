"""What all pictures are drawn with: figures and axes measured in pixels, images as tiles, colours.

In: sizes, texts, tensors. Out: matplotlib's figures and axes. Matplotlib takes half a second to import, so that it is
imported where the first figure is made; its global state (pyplot) is left alone. Letters: N images, H and W sides.
"""

from __future__ import annotations

import importlib
import math
import os
import unicodedata
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
INK, GREY, PALE = "#222222", "#707070", "#d8d8d8"
RED, BLUE = (0.70, 0.09, 0.17), (0.13, 0.40, 0.67)  # told apart by colour-blind people too
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito 2008
MARGIN, HEAD = 24, 64  # pixels around a picture, and for its title
LABEL = 170  # pixels for the label of a row
TILE, GAP = 64, 6  # pixels of a map at most, and between two maps
PITCH = TILE + 2 + GAP
ROW_GAP = 14


def new_figure(width: int, height: int, title: str, subtitle: str) -> Figure:
    """A white figure of so many pixels with its title."""
    figure: Figure = _matplotlib_figure().Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    figure.text(MARGIN / width, 1 - 20 / height, title, size=11, weight="bold", color=INK, va="center")
    figure.text(MARGIN / width, 1 - 42 / height, subtitle, size=8.5, color=GREY, va="center")
    return figure


def _matplotlib_figure() -> Any:
    """The module, imported without $MPLBACKEND: notebooks set it to one of theirs, which need not exist here."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        return importlib.import_module("matplotlib.figure")
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def new_canvas(width: int, height: int, title: str, subtitle: str) -> tuple[Figure, Axes]:
    """A figure with axes all over it that count pixels from its upper left corner."""
    figure = new_figure(width, height, title, subtitle)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])  # making ticks that are not drawn takes time
    axes.autoscale(False)
    axes.axis("off")
    return figure, axes


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place that is given in pixels from the upper left corner."""
    full_width, full_height = figure.get_size_inches() * DPI
    place = (left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height)
    axes = figure.add_axes(place, facecolor="white")  # whatever the user's own style is
    axes.tick_params(labelsize=8, colors=INK, length=2)
    for spine in axes.spines.values():
        spine.set_color(PALE)
    return axes


def as_rgb(pixels: Tensor) -> Tensor:
    """Pixels 0..255 (N, H, W) or (N, C, H, W) -> RGB (N, H, W, 3) in [0, 1]; one channel is black ink on white."""
    shares = (pixels.detach().cpu().float() / 255).clamp(0, 1)
    if shares.ndim == 4 and shares.shape[1] == 3:
        return shares.permute(0, 2, 3, 1)
    grey = shares.mean(dim=1) if shares.ndim == 4 else shares
    return (1 - grey).unsqueeze(-1).expand(-1, -1, -1, 3)


def signed(values: Tensor, limit: float) -> Tensor:
    """Numbers (..., ) in -limit..limit -> RGB (..., 3): blue below zero, white at zero, red above."""
    share = (values.detach().cpu().float() / (limit or 1.0)).clamp(-1, 1).unsqueeze(-1)
    return 1 - share.abs() * (1 - torch.where(share > 0, torch.tensor(RED), torch.tensor(BLUE)))


def draw_tiles(
    axes: Axes, tiles: Tensor, *, left: int, top: int, columns: int, pitch: tuple[int, int], size: int
) -> list[tuple[int, int]]:
    """Puts framed tiles into a grid, every pixel of a tile a square of whole pixels of the picture.

    Args:
        axes: counting pixels.
        tiles: RGB (N, H, W, 3).
        left: of the grid, in pixels.
        top: likewise.
        columns: tiles in a row.
        pitch: from tile to tile, across and down.
        size: width of a tile at most; tiles with more pixels are made smaller.

    Returns:
        Where the lower edge of each tile has its middle.
    """
    if tiles.shape[2] > size:
        scale = size / tiles.shape[2]
        tiles = F.interpolate(tiles.permute(0, 3, 1, 2), scale_factor=scale, mode="area").permute(0, 2, 3, 1)
    zoom = max(1, size // tiles.shape[2])
    framed = F.pad(
        tiles.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2), (0, 0, 1, 1, 1, 1), value=0.72
    )  # (N, zoom H + 2, zoom W + 2, 3)
    num_tiles, height, width = framed.shape[:3]
    rows = math.ceil(num_tiles / columns)
    grid = framed.new_ones((rows * columns, pitch[1], pitch[0], 3))
    grid[:num_tiles, :height, :width] = framed
    picture = grid.view(rows, columns, *grid.shape[1:]).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    extent = (left, left + columns * pitch[0], top + rows * pitch[1], top)
    axes.imshow(picture.mul(255).byte().numpy(), extent=extent, aspect="auto", interpolation="nearest")
    places = (divmod(tile, columns) for tile in range(num_tiles))
    return [(left + column * pitch[0] + width // 2, top + row * pitch[1] + height) for row, column in places]


def text_width(text: str, size: float) -> float:
    """About how many pixels a text takes in a font of so many points; measuring it would take longer than drawing."""
    ems = sum(1.0 if unicodedata.east_asian_width(letter) in "WF" else 0.6 for letter in text)
    return ems * size * DPI / 72


def fit(text: str, width: float, size: float) -> str:
    """`text`, cut where it is wider than so many pixels in a font of so many points."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(f"{text}…", size) > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def draw_label(axes: Axes, top: float, name: str, *lines: str) -> None:
    """The label at the left of a row: a name, and what there is to say about it."""
    axes.text(MARGIN, top, name, size=9 if len(name) <= 22 else 6.5, weight="bold", color=INK, va="top")
    axes.text(MARGIN, top + 17, "\n".join(lines), size=7.5, color=GREY, va="top", linespacing=1.3)
