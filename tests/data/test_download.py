import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import io
import socket
import struct
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from mnist.data import datasets
from mnist.data import download as module
from mnist.data.sources import SOURCES
from mnist.errors import UserError
from mnist.system.torchvision_compat import import_torchvision
from tests.ranks import run_ranks

NAMES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
RNG = np.random.default_rng(0)
CONTENTS = {
    name: idx
    for name, array in zip(
        NAMES,
        [RNG.integers(0, 256, (30, 28, 28)), RNG.integers(0, 10, 30), RNG.integers(0, 256, (9, 28, 28)), np.arange(9)],
        strict=True,
    )
    for idx in [struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype("u1").tobytes()]
}


def download(class_name, data_dir):
    """As `datasets.fetch` calls it; "MNIST" and "KMNIST" are the data sets mnist and kmnist."""
    module.download(class_name.lower(), data_dir, data_dir / class_name / "raw")


class Server:
    """Serves `files` on the loopback and counts who asked for what."""

    def __init__(self):
        self.files = {f"/{name}.gz": gzip.compress(content, mtime=0) for name, content in CONTENTS.items()}
        self.requests = Counter()
        self.delay_s = 0.0
        self.endless, self.bytes_sent = False, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests[self.path] += 1
                time.sleep(outer.delay_s)
                if outer.endless:
                    self._send_for_ever()
                    return
                content = outer.files.get(self.path)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def _send_for_ever(self):
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):
                    while outer.bytes_sent < 100_000_000:  # or the test would not end where the limit is missing
                        outer.bytes_sent += self.wfile.write(bytes(1 << 16))

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.close()


@pytest.fixture
def silent_url():
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"


@pytest.fixture
def mnist(monkeypatch, server):
    """torchvision's MNIST with the checksums of the served files, and the server as its only mirror."""
    dataset = import_torchvision("datasets").MNIST
    resources = [(path[1:], hashlib.md5(content).hexdigest()) for path, content in server.files.items()]
    monkeypatch.setattr(dataset, "resources", resources)
    monkeypatch.setattr(dataset, "mirrors", [server.url])
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("MNIST_MIRROR", raising=False)
    return dataset


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for_abandoned_downloads():
    for thread in threading.enumerate():
        if thread.name == "download":
            thread.join(timeout=20)
            assert not thread.is_alive()


def test_a_download_leaves_exactly_the_four_files(tmp_path, mnist):
    download("MNIST", tmp_path / "data")
    expected = {f"MNIST/raw/{name}": content for name, content in CONTENTS.items()}
    assert files_below(tmp_path / "data") == expected
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]


def test_another_data_set_goes_to_its_own_folder(tmp_path, mnist, monkeypatch):
    kmnist = import_torchvision("datasets").KMNIST
    monkeypatch.setattr(kmnist, "resources", mnist.resources)
    monkeypatch.setattr(kmnist, "mirrors", mnist.mirrors)
    download("KMNIST", tmp_path)
    assert set(files_below(tmp_path)) == {f"KMNIST/raw/{name}" for name in NAMES}


def test_qmnist_comes_from_its_addresses_or_from_ones_own_mirror(tmp_path, server, monkeypatch):
    names = SOURCES["qmnist"].files
    server.files = {f"/{new}.gz": server.files[f"/{old}.gz"] for new, old in zip(names, NAMES, strict=True)}
    served = [(server.url + path[1:], hashlib.md5(content).hexdigest()) for path, content in server.files.items()]
    published = {"train": served[:2], "test": served[2:], "nist": []}
    monkeypatch.setattr(import_torchvision("datasets").QMNIST, "resources", published)
    monkeypatch.setenv("no_proxy", "*")
    datasets.fetch("qmnist", str(tmp_path / "a"))
    refused = [(url.replace(server.url, "http://127.0.0.1:9/"), md5) for url, md5 in served]
    elsewhere = {"train": refused[:2], "test": refused[2:], "nist": []}
    monkeypatch.setattr(import_torchvision("datasets").QMNIST, "resources", elsewhere)
    monkeypatch.setenv("MNIST_MIRROR", server.url)
    datasets.fetch("qmnist", str(tmp_path / "b"))
    for folder in ("a", "b"):
        expected = {f"QMNIST/raw/{new}": CONTENTS[old] for new, old in zip(names, NAMES, strict=True)}
        assert files_below(tmp_path / folder) == expected


