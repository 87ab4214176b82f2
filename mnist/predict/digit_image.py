"""Any picture of a digit -> the form of MNIST: 28x28, light on black, 20 pixels long, centred by mass.

In: a picture file of any kind, size and colour: ink on paper or chalk on a board, anywhere in the frame, unevenly lit.
Out: `SeenDigit`, whose pixels are what a network trained on MNIST expects; a picture that is already in MNIST's form is
taken as it is, bit for bit. Letters: H, W rows and columns of the picture, once it has its working size.

The steps: grey values in which ink stands out; the paper's brightness at every pixel, by morphology; ink = what differs
from it; connected pieces of ink, of which one digit is chosen; its pixels brought to MNIST's frame in one resampling.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

MAX_PIXELS = 2**26  # larger files are refused before they are decoded; cameras reach 50 million
MAX_SIDE = 1600  # larger pictures are reduced to it at once
LOOK_SIDE = 224  # the longer side of what is looked at, in pixels
STROKE_SHARE = 0.3  # strokes are thinner than this share of the frame's shorter side, shadows are wider
INK_SHARE = 0.4  # of the strongest ink: what has more of it is a stroke
MIN_CONTRAST = 0.06  # of the brightness range; below it a picture is blank
MIN_CONTRAST_NOISE = 1.15  # ... and below this many standard deviations of its noise, of which a blur leaves 0.23
MIN_STROKE, MAX_STROKE = 1.6, 6.0  # pixels of the 20; strokes outside this range are made thicker or thinner
MASS_CENTRE = 14.5  # pixels from the edge, where MNIST's digits have it on the average
BLANK = "blank: nothing in it stands out like ink from paper"

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Box = tuple[int, int, int, int]  # left, top, right, bottom


class PictureError(ValueError):
    """A picture in which no digit can be seen, or a file that is no picture: one line for people."""


@dataclass(frozen=True)
class SeenDigit:
    """What a network is shown of a picture.

    Attributes:
        pixels: uint8 (28, 28), light on black.
        box: where the digit was found, in the picture as `read_picture` returns it.
        warning: why the digit may not be what was meant, or None.
    """

    pixels: npt.NDArray[np.uint8]
    box: Box
    warning: str | None = None


def read_picture(file: Path | BinaryIO) -> Image.Image:
    """The picture in a file, upright, without transparency, in mode L or RGB, of working size.

    Raises:
        PictureError: not a picture, damaged, cut short, or too large.
    """
    if isinstance(file, Path) and file.exists() and not file.is_file():
        raise PictureError("not a file")  # a pipe, say, that nobody writes to
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            _check_size(image)
            image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # a JPEG is decoded to a smaller size at once
            picture = _without_transparency(ImageOps.exif_transpose(image))
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(f"too large: at most {MAX_PIXELS / 1e6:.0f} million pixels") from None
    except UnidentifiedImageError:
        raise PictureError("not a picture, or of a kind that Pillow does not read") from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PictureError(f"cannot be read ({' '.join(reason.split()) or type(error).__name__})") from error
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
    return picture


def _check_size(image: Image.Image) -> None:
    num_pixels = image.width * image.height
    if num_pixels > MAX_PIXELS:
        raise PictureError(f"too large: {num_pixels / 1e6:,.0f} million pixels, at most {MAX_PIXELS / 1e6:.0f}")


def _without_transparency(image: Image.Image) -> Image.Image:
    """Mode L or RGB. What is drawn in the alpha channel alone counts as ink, else transparent pixels become paper."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits, whatever part of the range they use
        values = np.nan_to_num(np.asarray(image, np.float32))
        values = values - min(0.0, values.min())
        return Image.fromarray((values * (255 / max(values.max(), 1e-9))).round().astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
    rgba = image.convert("RGBA")
    alpha = np.asarray(rgba.getchannel("A"))
    opaque = np.asarray(rgba.convert("L"))[alpha > 127]
    if opaque.size and np.ptp(np.percentile(opaque, (2, 98))) < 50 and alpha.min() < 128:
        return Image.fromarray(255 - alpha)
    paper = Image.new("RGBA", rgba.size, (int(np.median(opaque)) if opaque.size else 255,) * 3 + (255,))
    return Image.alpha_composite(paper, rgba).convert("RGB")


def see_digit(picture: Image.Image) -> SeenDigit:
    """Finds the digit in a picture and brings it to MNIST's form.

    Args:
        picture: as `read_picture` returns it.

    Raises:
        PictureError: the picture is blank.
    """
    pixels = _as_it_is(picture)
    if pixels is not None:
        return SeenDigit(pixels, (0, 0, 28, 28))
    first = _look(picture, (0, 0, *picture.size))
    left, top, right, bottom = first.box
    margin = round(0.5 * max(right - left, bottom - top)) + 2
    around = (left - margin, top - margin, right + margin, bottom + margin)
    second = _look(picture, _intersection(around, (0, 0, *picture.size)))
    return SeenDigit(_to_mnist_frame(second.ink, second.mask), second.box, first.warning or second.warning)


@dataclass(frozen=True)
class _Look:
    """What was found in a part of a picture: ink (H, W), which of it is the digit, and where, in the whole picture."""

    ink: Array
    mask: Mask
    box: Box
    warning: str | None


def _look(picture: Image.Image, part: Box) -> _Look:
    zoom = LOOK_SIDE / max(part[2] - part[0], part[3] - part[1])
    width, height = (max(8, round((part[i + 2] - part[i]) * zoom)) for i in (0, 1))
    resample = Image.Resampling.BOX if zoom < 1 else Image.Resampling.BICUBIC
    ink = _find_ink(_grey(picture.resize((width, height), resample, box=part)))
    mask, box, warning = _choose_digit(ink)
    scale_x, scale_y = (part[2] - part[0]) / width, (part[3] - part[1]) / height
    left, right = (round(part[0] + side * scale_x) for side in (box[0], box[2]))
    top, bottom = (round(part[1] + side * scale_y) for side in (box[1], box[3]))
    return _Look(ink, mask, (left, top, right, bottom), warning)


def _intersection(a: Box, b: Box) -> Box:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _as_it_is(picture: Image.Image) -> npt.NDArray[np.uint8] | None:
    """The pixels of a picture in MNIST's own form, else None.

    That form is 28x28, grey, with a black border, and either larger than the 20 pixels of a digit (clothes are) or
    centred by mass.
    """
    if picture.size != (28, 28):
        return None
    channels: npt.NDArray[np.uint8] = np.asarray(picture).reshape(28, 28, -1)
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
    """(H, W): 0 = paper, 1 = the strongest ink, whether darker or lighter than the paper.

    Raises:
        PictureError: nothing stands out.
    """
    smooth = _blur(grey, 1)
    size = max(3, round(min(grey.shape) * STROKE_SHARE))
    exposure = np.log(smooth + 0.1)  # so that light and shadow weigh the same on both sides of their edge
    if ((exposure - _blur(exposure, size // 2)) ** 3).sum() > 0:  # ink is what there is less of: here, what is light
        paper = -_closing(-smooth, size)
        ink = grey - paper
    else:
        paper = _closing(smooth, size)
        ink = 1 - grey / np.maximum(paper, 0.02)  # light and shadow are factors
    ink = ink - np.median(ink)
    noise = 1.05 * float(np.median(np.abs(np.diff(ink, axis=1))))  # its standard deviation, unmoved by strokes
    strongest = float(np.sort(_blur(ink, 1), axis=None)[-40:].mean())
    if strongest < max(MIN_CONTRAST, MIN_CONTRAST_NOISE * noise):
        raise PictureError(BLANK)
    return np.asarray(ink / strongest)


def _closing(a: Array, size: int) -> Array:
    """Morphological closing with a square: fills what is dark and narrower than `size`; keeps gradients and edges."""
    padded = np.pad(a, size - 1, mode="edge")
    widened = _running_max(_running_max(padded, size).T, size).T
    return -_running_max(_running_max(-widened, size).T, size).T


def _running_max(a: Array, size: int) -> Array:
    """(H, W) -> (H, W - size + 1): the maximum of each `size` neighbours in a row, in log2(size) steps."""
    reach = 1
    while reach < size:
        step = min(reach, size - reach)
        a = np.maximum(a[:, :-step], a[:, step:])
        reach += step
    return a


def _blur(a: Array, radius: int) -> Array:
    """Mean over squares of 2 radius + 1 pixels, twice over (which is nearly a Gaussian); edges continued."""
    size = 2 * radius + 1
    for _ in range(2):
        for axis in (0, 1):
            width = [(0, 0), (0, 0)]
            width[axis] = (radius + 1, radius)
            sums = np.pad(a, width, mode="edge").cumsum(axis=axis, dtype=np.float64)
            ends, starts = (sums[size:], sums[:-size]) if axis == 0 else (sums[:, size:], sums[:, :-size])
            a = ((ends - starts) / size).astype(np.float32)
    return a


@dataclass(frozen=True)
class _Piece:
    """A connected piece of ink; its weight is the energy of its edges, which a soft shadow has little of."""

    label: int
    weight: float
    box: Box
    touches_frame: bool


def _choose_digit(ink: Array) -> tuple[Mask, Box, str | None]:
    """Which ink belongs to the digit (H, W), its box, and a warning where there may be several.

    Raises:
        PictureError: nothing but specks.
    """
    smooth = _blur(ink, 1)
    labels = _label(smooth > INK_SHARE)
    pieces = _pieces(labels, smooth)
    if not pieces:
        raise PictureError(BLANK)
    main = max(pieces, key=lambda piece: piece.weight * (0.2 if piece.touches_frame else 1.0))
    chosen, box, others = [main.label], main.box, 0
    rest = [piece for piece in pieces if piece is not main]
    while rest:
        piece = min(rest, key=lambda piece: _distance(piece.box, box))
        rest.remove(piece)
        if _belongs(piece, box):
            chosen.append(piece.label)
            box = _union(box, piece.box)
        elif _height(piece.box) > 0.5 * _height(box) and piece.weight > 0.2 * main.weight and not piece.touches_frame:
            others += 1
    warning = None
    if others:
        warning = f"{others + 1} digits in one picture: only the largest was read"
    elif box[2] - box[0] > 1.6 * _height(box):
        warning = "wider than a digit: several that touch, or a picture on its side?"
    return np.isin(labels, chosen), box, warning


def _belongs(piece: _Piece, box: Box) -> bool:
    """Whether a piece is part of the digit in `box`: near it, and not a digit's height beside it."""
    union = _union(piece.box, box)
    size = max(union[2] - union[0], _height(union))
    gap = _distance(piece.box, box)
    stands_beside = min(_height(piece.box), _height(box)) > 0.6 * _height(union) and gap > 0.1 * _height(union)
    return gap <= 0.2 * size and not stands_beside and not piece.touches_frame


def _height(box: Box) -> int:
    return box[3] - box[1]


def _union(a: Box, b: Box) -> Box:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _distance(a: Box, b: Box) -> int:
    """Pixels of paper between two boxes, 0 where they overlap."""
    return max(0, a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


def _label(mask: Mask) -> npt.NDArray[np.int32]:
    """(H, W): 0 where `mask` is false, else a number that all pixels of a connected piece share."""
    height, width = mask.shape
    labels = np.arange(1, mask.size + 1, dtype=np.int32).reshape(height, width) * mask
    while True:
        # Every pixel takes the largest number among its neighbours, then that of the pixel which this number names.
        largest = _running_max(_running_max(np.pad(labels, 1), 3).T, 3).T * mask
        jumped = np.concatenate([[0], largest.ravel()]).astype(np.int32)[largest]
        if (jumped == labels).all():
            return labels
        labels = jumped


def _pieces(labels: npt.NDArray[np.int32], ink: Array) -> list[_Piece]:
    """The pieces that are more than specks."""
    by_row, by_column = np.gradient(ink)
    energy = by_row**2 + by_column**2
    rows, columns = np.nonzero(labels)
    names, index = np.unique(labels[rows, columns], return_inverse=True)
    weight = np.bincount(index, weights=energy[rows, columns])
    height, width = labels.shape
    pieces = []
    for i in np.nonzero(weight >= 0.02 * weight.max(initial=0))[0]:
        y, x = rows[index == i], columns[index == i]
        box = (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
        touches_frame = box[0] == 0 or box[1] == 0 or box[2] == width or box[3] == height
        pieces.append(_Piece(int(names[i]), float(weight[i]), box, touches_frame))
    return pieces


def _to_mnist_frame(ink: Array, mask: Mask) -> npt.NDArray[np.uint8]:
    """The chosen ink as uint8 (28, 28): 20 pixels long, strokes at 255, centred by mass."""
    level = float(np.percentile(ink[mask], 60))
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
    padded = np.pad(a, ((size // 2, (size - 1) // 2),) * 2)
    return _running_max(_running_max(padded, size).T, size).T


def _centred(clean: Array) -> npt.NDArray[np.uint8]:
    rows, columns = np.nonzero(_blur(clean, 1) > 0.25)
    if not len(rows):
        raise PictureError(BLANK)
    zoom = (max(np.ptp(rows), np.ptp(columns)) + 1) / 20
    weights = clean / clean.sum()
    centre_x, centre_y = (float(weights.sum(axis=axis) @ np.arange(weights.shape[1 - axis])) for axis in (0, 1))
    margin = round(15 * zoom) + 1
    left, top = (centre + 0.5 - MASS_CENTRE * zoom + margin for centre in (centre_x, centre_y))
    padded = Image.fromarray(np.pad(clean, margin).astype(np.float32))
    frame = (left, top, left + 28 * zoom, top + 28 * zoom)
    small = np.asarray(padded.resize((28, 28), Image.Resampling.BOX, box=frame))
    return (small.clip(0, 1) * 255).round().astype(np.uint8)
