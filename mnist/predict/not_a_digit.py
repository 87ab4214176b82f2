"""Whether what the network was shown looks like the images that it was trained on.

In: images in MNIST's form, and the training images, where this machine has them. Out: for each image, whether it is
less like every one of some thousand training images than all but 1 in 250 other training images are. A network gives
ten probabilities for a letter or a scribble, too, and often high ones.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

NUM_KNOWN, NUM_HELD_OUT = 5_000, 2_000  # training images: those compared with, and those that give the limit
FALSE_WARNINGS = 0.004  # of the images held out
NUM_DIRECTIONS = 8
BLOCK = 4  # pixels

Images = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]


class Likeness:
    """Knows some thousand training images, (N, 28, 28) uint8."""

    def __init__(self, images: Images) -> None:
        num_known = min(NUM_KNOWN, round(0.8 * len(images)))
        self._known = _edge_directions(images[:num_known])
        held_out = self._distances(images[num_known : num_known + NUM_HELD_OUT])
        self._limit = float(np.quantile(held_out, 1 - FALSE_WARNINGS))

    def is_foreign(self, images: Images) -> npt.NDArray[np.bool_]:
        """(B, 28, 28) -> (B,)."""
        return np.asarray(self._distances(images) > self._limit)

    def _distances(self, images: Images) -> Features:
        """(B, 28, 28) -> (B,): 1 - cosine of the angle to the nearest known image."""
        return np.asarray(1 - (_edge_directions(images) @ self._known.T).max(axis=1, initial=0))


def _edge_directions(images: Images) -> Features:
    """(B, 28, 28) -> (B, 392): how much ink begins in each of eight directions, in blocks of 4x4 pixels, length 1."""
    _, height, width = images.shape
    smooth = ndimage.gaussian_filter(images.astype(np.float32), (0, 1, 1))
    down, right = np.zeros_like(smooth), np.zeros_like(smooth)
    down[:, 1:-1], right[:, :, 1:-1] = smooth[:, 2:] - smooth[:, :-2], smooth[:, :, 2:] - smooth[:, :, :-2]
    strength = np.hypot(down, right)
    direction = np.arctan2(down, right) * (NUM_DIRECTIONS / (2 * np.pi))
    sums = []
    for k in range(NUM_DIRECTIONS):  # an edge between two directions counts for both
        apart = np.abs((direction - k + NUM_DIRECTIONS / 2) % NUM_DIRECTIONS - NUM_DIRECTIONS / 2)
        part = np.maximum(1 - apart, 0) * strength
        sums.append(part.reshape(len(images), height // BLOCK, BLOCK, width // BLOCK, BLOCK).sum(axis=(2, 4)))
    vectors = np.sqrt(np.stack(sums, axis=1).reshape(len(images), -1))
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9), np.float32)
