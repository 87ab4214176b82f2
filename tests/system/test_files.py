import json
import os
import resource
import sys
from pathlib import Path

import pytest

from mnist.errors import UserError
from mnist.system.files import (
    RecordError,
    flush,
    read_json,
    refuse_symlink,
    remove_leftovers,
    write_and_flush,
    write_atomically,
    write_json,
)


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
    flush(tmp_path)
    assert (tmp_path / "weights").read_bytes() == b"\0\1" * 5000


def test_flushing_a_missing_file_or_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "absent")


def test_a_json_object_is_read_and_a_missing_file_is_empty(tmp_path):
    assert read_json(tmp_path / "file.json") == {}
    (tmp_path / "file.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "file.json") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "holds no JSON object"),
        ("\xff", "holds no JSON object|not readable as JSON"),
        ('{"a": NaN}', "not readable as JSON"),
        ('{"a": ' + "[" * 100_000, "not readable as JSON"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "not readable as JSON"),
    ],
)
def test_json_that_is_no_record_is_one_line_that_names_the_file(tmp_path, content, message):
    (tmp_path / "file.json").write_text(content, encoding="latin-1")
    with pytest.raises(RecordError, match=message) as caught:
        read_json(tmp_path / "file.json")
    assert str(tmp_path / "file.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def make_fifo(path):
    os.mkfifo(path)


def make_sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_fifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (Path.mkdir, "Is a directory|not a regular file"),
        (make_sparse, "1,099,511,627,776 bytes, expected at most"),
    ],
    ids=["fifo", "device", "folder", "terabyte"],
)
def test_only_regular_files_of_bounded_size_are_read(tmp_path, make, message):
    """A FIFO would be waited for, for ever; /dev/zero and a sparse file would fill the memory."""
    make(tmp_path / "file.json")
    with pytest.raises(RecordError, match=message):
        read_json(tmp_path / "file.json")


def test_a_symbolic_link_is_not_written_through(tmp_path):
    foreign, inside = tmp_path / "foreign", tmp_path / "run"
    foreign.write_text("of someone else")
    inside.mkdir()
    (inside / "metrics.jsonl").symlink_to(foreign)
    with pytest.raises(UserError, match=r"metrics\.jsonl: a symbolic link to .*foreign"):
        refuse_symlink(inside / "metrics.jsonl")
    refuse_symlink(inside / "config.json")
    with pytest.raises(OSError, match="symbolic links"):
        write_and_flush(inside / "metrics.jsonl", b"new")
    (inside / ".tmp-config.json").symlink_to(foreign)
    with pytest.raises(OSError, match="symbolic links"):
        write_json(inside / "config.json", {})
    assert foreign.read_text() == "of someone else"


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    foreign = tmp_path / "foreign"
    (foreign / "inside").mkdir(parents=True)
    run = tmp_path / "run"
    for name in (".tmp-step-00000007/deep", "export/.tmp-x", "step-00000006"):
        (run / name).mkdir(parents=True)
    for name in (".tmp-config.json", "config.json", ".lock"):
        (run / name).touch()
    (run / ".tmp-link").symlink_to(foreign)
    remove_leftovers(run)
    assert sorted(names_in(run)) == [".lock", "config.json", "export", "step-00000006"]
    assert names_in(run / "export") == [".tmp-x"], "one folder at a time"
    assert names_in(foreign) == ["inside"]
    remove_leftovers(tmp_path / "absent")


def write_and_die_at(path, event_number):
    """Writes in a child that ends, as if killed, at its n-th file operation; whether it got that far."""
    child = os.fork()
    if child == 0:
        count = 0

        def die(event, _):
            nonlocal count
            if event in ("open", "os.rename", "os.remove"):
                count += 1
                if count == event_number:
                    os._exit(9)

        sys.addaudithook(die)
        write_json(path, {"content": "new"})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 9


def test_a_process_killed_at_any_point_of_a_write_leaves_the_old_file_or_the_new_one(tmp_path):
    path, outcomes = tmp_path / "config.json", []
    for event_number in range(1, 20):
        write_json(path, {"content": "old"})
        died = write_and_die_at(path, event_number)
        remove_leftovers(tmp_path)
        assert names_in(tmp_path) == ["config.json"], "the next start removes the rest"
        outcomes.append(read_json(path)["content"])
        if not died:
            break
    assert len(outcomes) > 3
    assert outcomes == sorted(outcomes, reverse=True)
    assert set(outcomes) == {"old", "new"}


def test_a_path_that_is_not_utf_8_can_be_read_back(tmp_path: Path) -> None:
    content = {"data_dir": os.fsdecode(b"runs/caf\xe9")}
    write_json(tmp_path / "file.json", content)
    assert read_json(tmp_path / "file.json") == content
