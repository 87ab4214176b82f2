"""Picture files of digits -> pictures for `see_digits`, upright and of working size.

In: the bytes of a file. Out: a picture in mode L or RGB, or one line that says why there is none.
"""

from __future__ import annotations

import warnings

import numpy as np
from PIL import Image

from mnist.data.picture_file import decode, on_plain_ground

MAX_SIDE = 1600  # larger pictures are reduced to it at once


def read_picture(content: bytes, suffix: str = "") -> Image.Image:
    """The picture in a file, upright, without transparency, in mode L or RGB, of working size.

    Args:
        content: of the file.
        suffix: of its name; says what a file may be that is not read here.

    Raises:
        PictureError: not a picture, damaged, cut short, or too large.
    """
    with warnings.catch_warnings(action="ignore"):
        return decode(content, suffix, MAX_SIDE, _ink_on_paper)


def _ink_on_paper(image: Image.Image) -> Image.Image:
    """Mode L or RGB. What is drawn in the alpha channel alone counts as ink, else transparent pixels become paper."""
    if not image.has_transparency_data:
        return on_plain_ground(image)
    rgba = image.convert("RGBA")
    alpha = np.asarray(rgba.getchannel("A"))
    opaque = np.asarray(rgba.convert("L"))[alpha > 127]
    if opaque.size and np.ptp(np.percentile(opaque, (2, 98))) < 50 and alpha.min() < 128:
        return Image.fromarray(255 - alpha)
    paper = Image.new("RGBA", rgba.size, (int(np.median(opaque)) if opaque.size else 255,) * 3 + (255,))
    return Image.alpha_composite(paper, rgba).convert("RGB")
