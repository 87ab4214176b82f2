"""Downloads the files of a data set: one process, bounded in time and size, all or nothing.

In: mirrors, file names and checksums, and the folder for the files. Out: that folder with all files unpacked, or an
`OSError` and nothing. Other processes see the files only once they are whole. Mirrors and checksums are torchvision's;
its own download function has no time-out and no limit of size, and some errors end its list of mirrors.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.request import urlopen
from zipfile import BadZipFile, ZipFile

from filelock import FileLock, Timeout

MIRROR_VARIABLE = "MNIST_MIRROR"  # a base URL to try first, for clusters with a mirror of their own
SOCKET_TIMEOUT_S = 8.0
GIVE_UP_AFTER_S = 20.0  # ... unless data comes in at
MIN_BYTES_PER_S = 50_000
LOCK_TIMEOUT_S = 600.0  # whoever holds the lock gives up by itself, long before that


@dataclass
class Transfer:
    """What is fetched, and how far it is.

    Attributes:
        mirrors: base URLs, in the order in which they are asked; one that failed is removed.
        files: name and md5 of each file, packed with gzip; or of one zip archive with such files.
        max_bytes: size of the largest file as published; a server that sends more has failed.
        members: names of the files that are taken from an archive, unpacked.
    """

    mirrors: list[str]
    files: Sequence[tuple[str, str]]
    max_bytes: int
    members: Collection[str] = ()
    num_bytes: int = 0
    failures: list[str] = field(default_factory=list)
    is_given_up: bool = False
    error: Exception | None = None


def download(transfer: Transfer, data_dir: Path, raw: Path, is_complete: Callable[[], bool]) -> None:
    """Fetches all files into `raw`, a folder below `data_dir`; one process per node calls this.

    The files arrive in `<data_dir>/.download-<pid>` and are renamed into place when all are complete. A second job on
    the same folder waits for the first, and then finds it complete.

    Raises:
        OSError: no network, no answer in time, wrong checksums, or `data_dir` not writable. New folders are removed.
    """
    new_folders = [folder for folder in (raw, *raw.parents) if not folder.exists()]
    lock, staging = data_dir / ".download.lock", data_dir / f".download-{os.getpid()}"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=LOCK_TIMEOUT_S):
            try:
                if not is_complete():  # or else another job was faster
                    staging.mkdir(exist_ok=True)
                    _download_within_time(transfer, staging)
                    raw.mkdir(parents=True, exist_ok=True)
                    for path in staging.iterdir():
                        path.replace(raw / path.name)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
                with contextlib.suppress(OSError):  # Windows does not remove an open file
                    lock.unlink()
    except Timeout as error:
        raise OSError(f"another process holds {lock}") from error
    finally:
        for folder in new_folders:
            with contextlib.suppress(OSError):  # only an empty one goes
                folder.rmdir()


def _download_within_time(transfer: Transfer, staging: Path) -> None:
    """Waits for a thread as long as enough comes in, then leaves it: looking up a host name has no time-out."""
    thread = threading.Thread(target=_fetch_files, args=(transfer, staging), daemon=True, name="download")
    start = time.monotonic()
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.1)
        if sys.stderr.isatty():
            sys.stderr.write(f"\rdownloading: {transfer.num_bytes / 1e6:.1f} MB " if thread.is_alive() else "\r\033[K")
        elapsed = time.monotonic() - start
        if elapsed > GIVE_UP_AFTER_S and transfer.num_bytes < elapsed * MIN_BYTES_PER_S:
            transfer.is_given_up = True
            raise OSError(f"no answer from the servers within {GIVE_UP_AFTER_S:.0f} s")
    if transfer.error is not None:
        raise OSError(" ".join(str(transfer.error).split())) from transfer.error


def _fetch_files(transfer: Transfer, staging: Path) -> None:
    own = os.environ.get(MIRROR_VARIABLE)
    transfer.mirrors = [*([own] if own else []), *transfer.mirrors]
    try:
        for name, md5 in transfer.files:
            _fetch_from_mirrors(transfer, staging / name, md5)
    except Exception as error:  # handed over to the thread that waits, whatever it is
        transfer.error = error


def _fetch_from_mirrors(transfer: Transfer, path: Path, md5: str) -> None:
    """One file, unpacked, from the first mirror that has it; raises an OSError that tells why each one failed."""
    while transfer.mirrors:
        url = f"{transfer.mirrors[0].rstrip('/')}/{path.name}"
        try:
            return _fetch(transfer, url, path, md5)
        except (OSError, EOFError, ValueError, HTTPException, BadZipFile) as error:
            if transfer.is_given_up:
                raise
            transfer.failures.append(f"{url}: {error}")
            transfer.mirrors.pop(0)
    raise OSError(", and ".join(transfer.failures))


def _fetch(transfer: Transfer, url: str, path: Path, md5: str) -> None:
    if not url.startswith(("http://", "https://")):
        raise ValueError("not an http:// or https:// address")
    digest, num_bytes = hashlib.md5(usedforsecurity=False), 0
    with urlopen(url, timeout=SOCKET_TIMEOUT_S) as response, path.open("wb") as file:  # noqa: S310
        while chunk := response.read1(1 << 16):
            file.write(chunk)
            digest.update(chunk)
            num_bytes += len(chunk)
            transfer.num_bytes += len(chunk)
            if transfer.is_given_up:
                raise OSError("given up")
            if num_bytes > transfer.max_bytes:
                raise OSError(f"sends more than the {transfer.max_bytes:,} bytes of the published file")
    if digest.hexdigest() != md5:
        raise OSError(f"{num_bytes:,} bytes that are not the published file (md5)")
    if path.suffix == ".zip":
        with ZipFile(path) as archive:
            for member in archive.namelist():
                name = Path(member).stem
                if name in transfer.members and member.endswith(".gz"):
                    with archive.open(member) as packed:
                        _unpack(packed, path.with_name(name))
    else:
        with path.open("rb") as packed:
            _unpack(packed, path.with_suffix(""))
    path.unlink()


def _unpack(packed: IO[bytes], path: Path) -> None:
    with gzip.open(packed) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
