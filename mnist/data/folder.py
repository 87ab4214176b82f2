"""Anyone's own pictures: folders of labelled files, decoded once, checked and held as bytes.

In: `<data-dir>/train/<class>/*` and `<data-dir>/test/<class>/*`, or `<data-dir>/<class>/*` alone, of which a fifth of
each class becomes the test set. Out: `Pictures`. What was decoded is kept in `<data-dir>/.cache`, where that can be
written. Letters: N pictures, C channels, S side in pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import sys
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from mnist.data.picture_file import IGNORED, PictureError, is_picture_name, natural_order, read_file, to_image
from mnist.errors import UserError, is_first_rank
from mnist.system import signals
from mnist.system.files import temporary_path
from mnist.system.process import num_usable_cores

CHANNELS = 3  # unless --channels says another number
CACHE_VERSION = 1  # another one makes the caches of earlier versions be written anew
TEST_FOLDERS = ("test", "val")  # the first one that is there
TEST_SHARE = 0.2  # of each class, where there is no folder of test pictures
LOCK_TIMEOUT_S = 600.0
PICTURES_PER_TASK = 64
NUM_NAMED = 3  # unreadable files in a warning
LAYOUT = "expected train/<class>/ and test/<class>/ with pictures, or <class>/ alone"

Show = Callable[[str], object]


class File(NamedTuple):
    """A picture file: path below the folder, class, split, and what shows that it has changed."""

    path: str
    label: int
    is_test: bool
    num_bytes: int
    mtime_ns: int


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


def prepare(data_dir: str, num_channels: int, size: int, show: Show | None = None) -> None:
    """Decodes all pictures into the cache, unless they are there; one process per node calls this.

    Where the cache cannot be written nothing is done: `read` decodes then.
    """
    listing = Listing(data_dir, num_channels, size)
    if listing.read_cache() is not None:
        return
    try:
        listing.cache.parent.mkdir(exist_ok=True)
        with FileLock(listing.cache.with_name(".lock"), timeout=LOCK_TIMEOUT_S):
            if listing.read_cache() is None:  # or else another job was faster
                listing.write_cache(listing.decode(show))
    except (OSError, Timeout):  # read-only, full, without locks
        return


def read(data_dir: str, num_channels: int, size: int, show: Show | None = None) -> Pictures:
    """All pictures, from the cache or decoded now.

    Args:
        data_dir: the folder.
        num_channels: C, 1 or 3.
        size: S; pictures keep the ratio of their sides, and what is missing is filled with the colour of their edge.
        show: is told how far it is, on a terminal; without it a line is written.

    Raises:
        UserError: no such folder, no pictures, a class without pictures or a single class, most files unreadable.
    """
    listing = Listing(data_dir, num_channels, size)
    return listing.pictures(listing.read_cache() or listing.decode(show))


class Decoded(NamedTuple):
    """Images (N, C, S, S) of the files that could be read, their places in the listing (N,), and the other files."""

    images: Tensor
    places: Tensor
    unreadable: tuple[tuple[str, str], ...]


class Listing:
    """The picture files below a folder as they are now, in an order that depends on their names only."""

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
                images, places = file.get_tensor("images"), file.get_tensor("places")
            unreadable = tuple((str(path), str(reason)) for path, reason in json.loads(metadata["unreadable"]))
            is_whole = _sha256(images, places) == metadata["sha256"]
        except (OSError, KeyError, ValueError, safetensors.SafetensorError):
            return None
        return Decoded(images, places, unreadable) if is_whole else None

    def write_cache(self, decoded: Decoded) -> None:
        """Keeps what was decoded; raises an OSError where it cannot be written."""
        tensors = {"images": decoded.images, "places": decoded.places}
        sha256 = _sha256(*tensors.values())
        metadata = {"key": self.key, "sha256": sha256, "unreadable": json.dumps(decoded.unreadable)}
        temporary = temporary_path(self.cache)
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
            temporary.chmod(self.cache.parent.stat().st_mode & 0o666)  # who may read the folder may read it
            temporary.replace(self.cache)
        except safetensors.SafetensorError as error:  # its errors of the disk are no OSErrors
            raise OSError(str(error)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def decode(self, show: Show | None) -> Decoded:
        """Decodes all files, on all cores; a UserError where the images would not fit into memory."""
        num_bytes, available = len(self.files) * math.prod(self.shape), psutil.virtual_memory().available
        if num_bytes > available:
            need = f"{len(self.files):,} pictures of --image-size {self.shape[1]} take {num_bytes / 1e9:.1f} GB"
            raise UserError(f"--data-dir {self.folder}: {need}, but {available / 1e9:.1f} GB of memory are free")
        images = torch.empty(len(self.files), *self.shape, dtype=torch.uint8)
        pixels, unreadable = images.numpy(), dict[int, str]()

        def decode_part(first: int) -> list[tuple[int, str]]:
            failed = []
            for place in range(first, min(first + PICTURES_PER_TASK, len(self.files))):
                path = self.folder / self.files[place].path
                try:
                    pixels[place] = to_image(read_file(path), path.suffix, self.shape[0], self.shape[1])
                except PictureError as error:
                    failed.append((place, str(error)))
                except OSError as error:
                    failed.append((place, f"cannot be read ({error.strerror or error})"))
            return failed

        parts, pool = range(0, len(self.files), PICTURES_PER_TASK), ThreadPoolExecutor(num_usable_cores())
        try:
            with warnings.catch_warnings(action="ignore"):  # Pillow's, of odd files
                for failed in _with_progress(pool.map(decode_part, parts), len(self.files), show):
                    unreadable.update(failed)
                    if signals.stop_requested() and not signals.are_installed():  # they would end the process
                        raise KeyboardInterrupt
        finally:
            pool.shutdown(cancel_futures=True)  # at Ctrl-C
        left_out = tuple((self.files[place].path, reason) for place, reason in sorted(unreadable.items()))
        readable = [place for place in range(len(self.files)) if place not in unreadable]
        places = torch.tensor(readable, dtype=torch.int64)  # also where there are none
        return Decoded(images[places] if unreadable else images, places, left_out)

    def pictures(self, decoded: Decoded) -> Pictures:
        """The splits; checks that most files could be read, and some of each class."""
        files = [self.files[place] for place in decoded.places.tolist()]
        if len(decoded.unreadable) >= len(files):
            path, reason = decoded.unreadable[0]
            numbers = f"{len(decoded.unreadable):,} of {len(self.files):,} pictures"
            raise UserError(f"--data-dir {self.folder}: {numbers} cannot be read; the first: {path} ({reason})")
        _check_classes(self.folder, self.class_names, files)
        labels, is_test = torch.tensor([file.label for file in files]), torch.tensor([file.is_test for file in files])
        num_train = int((~is_test).sum())  # they come first
        digest = _sha256(decoded.images, labels, is_test) + "".join(self.class_names)
        return Pictures(
            train=Split(decoded.images[:num_train], labels[:num_train]),
            test=Split(decoded.images[num_train:], labels[num_train:]),
            class_names=self.class_names,
            sha256=hashlib.sha256(digest.encode()).hexdigest(),
            unreadable=decoded.unreadable,
            remark=self.remark,
        )


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def find_files(folder: Path) -> tuple[tuple[str, ...], list[File], str | None]:
    """The names of the classes; all picture files, first those to train on, in mixed order; and a remark, or None.

    Hidden files and files that have no picture's suffix are passed over. Links are followed, but no folder is entered
    twice.

    Raises:
        UserError: the folder has no pictures, a class without pictures, or a single class.
    """
    if not folder.is_dir():
        raise UserError(f"--data-dir {folder}: no such folder; {LAYOUT}")
    train, test = folder, None
    if _subfolders(folder / "train"):
        train = folder / "train"
        test = next((folder / name for name in TEST_FOLDERS if _subfolders(folder / name)), None)
    classes = dict[tuple[Path, str], Path]()
    for split, path in ((top, path) for top in (train, test) if top for path in _subfolders(top)):
        if (other := classes.setdefault((split, _name_of(path)), path)) != path:
            raise UserError(f"--data-dir {folder}: two folders are called {_name_of(path)}: {other!a} and {path!a}")
    names = tuple(sorted({name for split, name in classes if split == train}, key=natural_order))
    for split, name in classes:
        if name not in names:
            raise UserError(f"--data-dir {folder}: {split.name}/{name} is no class of train/; {LAYOUT}")
    seen = {_identity(path) for path in (folder, train, test, *classes.values()) if path}
    label_of = {name: label for label, name in enumerate(names)}
    files = [
        File(path, label_of[name], split == test, num_bytes, mtime_ns)
        for (split, name), top in classes.items()
        for path, num_bytes, mtime_ns in _walk(str(folder), str(top.relative_to(folder)), seen)
    ]
    if not files:
        raise UserError(f"--data-dir {folder}: no pictures in folders below it; {LAYOUT}")
    remark = None
    if test is None:
        files = _hold_out(folder, names, files)
        if train != folder:
            remark = f"{folder} has train/ but no test/<class>/ or val/<class>/: a fifth of train/ is the test set"
    _check_classes(folder, names, files)
    files.sort(key=lambda file: (file.is_test, natural_order(file.path) if file.is_test else [(0, _hash(file))]))
    return names, files, remark


def _name_of(path: Path) -> str:
    """What a folder is called, in one line that every terminal can show."""
    name = os.fsencode(path.name).decode(errors="replace")
    name = "".join("\ufffd" if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in name)
    return unicodedata.normalize("NFC", name)  # some file systems take letters and accents apart


def _hash(file: File) -> str:
    """Orders files as if at random, alike on every machine, and without moving the others when one is added."""
    return hashlib.sha256(unicodedata.normalize("NFC", file.path).encode(errors="surrogateescape")).hexdigest()


def _identity(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def _subfolders(folder: Path) -> list[Path]:
    """The folders of classes in `folder`, sorted, without links back to it or to what it is in."""
    try:
        if not folder.is_dir():
            return []
        above = {_identity(path) for path in (folder, *folder.resolve().parents)}
        found = sorted(path for path in folder.iterdir() if not path.name.startswith(IGNORED))
        return [path for path in found if path.is_dir() and _identity(path) not in above]
    except OSError as error:
        raise UserError(f"--data-dir {folder}: cannot be read ({error.strerror})") from error


def _walk(root: str, top: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, int, int]]:
    """Path below `root`, size and time of the picture files in `top` and in its subfolders that were not `seen` yet."""
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            entries = list(os.scandir(os.path.join(root, folder)))  # noqa: PTH118 - ten times the speed
        except OSError as error:
            raise UserError(f"--data-dir {error.filename}: cannot be read ({error.strerror})") from error
        for entry in entries:
            path, facts = f"{folder}/{entry.name}", None
            with contextlib.suppress(OSError):  # a link to itself, or to nothing
                facts = entry.stat()
            if entry.name.startswith(IGNORED):
                continue
            if facts is None or not stat.S_ISDIR(facts.st_mode):
                if is_picture_name(entry.name):
                    yield (path, facts.st_size, facts.st_mtime_ns) if facts else (path, -1, 0)
            elif (facts.st_dev, facts.st_ino) not in seen:
                seen.add((facts.st_dev, facts.st_ino))
                waiting.append(path)


def _hold_out(folder: Path, names: Sequence[str], files: Sequence[File]) -> list[File]:
    """`files` with a fifth of each class as the test set: the same ones in every run, whatever its seed."""
    held_out: list[File] = []
    for label, name in enumerate(names):
        own = sorted((file for file in files if file.label == label), key=_hash)
        if len(own) == 1:
            raise UserError(f"--data-dir {folder}: class {name} has one picture; without test/ it needs two or more")
        num_test = max(1, round(TEST_SHARE * len(own))) if own else 0
        held_out += [file._replace(is_test=place < num_test) for place, file in enumerate(own)]
    return held_out


def _check_classes(folder: Path, names: Sequence[str], files: Sequence[File]) -> None:
    if len(names) == 1:
        raise UserError(f"--data-dir {folder}: one class only ({names[0]}), at least two are needed; {LAYOUT}")
    counts = Counter((file.label, file.is_test) for file in files)
    for label, name in enumerate(names):
        for is_test, split in ((False, "training"), (True, "test")):
            if not counts[label, is_test]:
                raise UserError(f"--data-dir {folder}: class {name} has no {split} pictures that can be read")


def warnings_of(pictures: Pictures) -> list[str]:
    """That there are no test pictures, or that files were left out: how many, and the first ones by name."""
    remarks = [pictures.remark] if pictures.remark else []
    if not pictures.unreadable:
        return remarks
    named = ", ".join(f"{path} ({reason})" for path, reason in pictures.unreadable[:NUM_NAMED])
    more = ", ..." if len(pictures.unreadable) > NUM_NAMED else ""
    total = len(pictures.train) + len(pictures.test) + len(pictures.unreadable)
    return [
        *remarks,
        f"{len(pictures.unreadable):,} of {total:,} pictures cannot be read and are left out: {named}{more}",
    ]


def _with_progress(
    parts: Iterator[list[tuple[int, str]]], total: int, show: Show | None
) -> Iterator[list[tuple[int, str]]]:
    """`parts`, of `total` pictures; rank 0 shows how far it is: a bar on a terminal, else a line every five seconds."""
    is_terminal, shown_s, text = sys.stderr.isatty(), time.monotonic(), ""
    for number, part in enumerate(parts, start=1):
        yield part
        done = min(number * PICTURES_PER_TASK, total)
        if not is_first_rank() or time.monotonic() - shown_s < (0.2 if is_terminal else 5.0):
            continue
        shown_s = time.monotonic()
        text = f"decoding pictures  {done:,} of {total:,}"
        if is_terminal:
            bar = "#" * (20 * done // total)  # in bars: rich takes [# ] for markup
            text = f"decoding pictures  |{bar:20}|  {done:,} of {total:,}"
        if is_terminal and show is not None:
            show(text)
        else:
            sys.stderr.write(f"\r{text}" if is_terminal else f"{text}\n")
    if text and is_terminal and show is None:
        sys.stderr.write("\r\033[K")
