"""Downloads the files of a data set: one process, bounded in time and size, all or nothing.

In: the name of a data set, and the folder for its files. Out: that folder with all files unpacked, or an error and
nothing. Other processes see the files only once they are whole. Mirrors and checksums are torchvision's;
its own download function has no time-out and no limit of size, and some errors end its list of mirrors.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO
from urllib.request import urlopen
from zipfile import BadZipFile, ZipFile

from filelock import FileLock, Timeout

from mnist.data.sources import SOURCES, Source, is_present
from mnist.errors import UserError
from mnist.system.torchvision_compat import import_torchvision

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
        max_bytes: of a file; a server that sends more has failed.
        members: names of the files that are taken from an archive, unpacked.
        num_bytes: received so far, of all files.
        failures: a line for each mirror that has failed.
        is_given_up: nobody waits any more: the thread that downloads should end.
        error: what has ended that thread.
    """

    mirrors: list[str]
    files: Sequence[tuple[str, str]]
    max_bytes: int
    members: Collection[str] = ()
    num_bytes: int = 0
    failures: list[str] = field(default_factory=list)
    is_given_up: bool = False
    error: Exception | None = None


def fetch(name: str, data_dir: str, show: Callable[[str], object] = lambda _: None) -> None:
    """Downloads the data set unless all its files are there; then nothing is written and no lock is taken.

    `show` is told how much has come in.

    Raises:
        UserError: it could not be downloaded. Says what was tried, and what to do.
    """
    source = SOURCES[name]
    if source.torchvision_class is None or is_present(name, data_dir):
        return
    folder = Path(data_dir, source.torchvision_class, "raw")
    try:
        download(name, Path(data_dir), folder, show)
    except (OSError, ImportError, AttributeError) as error:  # torchvision may have no class of that name
        raise UserError(
            f"--dataset {name}: not in {folder} and the download failed ({error}); either name the folder that holds "
            f"{source.torchvision_class}/raw with --data-dir or $MNIST_DATA_DIR, or copy the four files "
            f"({source.files[0]}[.gz] ...) to {folder}, or train on the embedded digits with --dataset digits"
        ) from error


def _transfer(source: Source) -> Transfer:
    """Addresses and checksums as torchvision has them; raises an ImportError or AttributeError where it has none."""
    published = getattr(import_torchvision("datasets"), str(source.torchvision_class))
    addresses = [(published.url, published.md5)] if hasattr(published, "url") else []  # EMNIST's archive
    if isinstance(published.resources, dict):  # QMNIST's are whole addresses, by split
        addresses = [address for split in ("train", "test") for address in published.resources[split]]
    mirrors, files = list(published.mirrors), published.resources
    if addresses:
        mirrors = [addresses[0][0].rpartition("/")[0]]
        files = [(url.rpartition("/")[2], md5) for url, md5 in addresses]
    own_mirrors = filter(None, [os.environ.get(MIRROR_VARIABLE)])
    same_archive = (other for other in SOURCES.values() if other.torchvision_class == source.torchvision_class)
    members = {file for other in same_archive for file in other.files}
    return Transfer([*own_mirrors, *mirrors], files, source.max_bytes, members)


def download(name: str, data_dir: Path, raw: Path, show: Callable[[str], object] = lambda _: None) -> None:
    """Fetches all files of a data set into `raw`, a folder below `data_dir`; one process per node calls this.

    A second job on the same folder waits for the first, and then finds it complete.

    Raises:
        OSError: no network, no answer in time, wrong checksums, or `data_dir` not writable. New folders are removed.
    """
    transfer = _transfer(SOURCES[name])
    new_folders = [folder for folder in (raw, *raw.parents) if not folder.exists()]
    lock = data_dir / ".download.lock"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=LOCK_TIMEOUT_S):
            try:
                if not is_present(name, str(data_dir)):  # or else another job was faster
                    _download_whole(transfer, data_dir, raw, show)
            finally:
                with contextlib.suppress(OSError):  # Windows does not remove an open file
                    lock.unlink()
    except Timeout as error:
        raise OSError(f"another process holds {lock}") from error
    finally:
        for folder in new_folders:
            with contextlib.suppress(OSError):  # only an empty one goes
                folder.rmdir()


def _download_whole(transfer: Transfer, data_dir: Path, raw: Path, show: Callable[[str], object]) -> None:
    """Fetches all files into a temporary folder of `data_dir`, and moves them to `raw` when all are there."""
    with TemporaryDirectory(prefix=".download-", dir=data_dir, ignore_cleanup_errors=True) as folder:
        _download_within_time(transfer, Path(folder), show)
        raw.mkdir(parents=True, exist_ok=True)
        for path in Path(folder).iterdir():
            path.replace(raw / path.name)


def _download_within_time(transfer: Transfer, folder: Path, show: Callable[[str], object]) -> None:
    """Waits for a thread as long as enough comes in, then leaves it: looking up a host name has no time-out."""
    thread = threading.Thread(target=_fetch_files, args=(transfer, folder), daemon=True, name="download")
    start = time.monotonic()
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.1)
        show(f"downloading  {transfer.num_bytes / 1e6:.1f} MB")
        elapsed = time.monotonic() - start
        if elapsed > GIVE_UP_AFTER_S and transfer.num_bytes < elapsed * MIN_BYTES_PER_S:
            transfer.is_given_up = True
            raise OSError(f"no answer from the servers within {GIVE_UP_AFTER_S:.0f} s")
    if transfer.error is not None:
        raise OSError(" ".join(str(transfer.error).split())) from transfer.error


def _fetch_files(transfer: Transfer, folder: Path) -> None:
    try:
        for name, md5 in transfer.files:
            _fetch_from_mirrors(transfer, folder / name, md5)
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
                raise OSError(f"sends more than {transfer.max_bytes:,} bytes")
    if digest.hexdigest() != md5:
        raise OSError(f"{num_bytes:,} bytes that are not the published file (md5)")
    if path.suffix == ".zip":
        _unpack_members(path, transfer.members)
    else:
        with path.open("rb") as packed:
            _unpack(packed, path.with_suffix(""))
    path.unlink()


def _unpack_members(path: Path, members: Collection[str]) -> None:
    """Unpacks those files of a zip archive, each packed with gzip, to its folder."""
    with ZipFile(path) as archive:
        for member in archive.namelist():
            name = Path(member).stem
            if name in members and member.endswith(".gz"):
                with archive.open(member) as packed:
                    _unpack(packed, path.with_name(name))


def _unpack(packed: IO[bytes], path: Path) -> None:
    with gzip.open(packed) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
