"""Any picture of digits -> the form of MNIST: 28x28, light on black, 20 pixels long, centred by mass.

In: a picture as `read_picture` returns it: ink on paper or chalk on a board, anywhere in the frame, unevenly lit, in a
printed box or not. Out: a `SeenDigit` for each digit, whose pixels are what a network trained on MNIST expects; a
picture that is already in MNIST's form is taken as it is, bit for bit. Letters: H, W rows and columns of the picture,
once it has its working size.

The steps: grey values in which ink stands out, the paper's brightness at every pixel, and ink = what differs from it
(ink.py); connected pieces of ink, without frames, grouped into digits (pieces.py); a closer look at each digit, which
is brought to MNIST's frame in one resampling (here).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from mnist.config import MNIST_SIDE
from mnist.data.picture_file import PictureError
from mnist.predict.ink import Array, BlankError, Box, blur, find_ink, normalised, widened
from mnist.predict.pieces import INK_SHARE, FoundDigit, Mask, find_digits, pieces_of

LOOK_SIDES = (224, 448, 896)  # the longer side of what is looked at, in pixels; the larger ones where nothing was found
MIN_STROKE, MAX_STROKE = 1.6, 6.0  # pixels of the 20; strokes outside this range are made thicker or thinner
MASS_CENTRE = 14.5  # pixels from the edge, where MNIST's digits have it on the average
BLANK = "blank: nothing in it stands out like ink from paper"
NO_BOX = Box(0, 0, 0, 0)  # the whole picture is shown


@dataclass(frozen=True)
class SeenDigit:
    """What a network is shown of a picture.

    Attributes:
        pixels: uint8 (28, 28), light on black; of a whole picture (C, H, W).
        box: where the digit was found, in the picture as `read_picture` returns it.
        warning: why the digit may not be what was meant, or None.
    """

    pixels: npt.NDArray[np.uint8]
    box: Box
    warning: str | None = None


def see_digits(picture: Image.Image) -> list[SeenDigit]:
    """Finds the digits in a picture, row by row from left to right, and brings them to MNIST's form.

    Args:
        picture: as `read_picture` returns it.

    Raises:
        PictureError: the picture is blank, or holds nothing but a frame.
    """
    pixels = _as_it_is(picture)
    if pixels is not None:
        return [SeenDigit(pixels, Box(0, 0, MNIST_SIDE, MNIST_SIDE))]
    longest = max(picture.size)
    for side in dict.fromkeys(min(side, max(longest, LOOK_SIDES[0])) for side in LOOK_SIDES):
        with contextlib.suppress(BlankError):
            ink, zoom = find_ink(picture, Box(0, 0, *picture.size), side)
            return [_look_closer(picture, digit, zoom, side) for digit in find_digits(normalised(ink))]
    raise PictureError(BLANK)


def _look_closer(picture: Image.Image, digit: FoundDigit, zoom: float, side: int) -> SeenDigit:
    """Cuts a digit out of its picture, without what lies around it."""
    box = Box(*(round(edge / zoom) for edge in digit.box))
    margin = round(0.5 * max(box.width, box.height)) + 2
    left, top = max(0, box.left - margin), max(0, box.top - margin)
    part = Box(left, top, min(box.right + margin, picture.width), min(box.bottom + margin, picture.height))
    ink, closer = find_ink(picture, part, side)
    known = Image.fromarray(digit.mask)
    size, place = ink.shape[::-1], [min(edge * zoom, known.size[i % 2]) for i, edge in enumerate(part)]
    near = np.asarray(known.convert("L").resize(size, Image.Resampling.BILINEAR, box=place)) > 127  # type: ignore[arg-type]
    ink = normalised(np.where(widened(near, 9), ink, np.minimum(ink, 0)))
    labels, pieces = pieces_of(ink, 0.02)
    mask = np.isin(labels, [piece.label for piece in pieces])
    rows, columns = np.nonzero(mask)
    edges = (left, columns.min()), (top, rows.min()), (left, columns.max() + 1), (top, rows.max() + 1)
    seen = Box(*(start + round(edge / closer) for start, edge in edges))
    return SeenDigit(_to_mnist_frame(ink, mask), seen, digit.warning)


def _as_it_is(picture: Image.Image) -> npt.NDArray[np.uint8] | None:
    """The pixels of a picture in MNIST's own form, else None.

    That form is 28x28, grey, with a black border, and either larger than the 20 pixels of a digit (clothes are) or
    centred by mass.
    """
    if picture.size != (MNIST_SIDE, MNIST_SIDE):
        return None
    channels: npt.NDArray[np.uint8] = np.asarray(picture).reshape(MNIST_SIDE, MNIST_SIDE, -1)
    pixels = channels[:, :, 0]
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if (channels != channels[:, :, :1]).any() or np.median(border) > 32 or pixels.max() < 128:
        return None
    rows, columns = np.nonzero(pixels)
    if max(np.ptp(rows), np.ptp(columns)) >= 20:
        return pixels
    mass = pixels[rows, columns].astype(np.float64)
    offset = max(abs(np.average(rows, weights=mass) - 13.75), abs(np.average(columns, weights=mass) - 13.75))
    return pixels if offset <= 1 else None


def _to_mnist_frame(ink: Array, mask: Mask) -> npt.NDArray[np.uint8]:
    """The chosen ink as uint8 (28, 28): 20 pixels long, strokes at 255, centred by mass."""
    level = float(np.percentile(ink[mask & (ink > INK_SHARE)], 50))  # thinner strokes than the blur leave paper in mask
    clean = np.clip((ink / level - 0.15) / 0.8, 0, 1) * widened(mask, 5)
    side = max(np.ptp(axis) + 1 for axis in np.nonzero(mask))
    edges = np.count_nonzero(np.diff(mask, axis=0)) + np.count_nonzero(np.diff(mask, axis=1))
    stroke = 2 * np.count_nonzero(mask) / (edges * np.pi / 4) / side * 20  # of 20 pixels; area / half the outline
    if stroke < MIN_STROKE:
        clean = widened(clean, 1 + round((MIN_STROKE - stroke) * side / 20))
    if stroke > MAX_STROKE:
        clean = 1 - widened(1 - clean, 1 + round((stroke - MAX_STROKE) * side / 20))
    return _centred(clean)


def _centred(clean: Array) -> npt.NDArray[np.uint8]:
    rows, columns = np.nonzero(blur(clean, 1) > 0.25)
    if not len(rows):
        raise PictureError(BLANK)
    zoom = (max(np.ptp(rows), np.ptp(columns)) + 1) / 20
    centre_y, centre_x = ndimage.center_of_mass(clean)
    margin = round(15 * zoom) + 1
    left, top = (centre + 0.5 - MASS_CENTRE * zoom + margin for centre in (centre_x, centre_y))
    padded = Image.fromarray(np.pad(clean, margin).astype(np.float32))
    frame = (left, top, left + MNIST_SIDE * zoom, top + MNIST_SIDE * zoom)
    small = np.asarray(padded.resize((MNIST_SIDE, MNIST_SIDE), Image.Resampling.BOX, box=frame))
    return (small.clip(0, 1) * 255).round().astype(np.uint8)
