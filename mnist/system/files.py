"""The project's own files: written whole or not at all, read only where they are regular files of bounded size.

In: a path, and bytes or JSON. Out: the file, flushed to the disk; or its content.
What is not complete is called `.tmp-<name>`. One process writes to a folder at a time (a run directory is locked), so
what has such a name at the start was left by a process that was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any, NoReturn

from mnist.errors import RunError, UserError

MAX_JSON_BYTES = 16 << 20
_DO_NOT_WAIT = getattr(os, "O_NONBLOCK", 0)  # opening a FIFO waits for a writer; Windows has neither flag
_DO_NOT_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


class RecordError(RunError):
    """A file is not what the project writes there. The message is one line that names the file."""


def temporary_path(path: Path) -> Path:
    """The name that `path` has until it is complete."""
    return path.with_name(f".tmp-{path.name}")


def remove_leftovers(folder: Path) -> None:
    """Removes from `folder` itself, not from its subfolders, what a killed process did not finish."""
    for path in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError):  # one leftover too many does not end a run
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def refuse_symlink(path: Path) -> None:
    """Raises a UserError where `path` is a symbolic link: writing there would change something elsewhere."""
    if path.is_symlink():
        raise UserError(f"{path}: a symbolic link to {path.readlink()}; runs do not write through links, remove it")


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` in one step, flushed; raises an OSError where it cannot, and leaves `path` as is."""
    temporary = temporary_path(path)
    try:
        write_and_flush(temporary, content)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    flush(path.parent)


def write_and_flush(path: Path, content: bytes) -> None:
    """Writes `content` and waits until the disk has it; raises an OSError that names `path`, also on a full disk."""
    try:
        with open(path, "wb", opener=lambda name, flags: os.open(name, flags | _DO_NOT_FOLLOW, 0o666)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise


def flush(path: Path) -> None:
    """Waits until the disk has what was written to a file, by whatever process, or the names in a folder."""
    if os.name != "posix":  # Windows opens no folder, and flushes through a writable descriptor only
        return
    descriptor = os.open(path, os.O_RDONLY | _DO_NOT_WAIT)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file, or an OSError; a RecordError where it is another thing or has more bytes."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _DO_NOT_WAIT)) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise RecordError(f"{path}: not a regular file")
        if facts.st_size > max_bytes:
            raise RecordError(f"{path}: {facts.st_size:,} bytes, expected at most {max_bytes:,}")
        return file.read(facts.st_size)  # reading max_bytes would first allocate them


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the project, {} where there is no file; a RecordError where it holds none."""
    try:
        content = json.loads(read_regular(path, MAX_JSON_BYTES), parse_int=_parse_int, parse_constant=_refuse)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path}: holds no JSON object")
    return content


def _parse_int(digits: str) -> int:
    if len(digits) > 19:  # more than 64 bits hold
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def write_json(path: Path, content: Any) -> None:
    """`content` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
