"""Pictures to learn from: coloured circles, squares and triangles of 48x40 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("circle", "square", "triangle")


def draw_shape(kind: str, seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A dark shape somewhere on light ground."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", size, tuple(int(value) for value in rng.integers(150, 256, 3)))
    radius = int(rng.integers(min(size) // 3, min(size) // 2))
    x, y = (int(rng.integers(1, side - radius - 1)) for side in size)
    box, colour = (x, y, x + radius, y + radius), tuple(int(value) for value in rng.integers(0, 120, 3))
    draw = ImageDraw.Draw(picture)
    if kind == "circle":
        draw.ellipse(box, fill=colour)
    elif kind == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x + radius // 2, y), (x, y + radius), (x + radius, y + radius)], fill=colour)
    return picture


def write_shapes(folder: Path, per_class: int = 8, split: str = "") -> Path:
    """`per_class` pictures a class in `folder/split/<class>/`; returns `folder`."""
    for label, kind in enumerate(CLASSES):
        (folder / split / kind).mkdir(parents=True)
        for number in range(per_class):
            seed = 1_000_000 * (split == "test") + 1000 * label + number
            draw_shape(kind, seed).save(folder / split / kind / f"{number}.png")
    return folder
