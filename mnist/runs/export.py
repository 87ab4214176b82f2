"""Exported models: plain weights and the configuration that they were trained with, in a folder of two files.

In: weights and configuration, or a path. Out: `export/best/{model.safetensors, config.json}`, or a `TrainedModel` that
predicts. Nothing is unpickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mnist.config import RUNS, TrainConfig, from_flat
from mnist.data.transforms import BatchTransform
from mnist.errors import RunError, UserError
from mnist.models import build_model
from mnist.system.files import write_atomically, write_json

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class TrainedModel:
    """A network with its weights, in evaluation mode, on the CPU.

    Attributes:
        folder: where it was exported to.
        config: what it was trained with, as resolved then (data set, precision, threads included).
        model: images (B, 1, S, S) float32 -> logits (B, 10).
        transform: pixels (B, 28, 28) uint8 -> images.
    """

    folder: Path
    config: TrainConfig
    model: nn.Sequential
    transform: BatchTransform


def export_model(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Writes plain weights (on the CPU) and a flat configuration.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        write_atomically(folder / WEIGHTS, safetensors.torch.save(contiguous))
        write_json(folder / CONFIG, config)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder}: export not written ({error})") from error


def find_export(run: str | None) -> Path:
    """The folder of an exported model.

    Args:
        run: a run directory (its best model is meant) or a folder with an exported model; None = the newest run below
            runs/ that has exported one.

    Raises:
        UserError: there is none. Says what to do.
    """
    if run is None:
        exports = sorted(RUNS.glob("*/export/best/" + WEIGHTS), key=lambda path: path.stat().st_mtime)
        if not exports:
            raise UserError(
                "--run: no finished run below runs/; train one (python train_ddp.py), or name its directory"
            )
        return exports[-1].parent
    if not Path(run).is_dir():
        raise UserError(f"--run {run}: no such folder")
    for folder in (Path(run), Path(run, "export", "best"), Path(run, "export", "last")):
        if (folder / WEIGHTS).is_file():
            return folder
    raise UserError(f"--run {run}: no exported model there ({WEIGHTS}); a run exports its model when it finishes")


def load_model(folder: Path) -> TrainedModel:
    """Reads an exported model.

    Raises:
        UserError: a file is missing, broken, or does not fit the other one.
    """
    try:
        config = from_flat(json.loads((folder / CONFIG).read_bytes()))
        weights = safetensors.torch.load((folder / WEIGHTS).read_bytes())
        model = build_model(config.optim.model)
        model.load_state_dict(weights)
    except (OSError, UserError, ValueError, TypeError, AttributeError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--run {folder}: not readable as an exported model ({reason})") from error
    return TrainedModel(folder, config, model.eval(), BatchTransform(config.image))
