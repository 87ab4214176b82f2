from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mnist.config import TrainConfig, to_flat
from mnist.errors import UserError
from mnist.runs.checkpoint_files import (
    Checkpoint,
    CheckpointError,
    list_steps,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from mnist.training.loop import TrainState
from mnist.training.plan import build_plan


def make_checkpoint(step: int, val_accuracy: float | None = None) -> Checkpoint:
    val = {"loss": 0.5, "accuracy": val_accuracy, "num_correct": 5, "num_samples": 10}
    scores = {"val": val} if val_accuracy is not None else {}
    return Checkpoint(
        tensors={"model": {"w": torch.full((3,), float(step))}, "optimizer": {"0.exp_avg": torch.ones(3)}},
        loop=TrainState(step=step),
        scaler=None,
        config=to_flat(TrainConfig()),
        plan=build_plan(TrainConfig(), 60_000, 1),
        facts={},
        scores=scores,
    )


def steps_after(folder: Path, accuracies: list[float | None], keep_last: int, keep_best: int) -> list[int]:
    for step, accuracy in enumerate(accuracies, start=1):
        save_checkpoint(folder, make_checkpoint(step, accuracy), keep_last, keep_best)
    return sorted(list_steps(folder))


def test_a_checkpoint_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    saved = make_checkpoint(7, 0.5)
    save_checkpoint(tmp_path, saved, 1, 0)
    found, skipped = load_newest(tmp_path)
    assert found is not None
    assert (found.step, found.loop, found.scores, skipped) == (7, saved.loop, saved.scores, [])
    assert torch.equal(found.tensors["model"]["w"], torch.full((3,), 7.0))


def test_a_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "checkpoints") == (None, [])


@pytest.mark.parametrize(
    ("accuracies", "keep_last", "keep_best", "kept"),
    [
        ([None] * 5, 2, 0, [4, 5]),
        ([0.9, 0.5, 0.6, 0.7], 1, 1, [1, 4]),
        ([0.9, 0.8, 0.6, 0.7], 1, 2, [1, 2, 4]),
        ([0.1, 0.2, 0.3], 1, 1, [3]),
        ([0.5, 0.5, 0.4], 1, 1, [1, 3]),
    ],
)
def test_the_last_and_the_best_are_kept_independently(
    tmp_path: Path, accuracies: list[float | None], keep_last: int, keep_best: int, kept: list[int]
) -> None:
    assert steps_after(tmp_path, accuracies, keep_last, keep_best) == kept
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_the_last_bit(path: Path) -> None:
    """Of a number: the file is as well-formed as before."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, flip_the_last_bit, Path.unlink])
@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    steps_after(tmp_path, [None, None], 2, 0)
    damaged = tmp_path / "step-00000002" / name
    damage(damaged)
    found, skipped = load_newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(skipped) == 1
    assert str(damaged.parent) in skipped[0]


def test_when_all_are_damaged_nothing_is_started_over_or_deleted(tmp_path: Path) -> None:
    steps_after(tmp_path, [None, None], 2, 0)
    for path in tmp_path.glob("*/state.safetensors"):
        truncate(path)
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        load_newest(tmp_path)
    assert sorted(list_steps(tmp_path)) == [1, 2]


def test_a_half_written_directory_is_no_checkpoint(tmp_path: Path) -> None:
    for name in (".tmp-step-00000001", ".tmp-old-step-00000009", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    steps_after(tmp_path, [None], 1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-00000001"], "the next save clears up"


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    save_checkpoint(tmp_path, make_checkpoint(1), 1, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, ignore_errors=False: None if ignore_errors else refuse())
    save_checkpoint(tmp_path, make_checkpoint(2), 1, 1)
    assert sorted(list_steps(tmp_path)) == [2]


def test_a_folder_of_checkpoints_that_is_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / ".tmp-of someone else").mkdir(parents=True)
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"checkpoints: a symbolic link to .*elsewhere"):
        save_checkpoint(tmp_path / "checkpoints", make_checkpoint(1), 1, 0)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == [".tmp-of someone else"]


def test_records_that_are_a_symbolic_link_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, make_checkpoint(1), 1, 0)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/null")
    with pytest.raises(UserError, match=r"metrics.jsonl: a symbolic link to /dev/null"):
        save_checkpoint(folder, make_checkpoint(2), 1, 0)
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]


def test_a_broken_checkpoint_of_a_later_step_protects_nothing_and_is_replaced_at_its_step(tmp_path: Path) -> None:
    steps_after(tmp_path, [None, None, None], 3, 0)
    for step in (2, 3):
        truncate(tmp_path / f"step-0000000{step}" / "state.safetensors")
    found, _ = load_newest(tmp_path)
    assert found is not None
    assert found.step == 1
    save_checkpoint(tmp_path, make_checkpoint(2), 1, 0)
    assert load_checkpoint(tmp_path / "step-00000002").step == 2
    assert sorted(list_steps(tmp_path)) == [2, 3]
    save_checkpoint(tmp_path, make_checkpoint(3), 1, 0)
    assert load_checkpoint(tmp_path / "step-00000003").step == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003"]


def test_a_checkpoint_of_another_format_is_one_clear_line(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(1), 1, 0) / "manifest.json"
    path.write_text(json.dumps({"format_version": 1, "step": 1}))
    with pytest.raises(CheckpointError, match=r"step-00000001: format 1, this version .* reads 4 only"):
        load_checkpoint(path.parent)


def test_a_failed_write_leaves_earlier_checkpoints_and_no_temporary_folder(tmp_path: Path) -> None:
    steps_after(tmp_path, [None], 1, 0)
    bad = make_checkpoint(2)
    bad.tensors["model"] = {"a": torch.ones(2), "b": torch.ones(2).to_sparse()}  # cannot be serialised
    with pytest.raises((CheckpointError, ValueError, RuntimeError)):
        save_checkpoint(tmp_path, bad, 1, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
