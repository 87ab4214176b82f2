"""Downloads a data set by torchvision's own code (mirrors, checksums), made safe: one process, bounded, all or nothing.

In: a data set's torchvision class name, and the folder it belongs in. Out: `<data_dir>/<name>/raw/*-ubyte`, complete,
or an `OSError` and nothing. Other processes see the files only once they are whole.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from pathlib import Path

from filelock import FileLock, Timeout

from mnist.torchvision_compat import import_torchvision

MIRROR_VARIABLE = "MNIST_MIRROR"  # a base URL to try first, for clusters with a mirror of their own
SOCKET_TIMEOUT_S = 8.0
GIVE_UP_AFTER_S = 20.0  # ... unless data comes in at
MIN_BYTES_PER_S = 50_000


def download(class_name: str, data_dir: Path) -> None:
    """Fetches the four files of `torchvision.datasets.<class_name>` into `data_dir`; one process per node calls this.

    The files arrive in `<data_dir>/.download-<pid>` and are renamed into place one by one when all four are complete. A
    second job on the same folder waits for the first and then finds its files.

    Raises:
        OSError: no network, no answer in time, wrong checksums, or `data_dir` not writable.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = data_dir / ".download.lock"
    try:
        with FileLock(lock, timeout=GIVE_UP_AFTER_S):
            _download_unless_there(class_name, data_dir)
    except Timeout as error:
        raise OSError(f"another process holds {lock}") from error
    finally:
        lock.unlink(missing_ok=True)  # whoever waits for it has it open; at worst two fetch the same files
        if not any(data_dir.iterdir()):
            data_dir.rmdir()


def _download_unless_there(class_name: str, data_dir: Path) -> None:
    raw = data_dir / class_name / "raw"
    if len(list(raw.glob("*-ubyte"))) == 4:
        return  # another job was faster
    staging = data_dir / f".download-{os.getpid()}"
    try:
        _download_within_time(class_name, staging)
        raw.mkdir(parents=True, exist_ok=True)
        for path in (staging / class_name / "raw").glob("*-ubyte"):
            path.replace(raw / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download_within_time(class_name: str, staging: Path) -> None:
    """Runs torchvision's download in a thread, which is left behind when too little comes in.

    It opens URLs without a time-out, and names can take long to resolve.
    """
    errors: list[Exception] = []

    def work() -> None:
        try:
            dataset = getattr(import_torchvision("datasets"), class_name)
            mirror = os.environ.get(MIRROR_VARIABLE)
            mirrors = [mirror.rstrip("/") + "/"] if mirror else []
            fetcher = type(class_name, (dataset,), {"mirrors": mirrors + dataset.mirrors})
            fetcher(staging, train=True, download=True)
        except Exception as error:  # handed over to the caller below, whatever it is
            errors.append(error)

    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT_S)
    start = time.monotonic()
    thread = threading.Thread(target=work, daemon=True, name="download")
    try:
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.1)
            elapsed = time.monotonic() - start
            if elapsed > GIVE_UP_AFTER_S and _bytes_below(staging) < elapsed * MIN_BYTES_PER_S:
                raise OSError(f"no answer from the servers within {GIVE_UP_AFTER_S:.0f} s")
    finally:
        socket.setdefaulttimeout(previous)
    if errors:
        last_reason = " ".join(str(errors[0]).split()).rpartition("got: ")[2]  # torchvision lists one per mirror
        raise OSError(last_reason) from errors[0]


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.gz"))
