"""Any picture of digits -> the form of MNIST: 28x28, light on black, 20 pixels long, centred by mass.

In: a picture as `read_picture` returns it: ink on paper or chalk on a board, anywhere in the frame, unevenly lit, in a
printed box or not. Out: a `SeenDigit` for each digit, whose pixels are what a network trained on MNIST expects; a
picture that is already in MNIST's form is taken as it is, bit for bit. Letters: H, W rows and columns of the picture,
once it has its working size.

The steps: grey values in which ink stands out; the paper's brightness at every pixel, by morphology; ink = what differs
from it; connected pieces of ink, without frames, grouped into digits; a closer look at each digit, which is brought to
MNIST's frame in one resampling.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from scipy import ndimage

from mnist.config import MNIST_SIDE
from mnist.data.picture_file import PictureError

LOOK_SIDES = (224, 448, 896)  # the longer side of what is looked at, in pixels; the larger ones where nothing was found
STROKE_SHARE = 0.3  # strokes are thinner than this share of the frame's shorter side, shadows are wider
INK_SHARE = 0.4  # of the strongest ink: what has more of it is a stroke
MIN_CONTRAST = 0.06  # of the brightness range; below it a picture is blank
MIN_CONTRAST_NOISE = 1.15  # ... and below this many standard deviations of its noise, of which a blur leaves 0.23
MIN_STROKE, MAX_STROKE = 1.6, 6.0  # pixels of the 20; strokes outside this range are made thicker or thinner
MASS_CENTRE = 14.5  # pixels from the edge, where MNIST's digits have it on the average
BLANK = "blank: nothing in it stands out like ink from paper"
NEIGHBOURS = np.ones((3, 3))  # pixels that touch at a corner are connected

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Box = tuple[int, int, int, int]  # left, top, right, bottom
NO_BOX = (0, 0, 0, 0)  # the whole picture is shown


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
        return [SeenDigit(pixels, (0, 0, MNIST_SIDE, MNIST_SIDE))]
    longest = max(picture.size)
    for side in dict.fromkeys(min(side, max(longest, LOOK_SIDES[0])) for side in LOOK_SIDES):
        with contextlib.suppress(_BlankError):
            ink, zoom = _look(picture, (0, 0, *picture.size), side)
            found = _in_reading_order(_find_digits(_normalised(ink)))
            return [_look_closer(picture, digit, zoom, side) for digit in found]
    raise PictureError(BLANK)


class _BlankError(Exception):
    """Nothing stands out at this size of the picture."""


@dataclass(frozen=True, eq=False)
class _Digit:
    """What was found in a picture of working size: which of its pixels are the digit's (H, W), and where."""

    mask: Mask
    box: Box
    warning: str | None


def _look(picture: Image.Image, part: Box, side: int) -> tuple[Array, float]:
    """The ink in a part of a picture, of which the longer side becomes `side`, and how much it was enlarged."""
    zoom = side / max(part[2] - part[0], part[3] - part[1])
    width, height = (max(8, round((part[i + 2] - part[i]) * zoom)) for i in (0, 1))
    resample = Image.Resampling.BOX if zoom < 1 else Image.Resampling.BICUBIC
    return _find_ink(_grey(picture.resize((width, height), resample, box=part))), zoom


def _look_closer(picture: Image.Image, digit: _Digit, zoom: float, side: int) -> SeenDigit:
    """Cuts a digit out of its picture, without what lies around it."""
    box = tuple(round(edge / zoom) for edge in digit.box)
    margin = round(0.5 * max(box[2] - box[0], box[3] - box[1])) + 2
    left, top = max(0, box[0] - margin), max(0, box[1] - margin)
    part = (left, top, min(box[2] + margin, picture.width), min(box[3] + margin, picture.height))
    ink, closer = _look(picture, part, side)
    known = Image.fromarray(digit.mask)
    size, place = ink.shape[::-1], [min(edge * zoom, known.size[i % 2]) for i, edge in enumerate(part)]
    near = np.asarray(known.convert("L").resize(size, Image.Resampling.BILINEAR, box=place)) > 127  # type: ignore[arg-type]
    ink = _normalised(np.where(_widened(near, 9), ink, np.minimum(ink, 0)))
    smooth = _blur(ink, 1)
    labels, _ = ndimage.label(smooth > INK_SHARE, NEIGHBOURS)
    mask = np.isin(labels, [piece.label for piece in _pieces(labels, smooth, 0.02)])
    rows, columns = np.nonzero(mask)
    edges = (left, columns.min()), (top, rows.min()), (left, columns.max() + 1), (top, rows.max() + 1)
    seen: Any = tuple(start + round(edge / closer) for start, edge in edges)
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


