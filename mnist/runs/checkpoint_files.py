"""Checkpoints: written whole or not at all, checked before they are used, and free of pickles.

In: tensors and plain numbers from rank 0. Out: one directory per checkpoint,

    checkpoints/step-00000235/
        state.safetensors   "model.<name>", "ema.<name>" (where there is one), "optimizer.<parameter index>.<name>"
        manifest.json       format, configuration, loop state, scores; sha256 of state.safetensors and of itself

written under a temporary name, flushed, closed by the manifest, then renamed. Only rank 0 touches the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from mnist.config import from_flat, to_flat
from mnist.errors import RunError, UserError
from mnist.runs.records import MANIFEST, Numbers, check_record
from mnist.runs.tracking.jsonl import RECORDS, flush_records
from mnist.system.files import (
    RecordError,
    flush,
    read_json,
    read_regular,
    refuse_symlink,
    remove_leftovers,
    temporary_path,
    write_and_flush,
    write_json,
)
from mnist.training.loop import TrainState
from mnist.training.metrics import METRICS
from mnist.training.plan import Plan

FORMAT_VERSION = 4
TENSORS, MAX_TENSOR_BYTES = "state.safetensors", 4 << 30
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(RunError):
    """A checkpoint cannot be written, or cannot be used. The message names the path."""


@dataclass
class Checkpoint:
    """The state of a run at one step, on the CPU, as tensors and plain numbers.

    Attributes:
        tensors: "model", "ema" and "optimizer" -> name -> tensor; after loading all three are there, maybe empty.
        loop: the state of the training loop.
        scaler: state of the gradient scaler of fp16, where there is one.
        config: the configuration, flat.
        plan: of the run.
        facts: what the result depends on besides the configuration: data_files, code, threads.
        scores: of the evaluation at this step, by split; empty where there was none.
        num_records: lines of metrics.jsonl at that time; `save_checkpoint` counts them.
    """

    tensors: dict[str, dict[str, Tensor]]
    loop: TrainState
    scaler: dict[str, Any] | None
    config: dict[str, Any]
    plan: Plan
    facts: dict[str, Any]
    scores: dict[str, Numbers] = field(default_factory=dict)
    num_records: int = 0

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"loop.step must be 0 or more, not {self.step}")
        all_sums = (self.loop.interval_sums, self.loop.epoch_sums, self.loop.run_sums)
        if any(sums.totals.keys() != METRICS.keys() for sums in all_sums):
            raise ValueError(f"loop: the totals of its sums must be those of {', '.join(METRICS)}")

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.loop.step


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep_last: int, keep_best: int) -> Path:
    """Writes a checkpoint into `folder` and then removes those that neither `keep_last` nor `keep_best` protects.

    The run's records, metrics.jsonl beside `folder`, are flushed before it. Raises a CheckpointError where it cannot be
    written, and leaves earlier ones as they are; a UserError where `folder` is a symbolic link.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    temporary = temporary_path(final)
    refuse_symlink(folder)
    remove_leftovers(folder)
    try:
        temporary.mkdir(parents=True)
        _write(temporary, dataclasses.replace(checkpoint, num_records=flush_records(folder.parent)))
        if final.exists():  # a broken one, which a resume has skipped
            final.rename(temporary_path(folder / f"old-{final.name}"))
        temporary.rename(final)
        flush(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        way_out = "free some space, or fix the folder, and start the same command again"
        raise CheckpointError(f"{final}: not written ({error}); earlier checkpoints are intact; {way_out}") from error
    finally:
        remove_leftovers(folder)
    _prune(folder, checkpoint.step, keep_last, keep_best)
    return final


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    tensors = {f"{g}.{name}": t.contiguous() for g, group in checkpoint.tensors.items() for name, t in group.items()}
    content = safetensors.torch.save(tensors)
    write_and_flush(folder / TENSORS, content)
    numbers = dataclasses.asdict(dataclasses.replace(checkpoint, tensors={}))
    file = {"sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"format_version": FORMAT_VERSION, **numbers, "tensors": file}
    manifest["sha256"] = _digest(manifest)
    write_json(folder / MANIFEST, manifest)  # the last file, with the checksums of both


def _digest(manifest: dict[str, Any]) -> str:
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _prune(folder: Path, newest: int, keep_last: int, keep_best: int) -> None:
    steps = {step: path for step, path in list_steps(folder).items() if step <= newest}  # later ones are broken
    accuracies = {step: _val_accuracy(path) for step, path in steps.items()}
    ranked = sorted((step for step in steps if accuracies[step] >= 0), key=lambda step: (-accuracies[step], step))
    keep = {*sorted(steps)[-keep_last:], *ranked[:keep_best]}
    for path in [path for step, path in steps.items() if step not in keep]:
        with contextlib.suppress(OSError):  # one checkpoint too many is no reason to end a run
            shutil.rmtree(path.rename(temporary_path(path)))  # a half removed one must not have a final name


def _val_accuracy(path: Path) -> float:
    with contextlib.suppress(CheckpointError):
        scores = _read_manifest(path)[0].scores
        return scores["val"]["accuracy"] if "val" in scores else -1.0
    return -1.0


def list_steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by step, judged by their names only."""
    if not folder.is_dir():
        return {}
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match and path.is_dir() and not path.is_symlink()}


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint in `folder`, and a line about each newer one that was skipped.

    Raises:
        CheckpointError: there are checkpoints and none is valid. Starting at step 0 silently would look like a resume.
    """
    skipped: list[str] = []
    for _, path in sorted(list_steps(folder).items(), reverse=True):
        try:
            return load_checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    if skipped:
        raise CheckpointError(
            f"no valid checkpoint in {folder} (start a new run in another --run-dir): " + "; ".join(skipped)
        )
    return None, []


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint; raises a CheckpointError that names the file which is missing, damaged or of another form."""
    checkpoint, sha256 = _read_manifest(path)
    return dataclasses.replace(checkpoint, tensors=_read_tensors(path / TENSORS, sha256))


def _read_manifest(folder: Path) -> tuple[Checkpoint, str]:
    """A checkpoint without its tensors, and the sha256 of their file."""
    path = folder / MANIFEST
    try:
        refuse_symlink(path)
        content = read_json(path)
        if not content:
            raise CheckpointError(f"{path}: missing or empty")
        if content.get("format_version") != FORMAT_VERSION:
            found = str(content.get("format_version"))[:20]
            raise CheckpointError(f"{folder}: format {found}, this version of the program reads {FORMAT_VERSION} only")
        if content.get("sha256") != _digest(content):
            raise CheckpointError(f"{path}: changed since it was written (its sha256 differs)")
        config = to_flat(from_flat(content["config"]))
        checkpoint = check_record(path, {**content, "config": config, "tensors": {}}, Checkpoint)
        return checkpoint, content["tensors"]["sha256"]
    except (RecordError, UserError, KeyError, TypeError, RecursionError) as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise CheckpointError(f"{where}{error}"[:300]) from error


def _read_tensors(path: Path, sha256: str) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    try:
        refuse_symlink(path)
        content = read_regular(path, MAX_TENSOR_BYTES)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise CheckpointError(f"{path}: changed since it was written (its sha256 differs)")
        for key, tensor in safetensors.torch.load(content).items():
            group, _, name = key.partition(".")
            groups[group][name] = tensor
    except (OSError, RecordError, UserError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: not the tensors of a checkpoint ({error})") from error
    return groups


def missing_records(checkpoint: Checkpoint, run_dir: Path) -> list[str]:
    """A line about the records that a run has lost since the checkpoint was saved, if any."""
    num_lost = checkpoint.num_records - flush_records(run_dir)
    lost = f"{num_lost} of {checkpoint.num_records} records up to step {checkpoint.step}"
    return [f"{run_dir / RECORDS}: {lost} are lost; curves have a gap"] if num_lost > 0 else []
