"""The picture files below a folder: their classes, and which of them are test pictures.

In: a folder with `train/<class>/*` and `test/<class>/*`, or `<class>/*` alone, of which a fifth of each class becomes
the test set. Out: `File`s in an order that depends on their names only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from mnist.data.picture_file import IGNORED, is_picture_name, natural_order
from mnist.errors import UserError

TEST_FOLDERS = ("test", "val")  # the first one that is there
TEST_SHARE = 0.2  # of each class, where there is no folder of test pictures
LAYOUT = "expected train/<class>/ and test/<class>/ with pictures, or <class>/ alone"


class File(NamedTuple):
    """A picture file: path below the folder, class, split, and what shows that it has changed."""

    path: str
    label: int
    is_test: bool
    num_bytes: int
    mtime_ns: int


def find_files(folder: Path) -> tuple[tuple[str, ...], list[File], str | None]:
    """The names of the classes; all picture files, first those to train on, in mixed order; and a remark, or None.

    Hidden files and files that have no picture's suffix are passed over, and so are links to folders in the folder of
    a class; other links are followed.

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
    label_of = {name: label for label, name in enumerate(names)}
    files = [
        File(path, label_of[name], split == test, num_bytes, mtime_ns)
        for (split, name), top in classes.items()
        for path, num_bytes, mtime_ns in _walk(folder, top)
    ]
    if not files:
        raise UserError(f"--data-dir {folder}: no pictures in folders below it; {LAYOUT}")
    remark = None
    if test is None:
        files = _hold_out(folder, names, files)
        if train != folder:
            remark = f"{folder} has train/ but no test/<class>/ or val/<class>/: a fifth of train/ is the test set"
    check_classes(folder, names, ((file.label, file.is_test) for file in files))
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


def _subfolders(folder: Path) -> list[Path]:
    """The folders of classes in `folder`, sorted, without links back to it or to what it is in."""
    try:
        if not folder.is_dir():
            return []
        above = {folder.resolve(), *folder.resolve().parents}
        found = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(IGNORED))
        return sorted(path for path in found if path.resolve() not in above)
    except OSError as error:
        _refuse(error)


def _walk(root: Path, top: Path) -> Iterator[tuple[str, int, int]]:
    """Path below `root`, size and time of each picture file in `top` and in its subfolders, but not in linked ones."""
    for folder, subfolders, names in os.walk(top, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(IGNORED)]
        below = Path(folder).relative_to(root).as_posix()
        for name in names:
            if is_picture_name(name) and not name.startswith(IGNORED):
                num_bytes, mtime_ns = -1, 0
                with contextlib.suppress(OSError):  # a link to itself, or to nothing
                    facts = os.stat(f"{folder}/{name}")  # noqa: PTH116 - ten times the speed
                    num_bytes, mtime_ns = facts.st_size, facts.st_mtime_ns
                yield f"{below}/{name}", num_bytes, mtime_ns


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"--data-dir {error.filename}: cannot be read ({error.strerror})") from error


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


def check_classes(folder: Path, names: Sequence[str], labels: Iterable[tuple[int, bool]]) -> None:
    """Raises a UserError unless there are two classes, each with pictures to train on and to test on.

    Args:
        folder: named in the message.
        names: of the classes.
        labels: class of each picture, and whether it is a test picture.
    """
    if len(names) == 1:
        raise UserError(f"--data-dir {folder}: one class only ({names[0]}), at least two are needed; {LAYOUT}")
    counts = Counter(labels)
    for label, name in enumerate(names):
        for is_test, split in ((False, "training"), (True, "test")):
            if not counts[label, is_test]:
                raise UserError(f"--data-dir {folder}: class {name} has no {split} pictures that can be read")
