"""Anyone's own pictures: folders of labelled files, decoded once, checked and held as bytes.

In: a folder as `folder_files` describes it. Out: `Pictures`. What was decoded is kept in `<data-dir>/.cache`, where
that can be written. Letters: N pictures, C channels, S side in pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from mnist.data.batches import Split
from mnist.data.folder_files import check_classes, find_files
from mnist.data.picture_file import PictureError, read_file, to_image
from mnist.errors import UserError
from mnist.system import signals
from mnist.system.files import temporary_path
from mnist.system.process import num_usable_cores

CHANNELS = 3  # unless --channels says another number
CACHE_VERSION = 2  # another one makes the caches of earlier versions be written anew
LOCK_TIMEOUT_S = 600.0
PICTURES_PER_TASK = 64
NUM_NAMED = 3  # unreadable files in a warning


class Pictures(NamedTuple):
    """Both splits as uint8 images (N, C, S, S), the training set in an order that mixes the classes.

    Attributes:
        train: to train on.
        test: in the order of the names.
        class_names: sorted, as the folders are called.
        sha256: of images, labels and names.
        unreadable: path and reason of each file that was left out.
        remark: that test pictures were looked for and not found, or None.
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]
    sha256: str
    unreadable: tuple[tuple[str, str], ...]
    remark: str | None

    def warnings(self) -> list[str]:
        """That there are no test pictures, or that files were left out: how many, and the first ones by name."""
        remarks = [self.remark] if self.remark else []
        if not self.unreadable:
            return remarks
        named = ", ".join(f"{path} ({reason})" for path, reason in self.unreadable[:NUM_NAMED])
        more = ", ..." if len(self.unreadable) > NUM_NAMED else ""
        total = len(self.train) + len(self.test) + len(self.unreadable)
        left_out = f"{len(self.unreadable):,} of {total:,} pictures cannot be read and are left out: {named}{more}"
        return [*remarks, left_out]


def prepare(data_dir: str, num_channels: int, size: int, show: Callable[[str], object] = lambda _: None) -> None:
    """Decodes all pictures into the cache, unless they are there; one process per node calls this.

    `show` is told how many have been decoded. Where the cache cannot be written nothing is done: `read` decodes then.
    """
    listing = Listing(data_dir, num_channels, size)
    if listing.read_cache() is not None:
        return
    try:
        listing.cache.parent.mkdir(exist_ok=True)
        with FileLock(listing.cache.with_name(".lock"), timeout=LOCK_TIMEOUT_S):
            if listing.read_cache() is None:  # or else another job was faster
                listing.write_cache(listing.decode(show))
    except (OSError, safetensors.SafetensorError, Timeout):  # read-only, full, without locks
        return


def read(data_dir: str, num_channels: int, size: int, show: Callable[[str], object] = lambda _: None) -> Pictures:
    """All pictures, from the cache or decoded now.

    Args:
        data_dir: the folder.
        num_channels: C, 1 or 3.
        size: S; pictures keep the ratio of their sides, and what is missing is filled with the colour of their edge.
        show: is told how many have been decoded, where they are.

    Raises:
        UserError: no such folder, no pictures, a class without pictures or a single class, most files unreadable.
    """
    listing = Listing(data_dir, num_channels, size)
    return listing.split(listing.read_cache() or listing.decode(show))


class Decoded(NamedTuple):
    """The files that could be read, those to train on first; path and reason of the others."""

    images: Tensor  # uint8 (N, C, S, S)
    labels: Tensor  # int64 (N,)
    is_test: Tensor  # bool (N,)
    sha256: str  # of the three tensors
    unreadable: tuple[tuple[str, str], ...]


