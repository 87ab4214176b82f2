"""Ink -> the digits in it: connected pieces that lie close together, without printed boxes around them.

In: ink (H, W) as `find_ink` returns it. Out: a `FoundDigit` for each, in reading order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from mnist.data.picture_file import PictureError
from mnist.predict.ink import Array, BlankError, Box, blur, normalised, strongest, widened

INK_SHARE = 0.4  # of the strongest ink: what has more of it is a stroke
NEIGHBOURS = np.ones((3, 3))  # pixels that touch at a corner are connected
MAX_FRAMES = 3  # one inside the other

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class FoundDigit:
    """Which pixels of the ink are the digit's (H, W), where they are, and why it may be none."""

    mask: Mask
    box: Box
    warning: str | None


@dataclass(frozen=True)
class Piece:
    """A connected piece of ink; its weight is the energy of its edges, which a soft shadow has little of."""

    label: int
    weight: float
    box: Box
    touches_edge: bool


def pieces_of(ink: Array, least: float) -> tuple[Array, list[Piece]]:
    """The number of its piece at each pixel (H, W), and the pieces with this share of the heaviest one's weight."""
    smooth = blur(ink, 1)
    labels, _ = ndimage.label(smooth > INK_SHARE, NEIGHBOURS)
    by_row, by_column = np.gradient(smooth)
    boxes = ndimage.find_objects(labels)
    weights = ndimage.sum_labels(by_row**2 + by_column**2, labels, range(1, len(boxes) + 1))
    height, width = labels.shape
    pieces = []
    for i in np.nonzero(weights >= least * max(weights, default=0.0))[0]:
        rows, columns = boxes[i]
        box = Box(columns.start, rows.start, columns.stop, rows.stop)
        touches_edge = box.left == 0 or box.top == 0 or box.right == width or box.bottom == height
        pieces.append(Piece(int(i) + 1, float(weights[i]), box, touches_edge))
    return labels, pieces


def find_digits(ink: Array, num_frames: int = 0) -> list[FoundDigit]:
    """The digits in a picture, row by row from left to right; frames are erased first.

    Args:
        ink: (H, W), 1 = the strongest.
        num_frames: how many were erased, one inside the other.

    Raises:
        BlankError: nothing but specks.
        PictureError: nothing but a frame.
    """
    labels, pieces = pieces_of(ink, 0.001)
    heaviest = max((piece.weight for piece in pieces), default=0.0)
    frames = [piece.label for piece in pieces if piece.weight > 0.1 * heaviest and _is_frame(piece, pieces, labels)]
    if frames and num_frames < MAX_FRAMES:
        return find_digits(_erased(ink, np.isin(labels, frames)), num_frames + 1)
    rest = [piece for piece in pieces if piece.weight >= 0.02 * heaviest]
    if not rest:
        raise BlankError
    main = max(rest, key=lambda piece: piece.weight * (0.2 if piece.touches_edge else 1.0))
    ring = _ring(labels == main.label)
    if ring is not None and num_frames < MAX_FRAMES:
        return find_digits(_erased(ink, ring), num_frames + 1)
    digits = [_grow(main, rest, labels)]
    height = digits[0].box.height
    for piece in sorted(rest, key=lambda piece: -piece.weight):
        is_alike = 0.5 * height < piece.box.height < 2 * height
        is_digit = is_alike and piece.weight > 0.1 * main.weight and not piece.touches_edge
        if piece in rest and is_digit:
            digits.append(_grow(piece, rest, labels))
    return _in_reading_order(digits)


def _erased(ink: Array, frame: Mask) -> Array:
    rest = np.where(widened(frame, 5), np.minimum(ink, 0), ink)
    if strongest(rest) < 0.1:
        raise PictureError("a frame with nothing in it")
    return normalised(rest)


def _ring(piece: Mask) -> Mask | None:
    """The line of a rectangle, of which nothing inside is apart from it; None where a piece is no rectangle."""
    filled = ndimage.binary_fill_holes(piece)
    ((rows, columns),) = ndimage.find_objects(piece.astype(np.uint8))
    if filled[rows, columns].mean() < 0.85 or np.count_nonzero(piece) > 0.5 * np.count_nonzero(filled):
        return None
    return np.asarray(filled & ~ndimage.binary_erosion(filled, NEIGHBOURS, iterations=5))


def _is_frame(piece: Piece, pieces: list[Piece], labels: Array) -> bool:
    """Whether another piece fills part of a hole in this one, as a digit does in a box or in the cell of a form."""
    left, top, right, bottom = piece.box
    part = labels[top:bottom, left:right]
    outline = widened(np.pad(part == piece.label, 1), 5)  # thin lines have gaps
    for axis, edge, limit in ((1, left, 0), (0, top, 0), (1, right, labels.shape[1]), (0, bottom, labels.shape[0])):
        if edge == limit:  # the edge of the picture closes what it cuts
            outline.swapaxes(0, axis)[0 if limit == 0 else -1] = True
    holes, _ = ndimage.label(ndimage.binary_fill_holes(outline) & ~outline)
    holes = holes[1:-1, 1:-1]
    heights = [0] + [rows.stop - rows.start for rows, _ in ndimage.find_objects(holes)]
    for other in pieces:
        hole = int(holes[part == other.label].max(initial=0)) if other is not piece else 0
        if hole and (other.box.height > 0.15 * heights[hole] or other.weight > piece.weight):
            return True
    return False


def _grow(seed: Piece, rest: list[Piece], labels: Array) -> FoundDigit:
    """Takes out of `rest` a piece and all that belong to the same digit."""
    rest.remove(seed)
    chosen, box = [seed.label], seed.box
    for _ in range(len(rest)):
        near = [piece for piece in rest if _belongs(piece, box)]
        if not near:
            break
        piece = min(near, key=lambda piece: piece.box.distance(box))
        rest.remove(piece)
        chosen.append(piece.label)
        box = box.union(piece.box)
    is_wide = box.width > 1.6 * box.height
    warning = "wider than a digit: several that touch, or a picture on its side?" if is_wide else None
    return FoundDigit(np.isin(labels, chosen), box, warning)


def _in_reading_order(digits: list[FoundDigit]) -> list[FoundDigit]:
    """Row by row, from left to right; a digit is in the row of the first one that it lies beside."""
    ordered: list[FoundDigit] = []
    while digits:
        first = min(digits, key=lambda digit: digit.box.top)
        row = [digit for digit in digits if digit.box.top < (first.box.top + first.box.bottom) / 2]
        ordered += sorted(row, key=lambda digit: digit.box.left)
        digits = [digit for digit in digits if digit not in row]
    return ordered


def _belongs(piece: Piece, box: Box) -> bool:
    """Whether a piece is part of the digit in `box`: near it, and not a digit's height beside it."""
    union = piece.box.union(box)
    size = max(union.width, union.height)
    gap = piece.box.distance(box)
    stands_beside = min(piece.box.height, box.height) > 0.6 * union.height and gap > 0.03 * union.height
    is_larger = size > 2 * max(box.width, box.height)  # lines of a form
    return gap <= 0.2 * size and not stands_beside and not piece.touches_edge and not is_larger
