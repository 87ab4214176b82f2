"""Writing files so that a crash leaves either the old content or the new, never half of it.

In: a path and bytes or JSON. Out: the file, flushed to the disk. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` in one step: a temporary neighbour, flushed, renamed, the folder flushed.

    Raises:
        OSError: disk full, not writable; `path` is what it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_and_flush(temporary, content)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    flush_folder(path.parent)


def write_and_flush(path: Path, content: bytes) -> None:
    """Writes `content` and waits until the disk has it.

    Raises:
        OSError: names `path`, which Python leaves out where the disk is full.
    """
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise


def flush_folder(folder: Path) -> None:
    """Waits until the disk has the folder's names; a no-op where folders cannot be opened (Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Any) -> None:
    """`content` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
