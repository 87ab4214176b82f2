"""What a disk holds after a power cut: a real ext4 file system in an image file, copied while it is mounted.

The copy has what was flushed and lacks what was only written: ext4 gives a file its blocks some 30 s later.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mnist.runs.checkpoint_files import list_steps, load_newest, missing_records, save_checkpoint
from mnist.runs.export import find_export, load_model
from mnist.runs.records import read_run_record
from mnist.runs.tracking.jsonl import JsonlFile
from tests.processes import started, train
from tests.runs.test_checkpoint_files import make_checkpoint


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """The file system in `image`, at `folder`."""
    folder.mkdir()
    command = ["mount", "-o", "loop,commit=300", str(image), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop devices can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image file with an empty ext4 file system."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("no mkfs.ext4 here")
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], check=True)
    return path


def copy_of(image: Path, name: str) -> Path:
    return Path(shutil.copy(image, image.with_name(name)))


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_no_checkpoint_survives_a_power_cut_without_its_records(tmp_path: Path, image: Path) -> None:
    copies = []
    with mounted(image, tmp_path / "disk") as disk:
        records = JsonlFile(disk / "metrics.jsonl")
        for step in range(1, 41):
            records.append({"step": step, "epoch": step / 10, "split": "train", "dataset": "digits", "loss": 1.0})
            if step % 10 == 0:
                save_checkpoint(disk / "checkpoints", make_checkpoint(step), 2, 0)
                copies.append((step, copy_of(image, f"after-checkpoint-{step}.img")))
            elif step % 10 == 5:
                copies.append((step, copy_of(image, f"between-{step}.img")))
        del records  # which holds the file open
    for step, copy in copies:
        with mounted(copy, copy.with_suffix("")) as disk:
            found, skipped = load_newest(disk / "checkpoints")
            assert not skipped
            assert (found.step if found else 0) == step // 10 * 10, copy
            assert num_lines(disk / "metrics.jsonl") >= step // 10 * 10, copy
            assert found is None or missing_records(found, disk) == []


@pytest.mark.parametrize(("kept", "lost"), [(0, "7 of 7"), (6, "1 of 7"), (None, "7 of 7")])
def test_records_that_are_lost_all_the_same_are_counted(tmp_path: Path, kept: int | None, lost: str) -> None:
    records = tmp_path / "metrics.jsonl"
    records.write_text("{}\n" * 7)
    save_checkpoint(tmp_path / "checkpoints", make_checkpoint(70), 1, 0)
    found, _ = load_newest(tmp_path / "checkpoints")
    assert found is not None
    assert missing_records(found, tmp_path) == []
    if kept is None:
        records.unlink()
    else:
        records.write_text("{}\n" * kept + "{")
    (line,) = missing_records(found, tmp_path)
    assert f"metrics.jsonl: {lost} records up to step 70 are lost" in line
    records.write_text("{}\n" * 9)
    assert missing_records(found, tmp_path) == []


@pytest.mark.launch
@pytest.mark.timeout(300)
def test_a_finished_run_has_all_its_records_after_a_power_cut(tmp_path: Path, image: Path) -> None:
    arguments = [
        *(
            "--recipe",
            "smoke",
            "--max-steps",
            "120",
            "--log-every",
            "5",
            "--checkpoint-every",
            "30",
            "--eval-every",
            "60",
        ),
        *("--val-size", "300", "--min-accuracy", "0.5", "--num-threads", "1", "--no-pictures"),
    ]
    copies: dict[int, Path] = {}
    with mounted(image, tmp_path / "disk") as disk:
        run = disk / "run"
        with started(train(*arguments, "--run-dir", str(run)), tmp_path) as process:
            while process.poll() is None:
                newest = max(list_steps(run / "checkpoints"), default=0)
                if newest not in copies:
                    copies[newest] = copy_of(image, f"step-{newest}.img")
                time.sleep(0.01)
            ended = copy_of(image, "ended.img")
            assert process.returncode == 0, process.communicate()
        written = num_lines(run / "metrics.jsonl")
    for copy in copies.values():
        with mounted(copy, copy.with_suffix("")) as disk:
            found, skipped = load_newest(disk / "run" / "checkpoints")
            assert not skipped
            assert num_lines(disk / "run" / "metrics.jsonl") >= (found.step // 5 if found else 0)
    with mounted(ended, ended.with_suffix("")) as disk:
        after = read_run_record(disk / "run")
        assert after is not None
        assert after.status == "finished"
        assert num_lines(disk / "run" / "metrics.jsonl") == written
        assert load_model(find_export(str(disk / "run"))).config.recipe == "smoke"