class Listing:
    """The picture files below a folder as they are now, and the cache of what was decoded from them."""

    def __init__(self, data_dir: str, num_channels: int, size: int) -> None:
        self.folder = Path(data_dir)
        self.shape = (num_channels, size, size)
        self.class_names, self.files, self.remark = find_files(self.folder)
        facts = [CACHE_VERSION, self.shape, self.class_names, self.files]
        self.key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self.cache = self.folder / ".cache" / f"pictures-{num_channels}x{size}x{size}.safetensors"

    def read_cache(self) -> Decoded | None:
        """What was decoded before from the same files; None where there is nothing of the kind, or it is damaged."""
        try:
            with safetensors.safe_open(self.cache, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key:
                    return None
                images, labels, is_test = (file.get_tensor(name) for name in ("images", "labels", "is_test"))
            unreadable = tuple((str(path), str(reason)) for path, reason in json.loads(metadata["unreadable"]))
            sha256 = _sha256(images, labels, is_test)
            return Decoded(images, labels, is_test, sha256, unreadable) if sha256 == metadata["sha256"] else None
        except (OSError, KeyError, ValueError, safetensors.SafetensorError):
            return None

    def write_cache(self, decoded: Decoded) -> None:
        """Keeps what was decoded; raises an OSError or a SafetensorError where it cannot be written."""
        tensors = {"images": decoded.images, "labels": decoded.labels, "is_test": decoded.is_test}
        metadata = {"key": self.key, "sha256": decoded.sha256, "unreadable": json.dumps(decoded.unreadable)}
        temporary = temporary_path(self.cache)
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
            temporary.chmod(self.cache.parent.stat().st_mode & 0o666)  # who may read the folder may read it
            temporary.replace(self.cache)
        finally:
            temporary.unlink(missing_ok=True)

    def decode(self, show: Callable[[str], object] = lambda _: None) -> Decoded:
        """Decodes all files, on all cores; a UserError where the images would not fit into memory."""
        self._check_memory()
        images = torch.empty(len(self.files), *self.shape, dtype=torch.uint8)
        pixels, reasons = images.numpy(), dict[int, str]()  # the place of a file that cannot be read -> why

        def decode_part(first: int) -> None:
            for place in range(first, min(first + PICTURES_PER_TASK, len(self.files))):
                path = self.folder / self.files[place].path
                try:
                    pixels[place] = to_image(read_file(path), path.suffix, self.shape[0], self.shape[1])
                except PictureError as error:
                    reasons[place] = str(error)
                except OSError as error:
                    reasons[place] = f"cannot be read ({error.strerror or error})"

        starts, pool = range(0, len(self.files), PICTURES_PER_TASK), ThreadPoolExecutor(num_usable_cores())
        try:
            with warnings.catch_warnings(action="ignore"):  # Pillow's, of odd files
                for first, _ in zip(starts, pool.map(decode_part, starts), strict=True):
                    show(f"decoding pictures  {first:,} of {len(self.files):,}")
                    if signals.stop_requested() and not signals.are_installed():  # they would end the process
                        raise KeyboardInterrupt
        finally:
            pool.shutdown(cancel_futures=True)  # at Ctrl-C
        readable = [place for place in range(len(self.files)) if place not in reasons]
        images = images[readable] if reasons else images
        labels = torch.tensor([self.files[place].label for place in readable], dtype=torch.int64)
        is_test = torch.tensor([self.files[place].is_test for place in readable], dtype=torch.bool)
        unreadable = tuple((self.files[place].path, reason) for place, reason in sorted(reasons.items()))
        return Decoded(images, labels, is_test, _sha256(images, labels, is_test), unreadable)

    def _check_memory(self) -> None:
        num_bytes, available = len(self.files) * math.prod(self.shape), psutil.virtual_memory().available
        if num_bytes > available:
            need = f"{len(self.files):,} pictures of --image-size {self.shape[1]} take {num_bytes / 1e9:.1f} GB"
            raise UserError(f"--data-dir {self.folder}: {need}, but {available / 1e9:.1f} GB of memory are free")

    def split(self, decoded: Decoded) -> Pictures:
        """The splits; checks that most files could be read, and some of each class."""
        images, labels, is_test, sha256, unreadable = decoded
        if len(unreadable) >= len(labels):
            path, reason = unreadable[0]
            numbers = f"{len(unreadable):,} of {len(self.files):,} pictures"
            raise UserError(f"--data-dir {self.folder}: {numbers} cannot be read; the first: {path} ({reason})")
        check_classes(self.folder, self.class_names, zip(labels.tolist(), is_test.tolist(), strict=True))
        num_train = int((~is_test).sum())
        return Pictures(
            train=Split(images[:num_train], labels[:num_train]),
            test=Split(images[num_train:], labels[num_train:]),
            class_names=self.class_names,
            sha256=hashlib.sha256((sha256 + "".join(self.class_names)).encode()).hexdigest(),
            unreadable=unreadable,
            remark=self.remark,
        )


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
