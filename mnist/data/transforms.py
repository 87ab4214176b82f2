"""Batched image operations, on the device: no image is ever handled alone.

In: uint8 batches (B, H, W) or (B, C, H, W). Out: float32 batches (B, C, S, S), normalised. Letters: B images of this
process's share, C channels, S side of the network's input in pixels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist.config import ImageConfig
from mnist.seeding import derive_seed


class BatchTransform:
    """Resizes and normalises. One and the same object serves training, evaluation and prediction."""

    def __init__(self, config: ImageConfig) -> None:
        self.size = config.image_size
        mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (config.mean, config.std))
        self._factor, self._offset = (1 / (255 * std)).float(), (-mean / std).float()

    def __call__(self, images: Tensor) -> Tensor:
        """(B, H, W) or (B, C, H, W), uint8 or float pixels in 0..255 -> (B, C, S, S) float32."""
        batch = images.unsqueeze(1) if images.ndim == 3 else images
        if batch.shape[-2:] != (self.size, self.size):
            batch = F.interpolate(batch.float(), size=self.size, mode="bilinear", align_corners=False, antialias=True)
        if self._factor.device != batch.device:  # copied once: a captured step must not copy from the host
            self._factor, self._offset = self._factor.to(batch.device), self._offset.to(batch.device)
        return batch.mul(self._factor).add_(self._offset)


class Augmentation:
    """Random flips, affine maps and elastic distortion of training images.

    The random numbers of an image are a hash of (seed, step, its row in the global batch): what happens to an image
    depends neither on the number of processes nor on accumulation, and needs no saved state. A rank computes those of
    its own rows only, the same to the last bit on CPU and CUDA.
    """

    def __init__(self, config: ImageConfig, seed: int, device: torch.device) -> None:
        self.config = config
        self.seed = seed
        self.step_key = torch.zeros((), dtype=torch.int64, device=device)  # on the device, so that CUDA graphs read it
        self.is_affine = any((config.rotation, config.translation, config.scale, config.shear))
        self.is_identity = not (self.is_affine or config.horizontal_flip or config.elastic)

    def reseed(self, step: int) -> None:
        """Fixes the random numbers of `apply` for an optimizer step."""
        if not self.is_identity:
            self.step_key.fill_(derive_seed(self.seed, "augmentation", step))

    def __call__(self, images: Tensor, step: int, rows: slice) -> Tensor:
        """`apply` with the random numbers of a step."""
        self.reseed(step)
        return self.apply(images, rows)

    def apply(self, images: Tensor, rows: slice) -> Tensor:
        """Augments this process's part of a global batch.

        Args:
            images: uint8 (B, H, W) or (B, C, H, W), rows `rows` of the global batch.
            rows: place of `images` in the global batch.

        Returns:
            Pixels in 0..255 of the same shape: float32, or the uint8 input itself where nothing is to be done.
        """
        if self.is_identity:
            return images
        height, width = images.shape[-2:]
        draws = uniform(self.step_key, rows, 6 + (2 * height * width if self.config.elastic else 0))
        batch = images.float()
        if self.config.horizontal_flip:
            flipped = draws[:, 0] < 2 * self.config.horizontal_flip - 1
            batch = torch.where(flipped.view(-1, *[1] * (batch.ndim - 1)), batch.flip(-1), batch)
        if not (self.is_affine or self.config.elastic):
            return batch
        maps = self._affine(draws[:, 1:6], height / width)
        grid = F.affine_grid(maps, [len(batch), 1, height, width], align_corners=False)
        if self.config.elastic:
            noise = draws[:, 6:].view(-1, 2, height, width)
            vertical, horizontal = (
                _gaussian_matrix(n, self.config.elastic_sigma, noise.device) for n in (height, width)
            )
            grid = grid + self.config.elastic * (vertical @ noise @ horizontal.T).permute(0, 2, 3, 1)
        pixels = batch.unsqueeze(1) if batch.ndim == 3 else batch
        return F.grid_sample(pixels, grid, align_corners=False).view_as(batch)

    def _affine(self, draws: Tensor, aspect: float) -> Tensor:
        """Draws in [-1, 1], (B, 5) -> maps from output to input coordinates (B, 2, 3), in [-1, 1] units.

        The inverse of scale x rotation x shear, and a shift, as torchvision's RandomAffine composes them. `aspect`,
        height / width, turns equal distances in pixels into distances in those units.
        """
        c = self.config
        angle = draws[:, 0] * math.radians(c.rotation)
        zoom = 1 + draws[:, 1] * c.scale
        shear = torch.tan(draws[:, 2] * math.radians(c.shear))
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        shift = draws[:, 3:] * (2 * c.translation)
        terms = [cos + shear * sin, (sin - shear * cos) * aspect, -sin / aspect, cos]
        linear = torch.stack(terms, dim=1).view(-1, 2, 2)
        return torch.cat([linear, -(linear @ shift.unsqueeze(2))], dim=2)


def uniform(key: Tensor, rows: slice, count: int) -> Tensor:
    """Random numbers (B, count) float32 for rows `rows`, uniform in [-1, 1) in steps of 2**-15, on the device of `key`.

    Each row is a function of `key`, an int64 scalar, and of its own number. Integer arithmetic: exact everywhere.

    Source: SplitMix64 (Steele, Lea, Flood 2014) seeded with `key`; row r has its values from r * ceil(count / 4) on,
        each of which gives four numbers.
    """
    num_words = -(-count // 4)
    words = torch.arange(rows.start * num_words + 1, rows.stop * num_words + 1, device=key.device)
    words.mul_(0x9E3779B97F4A7C15 - 2**64).add_(key)  # int64 wraps around; factors are written as signed numbers
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        words.bitwise_xor_((words >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)  # a shift without sign
    return words.view(torch.int16).view(-1, 4 * num_words)[:, :count] * 2.0**-15


@lru_cache(maxsize=8)
def _gaussian_matrix(size: int, sigma: float, device: torch.device) -> Tensor:
    """(size, size): applied from the left and, transposed, from the right it blurs an image, with zeros outside it."""
    pixels = torch.arange(size, dtype=torch.float64)
    weights = torch.exp(-((pixels[:, None] - pixels[None, :]) ** 2) / (2 * sigma**2))
    radius = math.ceil(4 * sigma)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float64) ** 2) / (2 * sigma**2))
    return (weights / kernel.sum()).float().to(device)
