"""Networks for the images of MNIST, with fresh weights."""

from __future__ import annotations

from torch import nn

from mnist.config import IMAGE_SIZES
from mnist.data.sources import DatasetInfo
from mnist.models import build_model

INFO = DatasetInfo((1, 28, 28), tuple("0123456789"), has_digits=True)


def mnist_model(name: str) -> nn.Module:
    return build_model(name, 1, IMAGE_SIZES.get(name, 28), INFO.num_classes)