def emnist_archive():
    """A zip archive as NIST's: packed files of each data set, of which some are not in the table."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for split in ("letters", "balanced", "digits", "byclass"):
            for old, part in zip(
                NAMES, ("train-images-3", "train-labels-1", "test-images-3", "test-labels-1"), strict=True
            ):
                name = f"emnist-{split}-{part[:-2]}-idx{part[-1]}-ubyte"
                archive.writestr(f"gzip/{name}.gz", gzip.compress(CONTENTS[old] + split.encode()))
        archive.writestr("gzip/emnist-letters-mapping.txt", "1 65 97")
    return content.getvalue()


@pytest.fixture
def emnist(monkeypatch, server):
    """torchvision's EMNIST with an archive on the server."""
    server.files["/gzip.zip"] = emnist_archive()
    dataset = import_torchvision("datasets").EMNIST
    monkeypatch.setattr(dataset, "url", f"{server.url}gzip.zip")
    monkeypatch.setattr(dataset, "md5", hashlib.md5(server.files["/gzip.zip"]).hexdigest())
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("MNIST_MIRROR", raising=False)
    return dataset


def test_one_archive_serves_all_three_data_sets_of_emnist(tmp_path, emnist, server):
    for name in ("emnist_letters", "emnist_balanced", "emnist_digits"):
        datasets.fetch(name, str(tmp_path))
    assert server.requests == {"/gzip.zip": 1}
    found = files_below(tmp_path)
    assert len(found) == 12
    assert found["EMNIST/raw/emnist-letters-test-labels-idx1-ubyte"] == CONTENTS[NAMES[3]] + b"letters"
    assert found["EMNIST/raw/emnist-digits-train-images-idx3-ubyte"] == CONTENTS[NAMES[0]] + b"digits"


