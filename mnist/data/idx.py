"""Reads IDX files, the format of MNIST; a file that is not exactly one is an error.

In: a path, plain or packed with gzip, whatever its name says. Out: uint8 images (N, H, W) or (N, 3, H, W), or int64
labels (N,), with the sha256 of the unpacked bytes. torchvision's own reader accepts swapped label files, and cannot
repair a truncated file.

Source: the description of the format on LeCun's MNIST page.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnist.errors import RunError, UserError
from mnist.system.files import read_regular

MAX_BYTES = 1 << 30  # twice the largest of these data sets, EMNIST with 697,932 images
_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_images(path: Path) -> tuple[Tensor, str]:
    """The images in `path`, uint8, and the sha256 of the unpacked file.

    Returns:
        (N, H, W), also where the file says (N, H, W, 1), or (N, 3, H, W) where it says (N, H, W, 3).

    Raises:
        UserError: not readable, not IDX, no images, cut short, too long or too large. The message names the file.
    """
    array, digest = _read(path, "images")
    images = torch.from_numpy(array)
    if images.ndim == 4:
        images = images.squeeze(3) if images.shape[3] == 1 else images.permute(0, 3, 1, 2).contiguous()
    return images, digest


def read_labels(path: Path) -> tuple[Tensor, str]:
    """The labels in `path`, int64 (N,), and the sha256 of the unpacked file; raises as `read_images` does.

    Where a row has several int32 numbers (QMNIST: class, writer, ...), the first one is the label.
    """
    array, digest = _read(path, "labels")
    return torch.from_numpy(array.reshape(len(array), -1)[:, 0].astype(np.int64)), digest


def _read(path: Path, kind: str) -> tuple[Any, str]:
    try:
        content = read_regular(path, MAX_BYTES)
        is_packed = content.startswith(b"\x1f\x8b")
        return _parse(gzip.GzipFile(fileobj=io.BytesIO(content)) if is_packed else io.BytesIO(content), kind)
    except (OSError, EOFError, zlib.error, RunError) as error:
        reason = f"cannot be read ({str(error).removeprefix(f'{path}: ')})"
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{path}: {reason}; remove this file to have it downloaded again, or name another --data-dir")


def _parse(file: io.BytesIO | gzip.GzipFile, kind: str) -> tuple[Any, str]:
    """The array in `file`, of which no more is unpacked than its header asks for. Raises a ValueError."""
    header = file.read(4)
    zeros, code, num_dimensions = struct.unpack(">HBB", header) if len(header) == 4 else (0, 0x08, 3)
    if zeros or code not in _TYPES or not 1 <= num_dimensions <= 4:
        raise ValueError(f"is no IDX file (it begins with {header.hex()}), expected {kind}")
    header += file.read(4 * num_dimensions)
    if len(header) < 4 + 4 * num_dimensions:
        raise ValueError(f"{len(header)} bytes are too few for an IDX header")
    dtype, shape = np.dtype(_TYPES[code]), struct.unpack(f">{num_dimensions}I", header[4:])
    sizes = " x ".join(map(str, shape))
    is_images = code == 0x08 and (num_dimensions == 3 or (num_dimensions == 4 and shape[3] in (1, 3)))
    is_labels = (code == 0x08 and num_dimensions == 1) or (code == 0x0C and num_dimensions <= 2)
    found = "images" if is_images else "labels" if is_labels else f"{dtype.name} numbers ({sizes})"
    if found != kind:
        raise ValueError(f"holds {found}, expected {kind}")
    num_bytes = math.prod(shape) * dtype.itemsize
    if not 0 < num_bytes <= MAX_BYTES:
        raise ValueError(f"its header says {sizes}, which is {'too much' if num_bytes else 'empty'}")
    body = bytearray(file.read(num_bytes + 1))  # one more shows that a file is too long
    if len(body) != num_bytes:
        amount = "more bytes than" if len(body) > num_bytes else f"{len(body):,} bytes where"
        raise ValueError(f"{amount} its header says: {num_bytes:,} after the header")
    digest = hashlib.sha256(header)
    digest.update(body)
    return np.frombuffer(body, dtype).reshape(shape), digest.hexdigest()
