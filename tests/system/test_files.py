import json
import resource

import pytest

from mnist.system.files import flush_folder, read_json, write_and_flush, write_atomically, write_json


def names_in(folder):
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def full_disk():
    """No file may grow beyond 8 MiB (more than the log that this test may be writing to)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("before", [None, b"old", b"a much longer old content"])
def test_a_file_is_replaced_whole_and_nothing_else_stays(tmp_path, before):
    path = tmp_path / "result.json"
    if before is not None:
        path.write_bytes(before)
    write_atomically(path, b"new content")
    assert path.read_bytes() == b"new content"
    assert names_in(tmp_path) == ["result.json"]


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_full_disk_leaves_the_old_content_and_no_rubbish(tmp_path, full_disk, before):
    path = tmp_path / "result.json"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(OSError, match=r"too large: .*result\.json"):
        write_atomically(path, bytes(9 << 20))
    assert names_in(tmp_path) == (["result.json"] if before else [])
    assert before is None or path.read_bytes() == before


def test_a_path_that_cannot_be_replaced_leaves_no_rubbish(tmp_path):
    (tmp_path / "result.json").mkdir()
    with pytest.raises(OSError, match=r"result\.json"):
        write_atomically(tmp_path / "result.json", b"new")
    assert names_in(tmp_path) == ["result.json"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "absent" / "result.json", b"new")


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    """Whoever has the old file open goes on reading it."""
    path = tmp_path / "result.json"
    write_atomically(path, b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_json_is_written_for_people_too(tmp_path):
    content = {"status": "finished", "test": {"accuracy": 0.99}, "tags": ["ü", None]}
    write_json(tmp_path / "result.json", content)
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert text.startswith('{\n  "status"')
    assert text.endswith("}\n")


def test_flushed_bytes_are_the_bytes(tmp_path):
    write_and_flush(tmp_path / "weights", b"\0\1" * 5000)
    flush_folder(tmp_path)
    assert (tmp_path / "weights").read_bytes() == b"\0\1" * 5000


def test_flushing_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        flush_folder(tmp_path / "absent")


@pytest.mark.parametrize(("content", "expected"), [(None, {}), ("{", {}), ("[1]", {}), ('{"a": 1}', {"a": 1})])
def test_json_that_may_not_be_there_is_an_object_or_empty(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "file.json").write_text(content)
    assert read_json(tmp_path / "file.json") == expected