@pytest.mark.parametrize("content", [b"no archive", emnist_archive()[:-30]])
def test_an_archive_that_cannot_be_unpacked_leaves_nothing(tmp_path, emnist, server, monkeypatch, content):
    server.files["/gzip.zip"] = content
    monkeypatch.setattr(emnist, "md5", hashlib.md5(content).hexdigest())
    with pytest.raises(UserError, match=r"--dataset emnist_letters: not in .*zip"):
        datasets.fetch("emnist_letters", str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_an_archive_that_is_not_the_published_one_is_refused(tmp_path, emnist, server):
    server.files["/gzip.zip"] = emnist_archive() + b"more"
    with pytest.raises(UserError, match="not the published file"):
        datasets.fetch("emnist_letters", str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_an_incomplete_folder_is_completed(tmp_path, mnist):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / NAMES[0]).write_bytes(b"cut short")
    download("MNIST", tmp_path)
    assert files_below(raw) == CONTENTS


def test_what_is_there_is_not_fetched_again(tmp_path, mnist, server):
    download("MNIST", tmp_path)
    server.requests.clear()
    download("MNIST", tmp_path)
    assert not server.requests


def test_ones_own_mirror_is_asked_first(tmp_path, mnist, server, monkeypatch):
    monkeypatch.setattr(mnist, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("MNIST_MIRROR", server.url.rstrip("/"))
    download("MNIST", tmp_path)
    assert files_below(tmp_path / "MNIST" / "raw") == CONTENTS


def test_the_next_mirror_serves_what_the_first_one_lacks(tmp_path, mnist, server, monkeypatch):
    monkeypatch.setenv("MNIST_MIRROR", "http://127.0.0.1:9/")
    download("MNIST", tmp_path)
    assert files_below(tmp_path / "MNIST" / "raw") == CONTENTS


def test_a_mirror_that_never_answers_is_passed_over(tmp_path, mnist, silent_url, monkeypatch):
    monkeypatch.setenv("MNIST_MIRROR", silent_url)
    monkeypatch.setattr(module, "SOCKET_TIMEOUT_S", 0.2)
    download("MNIST", tmp_path)
    assert files_below(tmp_path / "MNIST" / "raw") == CONTENTS


def tamper(server):
    server.files[f"/{NAMES[3]}.gz"] = gzip.compress(CONTENTS[NAMES[3]][:-1] + b"\7")


def remove(server):
    del server.files[f"/{NAMES[2]}.gz"]


def replace_by_a_page(server):
    server.files[f"/{NAMES[0]}.gz"] = b"<html>Log in first</html>"


@pytest.mark.parametrize("damage", [tamper, remove, replace_by_a_page])
@pytest.mark.parametrize("before", ["absent", "empty", "occupied"])
def test_a_failed_download_leaves_everything_as_it_was(tmp_path, mnist, server, damage, before):
    data_dir = tmp_path / "new" / "data"
    if before != "absent":
        data_dir.mkdir(parents=True)
    if before == "occupied":
        (data_dir / "notes.txt").write_text("mine")
    paths = set(tmp_path.rglob("*"))
    damage(server)
    with pytest.raises(OSError, match=r"\S"):
        download("MNIST", data_dir)
    assert set(tmp_path.rglob("*")) == paths


def test_no_server_at_all_is_one_error_of_one_line(tmp_path, mnist, monkeypatch):
    monkeypatch.setattr(mnist, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(OSError, match="refused") as caught:
        download("MNIST", tmp_path)
    assert "\n" not in str(caught.value)


def test_the_error_tells_why_each_mirror_failed(tmp_path, mnist, server, monkeypatch):
    strange = tmp_path.as_uri()
    monkeypatch.setenv("MNIST_MIRROR", "mirror/mnist")
    monkeypatch.setattr(mnist, "mirrors", [server.url + "absent/", strange, "http://127.0.0.1:9/", "http://[::1/"])
    with pytest.raises(OSError, match="refused") as caught:
        download("MNIST", tmp_path / "data")
    failures = str(caught.value).split(", and ")
    assert [failure.split(f"/{NAMES[0]}.gz: ")[0] for failure in failures] == [
        *("mirror/mnist", server.url + "absent", strange, "http://127.0.0.1:9", "http://[::1"),
    ]
    for failure, words in zip(failures, ["not an http", "404", "not an http", "refused", "Invalid IPv6"], strict=True):
        assert words in failure


@pytest.mark.parametrize("mirror", ["file:///tmp/mnist", "mirror/mnist", "http://[::1/", "ftp://127.0.0.1/"])
def test_a_mirror_that_is_no_web_address_does_not_end_the_list(tmp_path, mnist, monkeypatch, mirror):
    monkeypatch.setenv("MNIST_MIRROR", mirror)
    download("MNIST", tmp_path)
    assert files_below(tmp_path / "MNIST" / "raw") == CONTENTS


def test_a_mirror_that_never_stops_sending_is_left(tmp_path, mnist, server, monkeypatch):
    monkeypatch.setitem(SOURCES, "mnist", dataclasses.replace(SOURCES["mnist"], max_bytes=1_000_000))
    server.endless = True
    with pytest.raises(OSError, match="sends more than 1,000,000 bytes"):
        download("MNIST", tmp_path / "data")
    assert server.bytes_sent < 30_000_000
    assert not (tmp_path / "data").exists()


def test_a_server_that_never_answers_is_given_up_per_connection(tmp_path, mnist, silent_url, monkeypatch):
    monkeypatch.setattr(mnist, "mirrors", [silent_url])
    monkeypatch.setattr(module, "SOCKET_TIMEOUT_S", 0.2)
    with pytest.raises(OSError, match="timed out"):
        download("MNIST", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_slow_servers_are_given_up_altogether(tmp_path, mnist, silent_url, monkeypatch):
    monkeypatch.setattr(mnist, "mirrors", [silent_url])
    monkeypatch.setattr(module, "SOCKET_TIMEOUT_S", 1.5)
    monkeypatch.setattr(module, "GIVE_UP_AFTER_S", 0.3)
    with pytest.raises(OSError, match="no answer from the servers"):
        download("MNIST", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    wait_for_abandoned_downloads()


def test_a_download_that_was_given_up_writes_nothing_later(tmp_path, mnist, server, monkeypatch):
    """The abandoned thread goes on to the next mirror."""
    monkeypatch.setattr(mnist, "mirrors", [server.url + "absent/", server.url])
    monkeypatch.setattr(module, "GIVE_UP_AFTER_S", 0.05)
    server.delay_s = 0.15
    with pytest.raises(OSError, match="no answer from the servers"):
        download("MNIST", tmp_path / "data")
    wait_for_abandoned_downloads()
    assert not (tmp_path / "data").exists()


def test_a_slow_download_that_gets_on_is_waited_for(tmp_path, mnist, server, monkeypatch):
    monkeypatch.setattr(module, "GIVE_UP_AFTER_S", 0.1)
    monkeypatch.setattr(module, "MIN_BYTES_PER_S", 0)
    server.delay_s = 0.1
    download("MNIST", tmp_path)
    assert files_below(tmp_path / "MNIST" / "raw") == CONTENTS


def test_two_jobs_at_once_fetch_each_file_once(tmp_path, mnist, server):
    def job():
        download("MNIST", tmp_path / "data")
        return files_below(tmp_path / "data" / "MNIST" / "raw") == CONTENTS

    server.delay_s = 0.1
    assert run_ranks(job, 2) == [True, True]
    assert server.requests == {f"/{name}.gz": 1 for name in NAMES}
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]


def test_a_job_that_waits_too_long_gives_up_and_leaves_the_lock_to_its_holder(tmp_path, mnist, server, monkeypatch):
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.2)
    lock = tmp_path / ".download.lock"
    with lock.open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=r"another process holds .*\.download\.lock"):
            download("MNIST", tmp_path)
        assert not server.requests
        assert lock.exists()
