"""Reads IDX files, the format of MNIST, and refuses what is not exactly one.

In: a path, plain or `.gz`. Out: uint8 images (N, H, W) or uint8 labels (N,), with the sha256 of the plain bytes.
torchvision's own reader takes swapped label files for good ones, and cannot repair a truncated file.

Source: the description of the format on LeCun's MNIST page.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from mnist.errors import UserError

IMAGES_MAGIC = 0x00000803  # unsigned bytes, three dimensions
LABELS_MAGIC = 0x00000801  # unsigned bytes, one dimension
_KINDS = {IMAGES_MAGIC: "images", LABELS_MAGIC: "labels"}


def read_idx(path: Path, magic: int) -> tuple[Tensor, str]:
    """The array in `path` and the sha256 of the uncompressed file.

    Args:
        path: an IDX file, or one packed with gzip.
        magic: `IMAGES_MAGIC` or `LABELS_MAGIC`, what the file must hold.

    Raises:
        UserError: not readable, not IDX, of the other kind, cut short or too long. The message names the file.
    """
    content = _read_bytes(path)
    num_dimensions = magic & 0xFF
    header_size = 4 + 4 * num_dimensions
    if len(content) < header_size:
        raise UserError(f"{path}: {len(content)} bytes are too few for an IDX header; {_remedy(path)}")
    found, *shape = struct.unpack(f">{1 + num_dimensions}I", content[:header_size])
    if found != magic:
        what = f"holds {_KINDS[found]}" if found in _KINDS else f"is no IDX file (magic number {found:#010x})"
        raise UserError(f"{path}: {what}, expected {_KINDS[magic]}; {_remedy(path)}")
    expected = header_size + math.prod(shape)
    if len(content) != expected:
        raise UserError(f"{path}: {len(content):,} bytes where its header says {expected:,}; {_remedy(path)}")
    if expected == header_size:
        raise UserError(f"{path}: empty, its header says {' x '.join(map(str, shape))}; {_remedy(path)}")
    array = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header_size)
    return array.reshape(shape), hashlib.sha256(content).hexdigest()


def _read_bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); {_remedy(path)}") from error


def _remedy(path: Path) -> str:
    return f"remove {path.name} to have it downloaded again, or name another folder with --data-dir"
