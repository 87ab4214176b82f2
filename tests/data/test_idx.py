import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mnist.data.idx import IMAGES_MAGIC, LABELS_MAGIC, read_idx
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


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize(("array", "magic"), [(IMAGES, IMAGES_MAGIC), (LABELS, LABELS_MAGIC)])
def test_a_good_file_is_read_with_the_hash_of_its_plain_bytes(raw, array, magic, pack):
    path = raw / ("file.gz" if pack is gzip.compress else "file")
    path.write_bytes(pack(idx_bytes(array)))
    tensor, digest = read_idx(path, magic)
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
    tensor, _ = read_idx(path, 0x0800 + array.ndim)
    assert np.array_equal(tensor.numpy(), array)


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
    "huge header": struct.pack(">4I", IMAGES_MAGIC, 2**32 - 1, 2**32 - 1, 2**32 - 1),
}

BROKEN_GZ = {
    "empty": b"",
    "not packed": idx_bytes(IMAGES),
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
        read_idx(path, IMAGES_MAGIC)
    assert str(caught.value).startswith(f"{path}: ")
    assert "--data-dir" in str(caught.value)


@pytest.mark.parametrize(
    ("array", "magic", "holds", "expected"),
    [(LABELS.repeat(9), IMAGES_MAGIC, "labels", "images"), (IMAGES, LABELS_MAGIC, "images", "labels")],
)
def test_a_file_of_the_other_kind_is_called_so(raw, array, magic, holds, expected):
    (raw / "file").write_bytes(idx_bytes(array))
    with pytest.raises(UserError, match=f"holds {holds}, expected {expected}"):
        read_idx(raw / "file", magic)


def test_what_cannot_be_opened_is_refused_by_its_name(raw):
    (raw / "folder").mkdir()
    for path in (raw / "absent", raw / "absent.gz", raw / "folder"):
        with pytest.raises(UserError, match=f"^{path}: cannot be read"):
            read_idx(path, IMAGES_MAGIC)


def test_a_broken_file_outside_any_data_folder_is_refused_as_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("alone").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"^alone: "):
        read_idx(Path("alone"), IMAGES_MAGIC)
