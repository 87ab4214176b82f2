"""Drawings of what networks see and say, with matplotlib, which is imported only when a drawing is asked for.

In: arrays and plain numbers. Out: a figure, or a file. Nothing opens a window, nothing keeps global state.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mnist.config import UserError
from mnist.files import write_atomically

INK, PALE, ACCENT = "#1f2933", "#9fb3c8", "#d64545"


def _new_figure(width: float, height: float) -> Any:
    """A figure of so many inches that draws into memory."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def draw_prediction(
    source: Image.Image | npt.NDArray[np.uint8],
    seen: npt.NDArray[np.uint8],
    probabilities: Sequence[float],
    class_names: Sequence[str],
    box: tuple[int, int, int, int] | None = None,
) -> Any:
    """Three panels: the picture, what the network sees of it, what it says.

    Args:
        source: the picture, of any size.
        seen: uint8 (28, 28).
        probabilities: one per class, in [0, 1].
        class_names: likewise.
        box: left, top, right, bottom of the digit in `source`, to be marked.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    figure = _new_figure(10, 3.6)
    picture, network, bars = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    picture.imshow(np.asarray(source), cmap="gray", vmin=0, vmax=255)
    picture.set_title("the picture")
    if box is not None:
        left, top, right, bottom = box
        corners = ([left, right, right, left, left], [top, top, bottom, bottom, top])
        picture.plot(*(np.array(axis) - 0.5 for axis in corners), color=ACCENT, linewidth=1.5)
    network.imshow(seen, cmap="gray", vmin=0, vmax=255)
    network.set_title("what the network sees")
    for axes in (picture, network):
        axes.set_xticks([])
        axes.set_yticks([])
    best = int(np.argmax(probabilities))
    bars.barh(range(len(class_names)), probabilities, color=[ACCENT if k == best else PALE for k in range(10)])
    for k, p in enumerate(probabilities):
        bars.text(p + 0.02, k, f"{p:.1%}", va="center", fontsize=8, color=INK)
    bars.set_yticks(range(len(class_names)), class_names)
    bars.set_xlim(0, 1.2)
    bars.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    bars.invert_yaxis()
    bars.spines[["top", "right"]].set_visible(False)
    bars.set_title(f"what it says: {class_names[best]}")
    return figure


def save_picture(figure: Any, path: Path) -> None:
    """Writes a figure; the suffix of the file says of which kind (png, pdf, svg, jpg).

    Raises:
        UserError: an unknown kind, or not writable.
    """
    content = io.BytesIO()
    try:
        figure.savefig(content, format=path.suffix[1:] or "png", dpi=120)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: picture not written ({' '.join(str(error).split())})") from error
