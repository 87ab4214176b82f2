"""Checkpoints: complete or not there, checked before they are believed, and free of pickles.

In: tensors and plain numbers from rank 0. Out: one directory per checkpoint,

    checkpoints/step-00000235/
        model.safetensors       weights and buffers
        ema.safetensors         their moving average, where there is one
        optimizer.safetensors   "<parameter index>.<name>" -> tensor
        manifest.json           format, step, configuration, loop state, scores; size and sha256 of every other file

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
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist.config import TrainConfig, fields_on_resume, to_flat
from mnist.errors import RunError, UserError
from mnist.system.files import flush, write_and_flush, write_json
from mnist.training.plan import Plan

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")

LENGTH_BOUND_SCHEDULES = ("cosine", "one_cycle")


class CheckpointError(RunError):
    """A checkpoint that cannot be written, or not be believed. The message names the path."""


@dataclass
class Checkpoint:
    """The state of a run at one step, on the CPU, as tensors and plain numbers.

    Attributes:
        step: optimizer steps done.
        tensors: file stem ("model", "ema", "optimizer") -> name -> tensor.
        loop: `training.loop.TrainState` as a dictionary.
        scaler: state of the fp16 gradient scaler, or None.
        config: the configuration, flat.
        plan: the plan, as a dictionary.
        facts: what the result depends on besides the configuration: data files, precision, threads.
        scores: the scores of the evaluation at this step, by split; empty where there was none.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    loop: dict[str, Any]
    scaler: dict[str, Any] | None
    config: dict[str, Any]
    plan: dict[str, Any]
    facts: dict[str, Any]
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep_last: int, keep_best: int) -> Path:
    """Writes a checkpoint into `folder` and then removes those that neither `keep_last` nor `keep_best` protects.

    Raises:
        CheckpointError: it could not be written; earlier checkpoints are untouched.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".tmp-{final.name}"
    for leftover in folder.glob(".tmp-*"):  # of a start that was killed while it wrote or removed one
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        if not final.exists():  # else: this step was saved before, and a step is the same every time
            temporary.mkdir(parents=True)
            _write(temporary, checkpoint)
            temporary.rename(final)
            flush(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{final}: not written ({error}); earlier checkpoints are intact; free some space, or fix the folder, and "
            f"start the same command again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(folder, keep_last, keep_best)
    return final


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    files = {}
    for stem, tensors in checkpoint.tensors.items():
        content = _serialise(tensors)
        write_and_flush(folder / f"{stem}.safetensors", content)
        files[f"{stem}.safetensors"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    numbers = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint) if f.name != "tensors"}
    manifest = {"format_version": FORMAT_VERSION, **numbers, "files": files}
    manifest["sha256"] = _digest(manifest)
    write_json(folder / MANIFEST, manifest)  # the last file: it vouches for the others, and for itself


def _serialise(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _digest(manifest: dict[str, Any]) -> str:
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _prune(folder: Path, keep_last: int, keep_best: int) -> None:
    steps = list_steps(folder)
    scores = {step: _val_accuracy(path) for step, path in steps.items()}
    ranked = sorted((step for step in steps if scores[step] >= 0), key=lambda step: (-scores[step], step))
    keep = {*sorted(steps)[-keep_last:], *ranked[:keep_best]}
    for step, path in steps.items():
        if step not in keep:
            with contextlib.suppress(OSError):  # one checkpoint too many is no reason to end a run
                doomed = path.rename(folder / f".tmp-old-{path.name}")  # half a checkpoint has no final name
                shutil.rmtree(doomed)


def _val_accuracy(path: Path) -> float:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        return float(manifest["scores"]["val"]["accuracy"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1.0


def list_steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by step, complete ones only as far as their names tell."""
    if not folder.is_dir():
        return {}
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match and path.is_dir() and not path.is_symlink()}


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint in `folder`, and a line about each newer one that had to be passed over.

    Raises:
        CheckpointError: there are checkpoints and none is valid. Starting over silently would look like a resume.
    """
    skipped: list[str] = []
    for _, path in sorted(list_steps(folder).items(), reverse=True):
        try:
            return load_checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    if skipped:
        raise CheckpointError(
            f"no valid checkpoint in {folder} (start over with --resume never): " + "; ".join(skipped)
        )
    return None, []


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint, after its manifest has been checked against every file.

    Raises:
        CheckpointError: a file is missing, cut, changed or not listed; the message names it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format_version"] != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format {manifest['format_version']}, this program reads {FORMAT_VERSION}")
        if manifest["sha256"] != _digest(manifest):
            raise CheckpointError(f"{path / MANIFEST}: changed since it was written (its sha256 differs)")
        tensors = {}
        for name, facts in manifest["files"].items():
            if not re.fullmatch(r"(model|ema|optimizer)\.safetensors", name):
                raise CheckpointError(f"{path}: the manifest lists {name!r}, which is no part of a checkpoint")
            content = (path / name).read_bytes()
            if len(content) != facts["size"]:
                raise CheckpointError(f"{path / name}: {len(content):,} bytes, the manifest says {facts['size']:,}")
            if hashlib.sha256(content).hexdigest() != facts["sha256"]:
                raise CheckpointError(f"{path / name}: changed since it was written (its sha256 differs)")
            tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(content)
        numbers = {f.name: manifest[f.name] for f in dataclasses.fields(Checkpoint) if f.name != "tensors"}
        return Checkpoint(tensors=tensors, **numbers)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not readable as a checkpoint ({type(error).__name__}: {error})") from error


def check_same_run(old: dict[str, Any], config: TrainConfig) -> None:
    """Whether a run with the flat configuration `old` is the one that `config` describes.

    Raises:
        UserError: it is another one. Names the fields with both values.
    """
    new = to_flat(config)
    differing = [name for name in fields_on_resume("fixed") if old.get(name) != new[name]]
    if differing:
        listed = ", ".join(f"--{n.replace('_', '-')} was {old.get(n)}, now {new[n]}" for n in differing)
        place = f"--run-dir {config.output.run_dir}: " if config.output.run_dir else ""
        raise UserError(
            f"{place}this run (recipe {old.get('recipe')}) has another configuration: {listed}; "
            "use --resume never to start over, or another --run-dir"
        )


def check_compatible(checkpoint: Checkpoint, config: TrainConfig, plan: Plan, facts: dict[str, Any]) -> list[str]:
    """Whether `checkpoint` may continue under `config` and `plan`; returns notes on what changes from here on.

    Raises:
        UserError: it would be another run, or its schedule does not fit the new length.
    """
    check_same_run(checkpoint.config, config)
    old, new, done = checkpoint.config, to_flat(config), checkpoint.step
    old_steps = checkpoint.plan["num_steps"]
    if checkpoint.facts["data_files"] != facts["data_files"]:
        raise UserError("the data files have changed since this run began; use --resume never to start over")
    bound = [name for name in (old["schedule"], new["schedule"]) if name in LENGTH_BOUND_SCHEDULES]
    if plan.num_steps != old_steps and bound:
        raise UserError(
            f"--epochs/--max-steps: the {bound[0]} schedule was laid out for {old_steps} steps and cannot go on "
            f"to {plan.num_steps}; use --resume never to start over"
        )
    if plan.num_steps < done:
        raise UserError(f"--epochs/--max-steps: {plan.num_steps} steps, but the checkpoint has done {done}")
    noted = (*fields_on_resume("noted"), *fields_on_resume("course"))
    notes = [f"{name} {old.get(name)} -> {new[name]}" for name in noted if old.get(name) != new[name]]
    notes += [f"{name} {was} -> {facts[name]}" for name, was in checkpoint.facts.items() if was != facts[name]]
    if plan.accumulation_steps != checkpoint.plan["accumulation_steps"]:
        notes.append(f"accumulation {checkpoint.plan['accumulation_steps']} -> {plan.accumulation_steps}")
    if plan.world_size != checkpoint.plan["world_size"]:
        notes.append(f"processes {checkpoint.plan['world_size']} -> {plan.world_size} (same global batches)")
    return notes


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments as "<parameter index>.<name>" -> tensor; all else about it is configuration."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value.detach().cpu()
        for index, values in state.items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts moments back, in the memory layout of their parameters: fused kernels take equal layouts for granted."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, saved in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        is_moment = saved.shape == parameter.shape and saved.dim() > 0
        value = torch.empty_like(parameter, dtype=saved.dtype, device="cpu").copy_(saved) if is_moment else saved
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of a bare module, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
