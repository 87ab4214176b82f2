"""Picture files of digits -> upright pictures, and what in them is ink.

In: the bytes of a file. Out: a picture in mode L or RGB, or one line that says why there is none; and the ink in a part
of it, whatever the colours of ink and paper, and however it is lit. Letters: H, W rows and columns of that part.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from scipy import ndimage

from mnist.data.picture_file import decode, on_plain_ground

MAX_SIDE = 1600  # larger pictures are reduced to it at once
STROKE_SHARE = 0.3  # strokes are thinner than this share of the frame's shorter side, shadows are wider
MIN_CONTRAST = 0.06  # of the brightness range; below it a picture is blank
MIN_CONTRAST_NOISE = 1.15  # ... and below this many standard deviations of its noise, of which a blur leaves 0.23

Array = npt.NDArray[Any]


class BlankError(Exception):
    """Nothing stands out at this size of the picture."""


class Box(NamedTuple):
    """A rectangle in pixels; `right` and `bottom` are the first column and row outside it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """In pixels."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """In pixels."""
        return self.bottom - self.top

    def union(self, other: Box) -> Box:
        """The smallest box that holds both."""
        return Box(*map(min, self[:2], other[:2]), *map(max, self[2:], other[2:]))

    def distance(self, other: Box) -> int:
        """Pixels of paper between two boxes, 0 where they overlap."""
        across = max(self.left - other.right, other.left - self.right)
        return max(0, across, self.top - other.bottom, other.top - self.bottom)


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


def find_ink(picture: Image.Image, part: Box, side: int) -> tuple[Array, float]:
    """Finds the ink in a part of a picture, enlarged or reduced so that its longer side becomes `side` pixels.

    Returns:
        The ink (H, W), 0 = paper, more = ink, whether darker or lighter than the paper; and how much was enlarged.

    Raises:
        BlankError: nothing stands out from the noise.
    """
    zoom = side / max(part.width, part.height)
    width, height = (max(8, round(length * zoom)) for length in (part.width, part.height))
    resample = Image.Resampling.BOX if zoom < 1 else Image.Resampling.BICUBIC
    return _ink_of(_grey(picture.resize((width, height), resample, box=part))), zoom


def _grey(picture: Image.Image) -> Array:
    """(H, W) in 0..1: the mixture of red, green and blue in which ink and paper differ most."""
    rgb = np.asarray(picture, np.float32) / 255
    if rgb.ndim == 2:
        return rgb
    around = np.asarray(picture.filter(ImageFilter.BoxBlur(min(picture.size) * STROKE_SHARE / 2)), np.float32) / 255
    differences = (rgb - around).reshape(-1, 3)
    weighted = differences * (differences**2).sum(axis=1, keepdims=True)
    direction = np.linalg.eigh(weighted.T @ differences)[1][:, -1]
    mixture = np.clip(direction * np.sign(direction.sum()), 0, None)
    return np.asarray(rgb @ (mixture / max(mixture.sum(), 1e-9)), np.float32)


def _ink_of(grey: Array) -> Array:
    smooth = blur(grey, 1)
    size = max(3, round(min(grey.shape) * STROKE_SHARE))
    exposure = np.log(smooth + 0.1)  # so that light and shadow weigh the same on both sides of their edge
    if ((exposure - blur(exposure, size // 2)) ** 3).sum() > 0:  # ink is what there is less of: here, what is light
        ink = grey + _closing(-smooth, size)
    else:
        ink = 1 - grey / np.maximum(_closing(smooth, size), 0.02)  # light and shadow are factors
    ink = ink - np.median(ink)
    noise = 1.05 * float(np.median(np.abs(np.diff(ink, axis=1))))  # its standard deviation, unmoved by strokes
    if strongest(ink) < max(MIN_CONTRAST, MIN_CONTRAST_NOISE * noise):
        raise BlankError
    return np.asarray(ink)


def strongest(ink: Array) -> float:
    """The mean of the forty pixels with most ink."""
    return float(np.sort(blur(ink, 1), axis=None)[-40:].mean())


def normalised(ink: Array) -> Array:
    """1 = the strongest ink."""
    return np.asarray(ink / max(strongest(ink), 1e-6))


def _closing(a: Array, size: int) -> Array:
    """Fills what is dark and narrower than `size`; keeps gradients and edges."""
    closed = ndimage.grey_closing(np.pad(a, size, mode="edge"), size)
    return np.asarray(closed[size:-size, size:-size])


def blur(a: Array, radius: int) -> Array:
    """Mean over squares of 2 radius + 1 pixels, twice over (which is nearly a Gaussian); edges continued."""
    size = 2 * radius + 1
    return np.asarray(ndimage.uniform_filter(ndimage.uniform_filter(a, size, mode="nearest"), size, mode="nearest"))


def widened(a: Array, size: int) -> Array:
    """The maximum over a square of `size` pixels around each pixel."""
    return np.asarray(ndimage.maximum_filter(a, size))