def _find_ink(grey: Array) -> Array:
    """(H, W): 0 = paper, more = ink, whether darker or lighter than the paper.

    Raises:
        _BlankError: nothing stands out from the noise.
    """
    smooth = _blur(grey, 1)
    size = max(3, round(min(grey.shape) * STROKE_SHARE))
    exposure = np.log(smooth + 0.1)  # so that light and shadow weigh the same on both sides of their edge
    if ((exposure - _blur(exposure, size // 2)) ** 3).sum() > 0:  # ink is what there is less of: here, what is light
        ink = grey + _closing(-smooth, size)
    else:
        ink = 1 - grey / np.maximum(_closing(smooth, size), 0.02)  # light and shadow are factors
    ink = ink - np.median(ink)
    noise = 1.05 * float(np.median(np.abs(np.diff(ink, axis=1))))  # its standard deviation, unmoved by strokes
    if _strongest(ink) < max(MIN_CONTRAST, MIN_CONTRAST_NOISE * noise):
        raise _BlankError
    return np.asarray(ink)


def _strongest(ink: Array) -> float:
    return float(np.sort(_blur(ink, 1), axis=None)[-40:].mean())


def _normalised(ink: Array) -> Array:
    """1 = the strongest ink."""
    return np.asarray(ink / max(_strongest(ink), 1e-6))


def _closing(a: Array, size: int) -> Array:
    """Fills what is dark and narrower than `size`; keeps gradients and edges."""
    closed = ndimage.grey_closing(np.pad(a, size, mode="edge"), size)
    return np.asarray(closed[size:-size, size:-size])


def _blur(a: Array, radius: int) -> Array:
    """Mean over squares of 2 radius + 1 pixels, twice over (which is nearly a Gaussian); edges continued."""
    size = 2 * radius + 1
    return np.asarray(ndimage.uniform_filter(ndimage.uniform_filter(a, size, mode="nearest"), size, mode="nearest"))


@dataclass(frozen=True)
class _Piece:
    """A connected piece of ink; its weight is the energy of its edges, which a soft shadow has little of."""

    label: int
    weight: float
    box: Box
    touches_edge: bool


def _find_digits(ink: Array, num_frames: int = 0) -> list[_Digit]:
    """The digits in a picture: pieces of ink that lie close together, after frames were erased.

    Args:
        ink: (H, W), 1 = the strongest.
        num_frames: how many were erased, one inside the other.

    Raises:
        _BlankError: nothing but specks.
        PictureError: nothing but a frame.
    """
    smooth = _blur(ink, 1)
    labels, _ = ndimage.label(smooth > INK_SHARE, NEIGHBOURS)
    pieces = _pieces(labels, smooth, 0.001)
    heaviest = max((piece.weight for piece in pieces), default=0.0)
    frames = [piece.label for piece in pieces if piece.weight > 0.1 * heaviest and _is_frame(piece, pieces, labels)]
    if frames and num_frames < 3:
        return _find_digits(_erased(ink, np.isin(labels, frames)), num_frames + 1)
    rest = [piece for piece in pieces if piece.weight >= 0.02 * heaviest]
    if not rest:
        raise _BlankError
    main = max(rest, key=lambda piece: piece.weight * (0.2 if piece.touches_edge else 1.0))
    ring = _ring(labels == main.label)
    if ring is not None and num_frames < 3:
        return _find_digits(_erased(ink, ring), num_frames + 1)
    digits = [_grow(main, rest, labels)]
    height = _height(digits[0].box)
    for piece in sorted(rest, key=lambda piece: -piece.weight):
        is_alike = 0.5 * height < _height(piece.box) < 2 * height
        is_digit = is_alike and piece.weight > 0.1 * main.weight and not piece.touches_edge
        if piece in rest and is_digit:
            digits.append(_grow(piece, rest, labels))
    return digits


def _erased(ink: Array, frame: Mask) -> Array:
    rest = np.where(_widened(frame, 5), np.minimum(ink, 0), ink)
    if _strongest(rest) < 0.1:
        raise PictureError("a frame with nothing in it")
    return _normalised(rest)


def _ring(piece: Mask) -> Mask | None:
    """The line of a rectangle, of which nothing inside is apart from it; None where a piece is no rectangle."""
    filled = ndimage.binary_fill_holes(piece)
    ((rows, columns),) = ndimage.find_objects(piece.astype(np.uint8))
    if filled[rows, columns].mean() < 0.85 or np.count_nonzero(piece) > 0.5 * np.count_nonzero(filled):
        return None
    return np.asarray(filled & ~ndimage.binary_erosion(filled, NEIGHBOURS, iterations=5))


def _is_frame(piece: _Piece, pieces: list[_Piece], labels: Array) -> bool:
    """Whether another piece fills part of a hole in this one, as a digit does in a box or in the cell of a form."""
    left, top, right, bottom = piece.box
    part = labels[top:bottom, left:right]
    outline = _widened(np.pad(part == piece.label, 1), 5)  # thin lines have gaps
    for axis, edge, limit in ((1, left, 0), (0, top, 0), (1, right, labels.shape[1]), (0, bottom, labels.shape[0])):
        if edge == limit:  # the edge of the picture closes what it cuts
            outline.swapaxes(0, axis)[0 if limit == 0 else -1] = True
    holes, _ = ndimage.label(ndimage.binary_fill_holes(outline) & ~outline)
    holes = holes[1:-1, 1:-1]
    heights = [0] + [rows.stop - rows.start for rows, _ in ndimage.find_objects(holes)]
    for other in pieces:
        hole = int(holes[part == other.label].max(initial=0)) if other is not piece else 0
        if hole and (_height(other.box) > 0.15 * heights[hole] or other.weight > piece.weight):
            return True
    return False


def _grow(seed: _Piece, rest: list[_Piece], labels: Array) -> _Digit:
    """Takes out of `rest` a piece and all that belong to the same digit."""
    rest.remove(seed)
    chosen, box = [seed.label], seed.box
    for _ in range(len(rest)):
        near = [piece for piece in rest if _belongs(piece, box)]
        if not near:
            break
        piece = min(near, key=lambda piece: _distance(piece.box, box))
        rest.remove(piece)
        chosen.append(piece.label)
        box = _union(box, piece.box)
    is_wide = box[2] - box[0] > 1.6 * _height(box)
    warning = "wider than a digit: several that touch, or a picture on its side?" if is_wide else None
    return _Digit(np.isin(labels, chosen), box, warning)


def _in_reading_order(digits: list[_Digit]) -> list[_Digit]:
    """Row by row, from left to right; a digit is in the row of the first one that it lies beside."""
    ordered: list[_Digit] = []
    while digits:
        first = min(digits, key=lambda digit: digit.box[1])
        row = [digit for digit in digits if digit.box[1] < (first.box[1] + first.box[3]) / 2]
        ordered += sorted(row, key=lambda digit: digit.box[0])
        digits = [digit for digit in digits if digit not in row]
    return ordered


def _belongs(piece: _Piece, box: Box) -> bool:
    """Whether a piece is part of the digit in `box`: near it, and not a digit's height beside it."""
    union = _union(piece.box, box)
    size = max(union[2] - union[0], _height(union))
    gap = _distance(piece.box, box)
    stands_beside = min(_height(piece.box), _height(box)) > 0.6 * _height(union) and gap > 0.03 * _height(union)
    is_larger = size > 2 * max(box[2] - box[0], _height(box))  # lines of a form
    return gap <= 0.2 * size and not stands_beside and not piece.touches_edge and not is_larger


def _height(box: Box) -> int:
    return box[3] - box[1]


def _union(a: Box, b: Box) -> Box:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _distance(a: Box, b: Box) -> int:
    """Pixels of paper between two boxes, 0 where they overlap."""
    return max(0, a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


def _pieces(labels: Array, ink: Array, least: float) -> list[_Piece]:
    """The pieces that have at least this share of the heaviest one's weight."""
    by_row, by_column = np.gradient(ink)
    boxes = ndimage.find_objects(labels)
    weights = ndimage.sum_labels(by_row**2 + by_column**2, labels, range(1, len(boxes) + 1))
    height, width = labels.shape
    pieces = []
    for i in np.nonzero(weights >= least * max(weights, default=0.0))[0]:
        rows, columns = boxes[i]
        box = (columns.start, rows.start, columns.stop, rows.stop)
        touches_edge = box[0] == 0 or box[1] == 0 or box[2] == width or box[3] == height
        pieces.append(_Piece(int(i) + 1, float(weights[i]), box, touches_edge))
    return pieces


def _to_mnist_frame(ink: Array, mask: Mask) -> npt.NDArray[np.uint8]:
    """The chosen ink as uint8 (28, 28): 20 pixels long, strokes at 255, centred by mass."""
    level = float(np.percentile(ink[mask & (ink > INK_SHARE)], 50))  # thinner strokes than the blur leave paper in mask
    clean = np.clip((ink / level - 0.15) / 0.8, 0, 1) * _widened(mask, 5)
    side = max(np.ptp(axis) + 1 for axis in np.nonzero(mask))
    edges = np.count_nonzero(np.diff(mask, axis=0)) + np.count_nonzero(np.diff(mask, axis=1))
    stroke = 2 * np.count_nonzero(mask) / (edges * np.pi / 4) / side * 20  # of 20 pixels; area / half the outline
    if stroke < MIN_STROKE:
        clean = _widened(clean, 1 + round((MIN_STROKE - stroke) * side / 20))
    if stroke > MAX_STROKE:
        clean = 1 - _widened(1 - clean, 1 + round((stroke - MAX_STROKE) * side / 20))
    return _centred(clean)


def _widened(a: Array, size: int) -> Array:
    """The maximum over a square of `size` pixels around each pixel."""
    return np.asarray(ndimage.maximum_filter(a, size))


def _centred(clean: Array) -> npt.NDArray[np.uint8]:
    rows, columns = np.nonzero(_blur(clean, 1) > 0.25)
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
