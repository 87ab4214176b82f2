"""Batched image operations, on the device: no image is ever handled alone.

In: uint8 batches (B, H, W) or (B, C, H, W). Out: float32 batches (B, C, S, S), normalised. Letters: B images of this
process's share, G images of the global batch, C channels, S side of the network's input in pixels.
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
        self.factor = 1 / (255 * config.std)
        self.offset = -config.mean / config.std

    def __call__(self, images: Tensor) -> Tensor:
        """(B, H, W) or (B, C, H, W), uint8 or float pixels in 0..255 -> (B, C, S, S) float32."""
        batch = images.unsqueeze(1) if images.ndim == 3 else images
        if batch.shape[-2:] != (self.size, self.size):
            batch = F.interpolate(batch.float(), size=self.size, mode="bilinear", align_corners=False, antialias=True)
        return batch.mul(self.factor).add_(self.offset)


class Augmentation:
    """Random flips, affine maps and elastic distortion of training images.

    Parameters are drawn for the whole global batch from (seed, step), then the rows of this process's share are taken:
    what happens to an image depends neither on the number of processes nor on accumulation, and needs no saved state.
    """

    def __init__(self, config: ImageConfig, seed: int, device: torch.device) -> None:
        self.config = config
        self.seed = seed
        self.generator = torch.Generator(device)
        self.is_affine = any((config.rotation, config.translation, config.scale, config.shear))
        self.is_identity = not (self.is_affine or config.horizontal_flip or config.elastic)

    def reseed(self, step: int) -> None:
        """Fixes the random numbers of `apply` for an optimizer step."""
        if not self.is_identity:
            self.generator.manual_seed(derive_seed(self.seed, "augmentation", step))

    def __call__(self, images: Tensor, step: int, rows: slice, global_batch_size: int) -> Tensor:
        """`apply` with the random numbers of a step."""
        self.reseed(step)
        return self.apply(images, rows, global_batch_size)

    def apply(self, images: Tensor, rows: slice, global_batch_size: int) -> Tensor:
        """Augments this process's part of a global batch.

        Args:
            images: uint8 (B, H, W) or (B, C, H, W), rows `rows` of the global batch.
            rows: place of `images` in the global batch.
            global_batch_size: G.

        Returns:
            Pixels in 0..255 of the same shape: float32, or the uint8 input itself where nothing is to be done.
        """
        if self.is_identity:
            return images
        device = self.generator.device
        draws = torch.rand(global_batch_size, 6, generator=self.generator, device=device)[rows]
        batch = images.float()
        if self.config.horizontal_flip:
            flipped = draws[:, 0] < self.config.horizontal_flip
            batch = torch.where(flipped.view(-1, *[1] * (batch.ndim - 1)), batch.flip(-1), batch)
        if not (self.is_affine or self.config.elastic):
            return batch
        height, width = batch.shape[-2:]
        maps = self._affine(2 * draws[:, 1:] - 1, height / width)
        grid = F.affine_grid(maps, [len(batch), 1, height, width], align_corners=False)
        if self.config.elastic:
            noise = torch.rand(global_batch_size, 2, height, width, generator=self.generator, device=device)[rows]
            vertical, horizontal = (_gaussian_matrix(n, self.config.elastic_sigma, device) for n in (height, width))
            grid = grid + self.config.elastic * (vertical @ (2 * noise - 1) @ horizontal.T).permute(0, 2, 3, 1)
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


@lru_cache(maxsize=8)
def _gaussian_matrix(size: int, sigma: float, device: torch.device) -> Tensor:
    """(size, size): applied from the left and, transposed, from the right it blurs an image, with zeros outside it."""
    pixels = torch.arange(size, dtype=torch.float64)
    weights = torch.exp(-((pixels[:, None] - pixels[None, :]) ** 2) / (2 * sigma**2))
    radius = math.ceil(4 * sigma)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float64) ** 2) / (2 * sigma**2))
    return (weights / kernel.sum()).float().to(device)
