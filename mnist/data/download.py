"""Downloads a data set with torchvision's code (mirrors, checksums), made safe: one process, bounded, all or nothing.

In: a data set's torchvision class name, and the folder it belongs in. Out: `<data_dir>/<name>/raw/*-ubyte`, complete,
or an `OSError` and nothing. Other processes see the files only once they are whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

from filelock import FileLock, Timeout

from mnist.system.torchvision_compat import import_torchvision

MIRROR_VARIABLE = "MNIST_MIRROR"  # a base URL to try first, for clusters with a mirror of their own
SOCKET_TIMEOUT_S = 8.0
GIVE_UP_AFTER_S = 20.0  # ... unless data comes in at
MIN_BYTES_PER_S = 50_000
LOCK_TIMEOUT_S = 600.0  # whoever holds the lock gives up by itself, long before that


def download(class_name: str, data_dir: Path) -> None:
    """Fetches the four files of `torchvision.datasets.<class_name>` into `data_dir`; one process per node calls this.

    The files arrive in `<data_dir>/.download-<pid>` and are renamed into place when all four are complete. A second job
    on the same folder waits for the first and then finds its files.

    Raises:
        OSError: no network, no answer in time, wrong checksums, or `data_dir` not writable.
    """
    is_new = not data_dir.exists()
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = data_dir / ".download.lock"
    try:
        with FileLock(lock, timeout=LOCK_TIMEOUT_S):
            try:
                _download_unless_there(class_name, data_dir)
            finally:
                with contextlib.suppress(OSError):  # Windows does not remove an open file
                    lock.unlink()
    except Timeout as error:
        raise OSError(f"another process holds {lock}") from error
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it goes only if it is empty
                data_dir.rmdir()


def _download_unless_there(class_name: str, data_dir: Path) -> None:
    raw = data_dir / class_name / "raw"
    if len(list(raw.glob("*-ubyte"))) == 4:
        return  # another job was faster
    staging = data_dir / f".download-{os.getpid()}"
    try:
        _download_within_time(class_name, staging)
        raw.mkdir(parents=True, exist_ok=True)
        for path in staging.glob("*-ubyte"):
            path.replace(raw / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download_within_time(class_name: str, staging: Path) -> None:
    """Downloads in a thread, which is left to end by itself when too little comes in (names can take long)."""
    errors: list[Exception] = []
    given_up = threading.Event()

    def work() -> None:
        previous = socket.getdefaulttimeout()
        socket.setdefaulttimeout(SOCKET_TIMEOUT_S)  # torchvision opens URLs without one
        try:
            _fetch_files(class_name, staging, given_up)
        except Exception as error:  # handed over to the caller below, whatever it is
            errors.append(error)
        finally:
            socket.setdefaulttimeout(previous)

    start = time.monotonic()
    thread = threading.Thread(target=work, daemon=True, name="download")
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.1)
        elapsed = time.monotonic() - start
        if elapsed > GIVE_UP_AFTER_S and _bytes_below(staging) < elapsed * MIN_BYTES_PER_S:
            given_up.set()
            raise OSError(f"no answer from the servers within {GIVE_UP_AFTER_S:.0f} s")
    if errors:
        raise OSError(" ".join(str(errors[0]).split())) from errors[0]


def _fetch_files(class_name: str, staging: Path, given_up: threading.Event) -> None:
    """The four files, unpacked, from the first mirror that has them; one that failed is not asked again."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # no bars in log files
    dataset = getattr(import_torchvision("datasets"), class_name)
    utils = import_torchvision("datasets.utils")
    own = os.environ.get(MIRROR_VARIABLE)
    mirrors = [*([own.rstrip("/") + "/"] if own else []), *dataset.mirrors]
    for name, md5 in dataset.resources:
        while not given_up.is_set():
            try:
                utils.download_and_extract_archive(mirrors[0] + name, str(staging), filename=name, md5=md5)
                break
            except (OSError, RuntimeError) as error:
                failed = mirrors.pop(0)
                if not mirrors:
                    raise OSError(f"{failed}: {error}") from error


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.gz"))
