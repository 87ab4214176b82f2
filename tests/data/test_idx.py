import gzip
import hashlib
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mnist.data.idx import read_images, read_labels
from mnist.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
LABELS = np.array([3, 0, 9], dtype=np.uint8)


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def corrupt_middle(content):
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 8]) + content[middle + 8 :]


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", ["file", "file.gz"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize(("array", "read"), [(IMAGES, read_images), (LABELS, read_labels)])
def test_a_good_file_is_read_packed_or_not_whatever_its_name(raw, array, read, pack, name):
    path = raw / name
    path.write_bytes(pack(idx_bytes(array)))
    tensor, digest = read(path)
    assert np.array_equal(tensor.numpy(), array)
    assert digest == hashlib.sha256(idx_bytes(array)).hexdigest()


@settings(deadline=None, max_examples=40)
@given(
    array=arrays.arrays(np.uint8, arrays.array_shapes(min_dims=3, max_dims=3, max_side=6))
    | arrays.arrays(np.uint8, st.integers(1, 30)),
    is_packed=st.booleans(),
)
def test_what_is_written_is_what_is_read(tmp_path_factory, array, is_packed):
    path = tmp_path_factory.mktemp("idx") / "MNIST" / "raw" / ("file.gz" if is_packed else "file")
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(idx_bytes(array)) if is_packed else idx_bytes(array))
    tensor, _ = (read_labels if array.ndim == 1 else read_images)(path)
    assert np.array_equal(tensor.numpy(), array)


def test_the_first_of_the_eight_numbers_of_qmnist_is_the_label(raw):
    rows = np.array([[7, 0, 2610, 5, 0, 0, 1, 2], [-1, 4, 9, 9, 9, 9, 9, 9]], dtype=">i4")
    (raw / "qmnist").write_bytes(struct.pack(">3I", 0x0C02, 2, 8) + rows.tobytes())
    labels, _ = read_labels(raw / "qmnist")
    assert (labels.tolist(), labels.dtype) == ([7, -1], torch.int64)


@pytest.mark.parametrize(("channels", "shape"), [(1, (3, 28, 28)), (3, (3, 3, 28, 28))])
def test_channels_may_come_last_in_the_file(raw, channels, shape):
    array = np.random.default_rng(0).integers(0, 256, (3, 28, 28, channels), dtype=np.uint8)
    (raw / "file").write_bytes(idx_bytes(array))
    images, _ = read_images(raw / "file")
    assert images.shape == shape
    assert torch.equal(images.reshape(3, channels, 28, 28), torch.from_numpy(array).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (struct.pack(">4I", 0x0D03, 1, 1, 1), r"holds float32 numbers \(1 x 1 x 1\), expected images"),
        (struct.pack(">5I", 0x0804, 1, 1, 1, 7), r"holds uint8 numbers \(1 x 1 x 1 x 7\), expected images"),
    ],
)
def test_other_numbers_are_named_for_what_they_are(raw, header, what):
    (raw / "file").write_bytes(header + bytes(28))
    with pytest.raises(UserError, match=what):
        read_images(raw / "file")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("device", ["fifo", "/dev/zero"])
def test_what_never_ends_is_refused_at_once(raw, device):
    if device == "fifo":
        os.mkfifo(raw / "file")
    else:
        (raw / "file").symlink_to(device)
    with pytest.raises(UserError, match="not a regular file"):
        read_images(raw / "file")


def largest_allocation(path):
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=f"^{path}: "):
            read_images(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_sparse_file_of_8_gb_takes_no_memory(raw):
    with (raw / "file").open("wb") as file:
        file.write(struct.pack(">4I", 0x0803, 10_000_000, 28, 28))
        file.truncate(8_000_000_000)
    assert largest_allocation(raw / "file") < 1_000_000


@pytest.mark.parametrize("num_images", [1, 10_000_000])
def test_a_packed_file_is_unpacked_as_far_as_its_header_says_and_up_to_a_gigabyte(raw, num_images):
    packer = zlib.compressobj(9, wbits=31)
    content = packer.compress(struct.pack(">4I", 0x0803, num_images, 28, 28))
    content += b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    (raw / "file").write_bytes(content)
    assert largest_allocation(raw / "file") < 2_000_000


BROKEN = {
    "empty": b"",
    "half a header": idx_bytes(IMAGES)[:7],
    "header alone": idx_bytes(IMAGES)[:16],
    "cut by a byte": idx_bytes(IMAGES)[:-1],
    "cut in half": idx_bytes(IMAGES)[:1000],
    "a byte too long": idx_bytes(IMAGES) + b"\0",
    "a page": b"<html><body>404 Not Found</body></html>",
    "wrong element type": b"\0\0\x0d\x03" + idx_bytes(IMAGES)[4:],
    "wrong byte order": bytes(reversed(idx_bytes(IMAGES)[:4])) + idx_bytes(IMAGES)[4:],
    "labels": idx_bytes(np.arange(20, dtype=np.uint8)),
    "no images": idx_bytes(IMAGES[:0]),
    "huge header": struct.pack(">4I", 0x0803, 2**32 - 1, 2**32 - 1, 2**32 - 1),
}

BROKEN_GZ = {
    "empty": b"",
    "cut in its header": gzip.compress(idx_bytes(IMAGES))[:5],
    "cut in half": gzip.compress(idx_bytes(IMAGES))[:1000],
    "cut in its checksum": gzip.compress(idx_bytes(IMAGES))[:-4],
    "corrupt": corrupt_middle(gzip.compress(idx_bytes(IMAGES))),
    "corrupt deflate": gzip.compress(idx_bytes(IMAGES))[:10] + b"\xff" * 200,
    "packed junk": gzip.compress(b"junk" * 100),
    "packed and cut": gzip.compress(idx_bytes(IMAGES)[:-1]),
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(pytest.param("file", content, id=what) for what, content in BROKEN.items()),
        *(pytest.param("file.gz", content, id=f"gz {what}") for what, content in BROKEN_GZ.items()),
    ],
)
def test_a_broken_file_is_refused_by_its_name_with_a_way_out(raw, name, content):
    path = raw / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_images(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "--data-dir" in str(caught.value)


@pytest.mark.parametrize(
    ("array", "read", "holds", "expected"),
    [(LABELS.repeat(9), read_images, "labels", "images"), (IMAGES, read_labels, "images", "labels")],
)
def test_a_file_of_the_other_kind_is_called_so(raw, array, read, holds, expected):
    (raw / "file").write_bytes(idx_bytes(array))
    with pytest.raises(UserError, match=f"holds {holds}, expected {expected}"):
        read(raw / "file")


def test_what_cannot_be_opened_is_refused_by_its_name(raw):
    (raw / "folder").mkdir()
    for path in (raw / "absent", raw / "absent.gz", raw / "folder"):
        with pytest.raises(UserError, match=f"^{path}: cannot be read"):
            read_images(path)


def test_a_broken_file_outside_any_data_folder_is_refused_as_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("alone").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"^alone: "):
        read_images(Path("alone"))
