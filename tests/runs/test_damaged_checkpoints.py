"""Checkpoints that are damaged, or of another version of the code: each one is skipped and named."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mnist.runs import checkpoint_files
from mnist.runs.checkpoint_files import load_newest, save_checkpoint
from mnist.training.loop import TrainState
from tests.runs.test_checkpoint_files import make_checkpoint

MANIFEST, TENSORS = "manifest.json", "state.safetensors"


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A manifest that says something else, and is whole."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        manifest["sha256"] = checkpoint_files._digest(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return damage


def with_tensors(content: bytes) -> Callable[[Path], None]:
    """A file of tensors that is none, and has the sha256 that the manifest says."""

    def damage(folder: Path) -> None:
        (folder / TENSORS).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        rewritten(lambda manifest: manifest.update({"tensors": {"sha256": sha256}}))(folder)

    return damage


def write_a_terabyte(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "manifest of 100,000 brackets": replaced(MANIFEST, lambda path: path.write_text('{"a":' + "[" * 100_000)),
    "manifest a list": replaced(MANIFEST, lambda path: path.write_text("[]")),
    "manifest empty": replaced(MANIFEST, lambda path: path.write_text("")),
    "manifest {}": replaced(MANIFEST, lambda path: path.write_text("{}")),
    "manifest of numbers of 300 digits": replaced(MANIFEST, lambda path: path.write_text(f'{{"step": {10**300}}}')),
    "manifest a FIFO": replaced(MANIFEST, os.mkfifo),
    "manifest a folder": replaced(MANIFEST, Path.mkdir),
    "manifest a device": replaced(MANIFEST, lambda path: path.symlink_to("/dev/zero")),
    "manifest a terabyte": replaced(MANIFEST, write_a_terabyte),
    "tensors a FIFO": replaced(TENSORS, os.mkfifo),
    "tensors a folder": replaced(TENSORS, Path.mkdir),
    "tensors a device": replaced(TENSORS, lambda path: path.symlink_to("/dev/zero")),
    "tensors a terabyte": replaced(TENSORS, write_a_terabyte),
    "tensors no safetensors": with_tensors(b"\xff" * 100),
    "tensors empty": with_tensors(b""),
    "tensors with a header of an exabyte": with_tensors((1 << 60).to_bytes(8, "little")),
    "another format": rewritten(lambda manifest: manifest.update(format_version=1)),
    "a metric that the code no longer has": rewritten(
        lambda manifest: manifest["loop"]["epoch_sums"]["totals"].update({"colour": 1.0})
    ),
    "a setting that the code no longer has": rewritten(lambda manifest: manifest["config"].update({"colour": 1})),
    "a setting out of its range": rewritten(lambda manifest: manifest["config"].update({"epochs": 0})),
    "a field that the code expects": rewritten(lambda manifest: manifest["plan"].pop("num_steps")),
    "no configuration": rewritten(lambda manifest: manifest.pop("config")),
    "a configuration that is a list": rewritten(lambda manifest: manifest.update(config=[])),
    "nothing about tensors": rewritten(lambda manifest: manifest.update(tensors=None)),
    "tensors of an unknown group": with_tensors(safetensors.torch.save({"colour.red": torch.zeros(1)})),
    "a step below 0": rewritten(lambda manifest: manifest["loop"].update({"step": -2})),
    "a field of another type": rewritten(lambda manifest: manifest["loop"].update({"step": 2.5})),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_cannot_be_read_is_skipped_and_named(tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, make_checkpoint(step), 2, 0)
    DAMAGES[name](tmp_path / "step-00000002")
    found, skipped = load_newest(tmp_path)
    assert found is not None
    assert found.step == 1
    (line,) = skipped
    assert "step-00000002" in line
    assert "\n" not in line
    assert len(line) < 400


def test_whole_numbers_of_the_best_scores_stay_whole(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(2)
    best = {"step": 2, "loss": 0.5, "accuracy": 0.9, "num_correct": 9, "num_samples": 10}
    checkpoint.loop = TrainState(step=2, best=best)
    save_checkpoint(tmp_path, checkpoint, 1, 0)
    found, _ = load_newest(tmp_path)
    assert found is not None
    assert found.loop.best == best
    assert {name: type(value) for name, value in found.loop.best.items()} == {
        name: type(value) for name, value in best.items()
    }
