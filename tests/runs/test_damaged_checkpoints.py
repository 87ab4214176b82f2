"""Damages that leave a checkpoint well-formed: each one is skipped and named, and nothing live has changed."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist.config import OptimConfig, TrainConfig, evolve, to_flat
from mnist.runs import checkpoint_files
from mnist.runs.checkpoint_files import Checkpoint, ScalerState, load_newest, save_checkpoint
from mnist.runs.state_tensors import check_fits, module_tensors, optimizer_tensors
from mnist.training.loop import TrainState
from mnist.training.optim import build_optimizer
from mnist.training.plan import build_plan
from tests.networks import mnist_model

CONFIG = evolve(TrainConfig(), model="tinynet", optimizer="adam", ema=0.9)
SCORES = {"loss": 0.5, "accuracy": 0.9, "num_correct": 9, "num_samples": 10}
SCALER = {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
DEEP = json.loads("[" * 900 + "]" * 900)


def build(config: OptimConfig = CONFIG.optim) -> tuple[nn.Module, Optimizer, nn.Module]:
    """Model, optimizer and average after a step."""
    model = mnist_model(config.model)
    optimizer = build_optimizer(model.parameters(), config)
    model(torch.rand(4, 1, 28, 28)).square().mean().backward()
    optimizer.step()
    return model, optimizer, copy.deepcopy(model)


def make_checkpoint(step: int, model: nn.Module, optimizer: Optimizer, ema: nn.Module) -> Checkpoint:
    moments = optimizer_tensors(optimizer)
    return Checkpoint(
        step=step,
        tensors={"model": module_tensors(model), "ema": module_tensors(ema), "optimizer": moments},
        loop=TrainState(step=step, best={"step": step, **SCORES}),
        scaler=ScalerState(**SCALER),  # type: ignore[typeddict-item]
        config=to_flat(CONFIG),
        plan=build_plan(CONFIG, 60_000, 1),
        facts={"data_files": "abc", "precision": "fp32", "threads": 1},
        scores={"val": SCORES},
    )


@pytest.fixture(scope="module")
def live() -> tuple[nn.Module, Optimizer, nn.Module]:
    return build()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, live: tuple[nn.Module, Optimizer, nn.Module]) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (1, 2):
        save_checkpoint(folder, make_checkpoint(step, *live), 2, 0)
    return folder


def set_field(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Replaces a field of the manifest, `a.b.c`."""

    def damage(manifest: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            manifest = manifest[name]
        manifest[last] = value

    return damage


def remove_field(path: str) -> Callable[[dict[str, Any]], None]:
    def damage(manifest: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            manifest = manifest[name]
        del manifest[last]

    return damage


def damage_manifest(folder: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    damage(manifest)
    manifest["sha256"] = checkpoint_files._digest(manifest)  # as one who edits it would do
    path.write_text(json.dumps(manifest))


def damage_tensors(folder: Path, damage: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "state.safetensors"
    tensors = safetensors.torch.load_file(path)
    damage(tensors)
    replace_content(folder, safetensors.torch.save(tensors))


def replace_content(folder: Path, content: bytes) -> None:
    (folder / "state.safetensors").write_bytes(content)
    facts = {"tensors": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    damage_manifest(folder, lambda manifest: manifest.update(facts))


def replace_by(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


FIELDS = [field.name for field in dataclasses.fields(Checkpoint) if field.name != "tensors"]
MANIFEST_DAMAGES = {
    **{f"without {name}": remove_field(name) for name in [*FIELDS, "tensors", "format_version"]},
    **{f"without {name}": remove_field(name) for name in ("loop.step", "plan.num_steps")},
    **{
        f"{name} null": set_field(name, None)
        for name in ("loop", "step", "plan", "config", "facts", "scores", "tensors")
    },
    **{f"{name} a list": set_field(name, []) for name in ("loop", "plan", "config", "scores", "scaler")},
    "step fractional": set_field("step", 2.5),
    "step text": set_field("step", "2"),
    "step of another": set_field("step", 3),
    "step negative": set_field("step", -2),
    "loop.step fractional": set_field("loop.step", 2.5),
    "step of 300 digits": set_field("step", 10**300),
    "num_records of 300 digits": set_field("num_records", 10**300),
    "plan.num_steps of 300 digits": set_field("plan.num_steps", 10**300),
    "best without step": remove_field("loop.best.step"),
    "best empty": set_field("loop.best", {}),
    "best a number": set_field("loop.best", 7),
    "best.accuracy nan": set_field("loop.best.accuracy", float("nan")),
    "sums of another metric": set_field("loop.epoch_sums.totals", {"colour": 1.0}),
    "sums infinite": set_field("loop.run_sums.time_s", float("inf")),
    "is_stopping a number": set_field("loop.is_stopping", 0),
    "stop_reason a list": set_field("loop.stop_reason", ["x"]),
    "scaler without scale": remove_field("scaler.scale"),
    "scores without loss": remove_field("scores.val.loss"),
    "scores.val null": set_field("scores.val", None),
    "config.lr text": set_field("config.lr", "fast"),
    "config.lr deep": set_field("config.lr", DEEP),
    "config of unknown field": set_field("config.colour", 1),
    "config.model unknown": set_field("config.model", "lenet6"),
    "plan.world_size true": set_field("plan.world_size", True),
    "facts deep": set_field("facts", DEEP),
    "size negative": set_field("tensors.size", -1),
    "size huge": set_field("tensors.size", 1 << 60),
    "format of an earlier version": set_field("format_version", 1),
    "format text": set_field("format_version", "3" * 1000),
}
TENSOR_DAMAGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "no tensors": lambda tensors: tensors.clear(),
    "a weight missing": lambda tensors: tensors.pop(next(name for name in tensors if name.startswith("model."))),
    "a weight too many": lambda tensors: tensors.update({"model.extra": torch.ones(1)}),
    "a group unknown": lambda tensors: tensors.update({"colour.red": torch.ones(1)}),
    "a name without a group": lambda tensors: tensors.update({"red": torch.ones(1)}),
    "a weight of another shape": lambda tensors: tensors.update(
        {name: value.flatten() for name, value in tensors.items() if name.startswith("model.") and value.dim() == 4}
    ),
    "a weight of another type": lambda tensors: tensors.update(
        {name: value.double() for name, value in tensors.items() if name.startswith("model.")}
    ),
    "no average": lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("ema.")],
    "no moments": lambda tensors: (
        [tensors.pop(name) for name in list(tensors) if name.startswith("optimizer.")],
        tensors.update({"optimizer.0.step": torch.tensor(1.0)}),
    ),
    "a moment missing": lambda tensors: tensors.pop("optimizer.0.exp_avg"),
    "a moment of no parameter": lambda tensors: tensors.update({"optimizer.99.exp_avg": torch.ones(3)}),
    "a moment without index": lambda tensors: tensors.update({"optimizer.exp_avg": torch.ones(3)}),
    "a moment of another optimizer": lambda tensors: tensors.update({"optimizer.0.momentum_buffer": torch.ones(3)}),
    "a moment of another shape": lambda tensors: tensors.update({"optimizer.1.exp_avg": torch.ones(3, 3)}),
    "a step count that is no number": lambda tensors: tensors.update({"optimizer.0.step": torch.ones(2)}),
}
FILE_DAMAGES: dict[str, Callable[[Path], object]] = {
    "manifest 100,000 brackets": replace_by("manifest.json", lambda path: path.write_text('{"a":' + "[" * 100_000)),
    "manifest a list": replace_by("manifest.json", lambda path: path.write_text("[]")),
    "manifest empty": replace_by("manifest.json", lambda path: path.write_text("")),
    "manifest {}": replace_by("manifest.json", lambda path: path.write_text("{}")),
    "manifest a FIFO": replace_by("manifest.json", os.mkfifo),
    "manifest a folder": replace_by("manifest.json", Path.mkdir),
    "manifest a device": replace_by("manifest.json", lambda path: path.symlink_to("/dev/zero")),
    "manifest a terabyte": replace_by("manifest.json", lambda path: (path.touch(), os.truncate(path, 1 << 40))),
    "tensors a FIFO": replace_by("state.safetensors", os.mkfifo),
    "tensors a folder": replace_by("state.safetensors", Path.mkdir),
    "tensors a device": replace_by("state.safetensors", lambda path: path.symlink_to("/dev/zero")),
    "tensors a terabyte": replace_by("state.safetensors", lambda path: (path.touch(), os.truncate(path, 1 << 40))),
    "tensors no safetensors": lambda folder: replace_content(folder, b"\xff" * 100),
    "tensors empty": lambda folder: replace_content(folder, b""),
    "tensors with a header of an exabyte": lambda folder: replace_content(folder, (1 << 60).to_bytes(8, "little")),
}
DAMAGES = {
    **{name: partial(damage_manifest, damage=damage) for name, damage in MANIFEST_DAMAGES.items()},
    **{name: partial(damage_tensors, damage=damage) for name, damage in TENSOR_DAMAGES.items()},
    **FILE_DAMAGES,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_named(
    tmp_path: Path, whole: Path, live: tuple[nn.Module, Optimizer, nn.Module], name: str
) -> None:
    shutil.copytree(whole, tmp_path / "checkpoints")
    DAMAGES[name](tmp_path / "checkpoints" / "step-00000002")
    model, optimizer, ema = live
    before = copy.deepcopy(module_tensors(model)), copy.deepcopy(optimizer_tensors(optimizer))
    found, skipped = load_newest(tmp_path / "checkpoints", lambda saved: check_fits(saved, model, optimizer, ema))
    assert found is not None
    assert found.step == 1
    (line,) = skipped
    assert "step-00000002" in line or "checkpoint of step 2" in line
    assert "\n" not in line
    assert len(line) < 400
    for old, new in zip(before, (module_tensors(model), optimizer_tensors(optimizer)), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_there_are_more_than_60_damages() -> None:
    assert len(DAMAGES) > 60


def test_whole_numbers_of_the_best_scores_stay_whole(whole: Path) -> None:
    found, _ = load_newest(whole)
    assert found is not None
    assert found.loop.best is not None
    assert {name: type(value) for name, value in found.loop.best.items()} == {
        "step": int,
        "loss": float,
        "accuracy": float,
        "num_correct": int,
        "num_samples": int,
    }
