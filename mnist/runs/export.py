"""Exported models: plain weights and the configuration that they were trained with, in a folder of two files.

In: weights and configuration, or a path. Out: `export/best/{model.safetensors, config.json}`, or a `TrainedModel` that
predicts. Nothing is unpickled. config.json is written last and holds the sha256 of the weights, so that an export that
was only half written is never loaded. The folder may be published: it holds no paths and nothing of an account.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mnist.config import OutputConfig, TrainConfig, from_flat, to_flat
from mnist.data.sources import DatasetInfo, take_info
from mnist.data.transforms import BatchTransform
from mnist.errors import RunError, UserError
from mnist.runs.records import WEIGHTS_CHECKSUM, runs_with
from mnist.system.files import read_json, read_regular, refuse_symlink, remove_leftovers, write_atomically, write_json
from mnist.training.build import build_network

WEIGHTS, CONFIG = "model.safetensors", "config.json"
CARD, ONNX, PT2 = "README.md", "model.onnx", "model.pt2"  # made from the weights, by `model_card` and `mnist.export`
LOCAL_FIELDS = ("data_dir", "init_from", *(field.name for field in fields(OutputConfig)))  # paths, accounts, remarks
MAX_HEADER_BYTES = 1_000_000  # of a safetensors file, beside the weights


@dataclass(frozen=True)
class TrainedModel:
    """A network with its weights, in evaluation mode, on the CPU.

    Attributes:
        folder: where it was exported to.
        config: what it was trained with, as resolved then (data set, precision, threads included).
        info: what the images and classes of its data set are.
        model: images (B, C, S, S) float32 -> logits (B, K).
        transform: pixels (B, H, W) or (B, C, H, W) uint8 -> images.
        sha256: of the weights' file.
        warning: that the weights could not be checked, because an older version wrote no checksum, or that it
            has fields of another version; or None.
    """

    folder: Path
    config: TrainConfig
    info: DatasetInfo
    model: nn.Module
    transform: BatchTransform
    sha256: str
    warning: str | None = None


def export_model(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Writes plain weights (on the CPU) and a flat configuration without its `LOCAL_FIELDS`.

    Removes what a killed writer left there, and what was made from other weights.

    Args:
        folder: is made where it is missing.
        weights: of the model.
        config: of the run, flat, with the fields of its `DatasetInfo`.

    Raises:
        RunError: the folder cannot be written.
        UserError: it is a symbolic link, or in one: that would change files elsewhere.
    """
    try:
        refuse_symlink(folder.parent)
        refuse_symlink(folder)
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        for name in (CARD, ONNX, PT2):
            (folder / name).unlink(missing_ok=True)
        content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()})
        write_atomically(folder / WEIGHTS, content)
        public = {name: value for name, value in config.items() if name not in LOCAL_FIELDS}
        write_json(folder / CONFIG, {**public, WEIGHTS_CHECKSUM: hashlib.sha256(content).hexdigest()})
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder}: export not written ({error})") from error


def find_export(run: str | None, flag: str = "--run") -> Path:
    """The folder of an exported model.

    Args:
        run: a run directory (its best model is meant) or a folder with an exported model; None = the newest run below
            runs/ with an export that can be loaded.
        flag: named in errors.

    Raises:
        UserError: there is none. Says what to do.
    """
    if run is None:
        for newest in runs_with(f"export/best/{WEIGHTS}"):
            with contextlib.suppress(UserError):
                return load_model(newest / "export" / "best").folder
        raise UserError("--run: no finished run below runs/; train one (python train_ddp.py), or name its directory")
    if not Path(run).is_dir():
        raise UserError(f"{flag} {run}: no such folder")
    for folder in (Path(run), Path(run, "export", "best"), Path(run, "export", "last")):
        if (folder / WEIGHTS).is_file():
            return folder
    raise UserError(f"{flag} {run}: no exported model there ({WEIGHTS}); a run exports its model when it finishes")


def load_model(folder: Path, flag: str = "--run") -> TrainedModel:
    """Reads an exported model; `flag` is named in errors.

    Raises:
        UserError: a file is missing, damaged, or does not fit the other one.
    """
    try:
        config, info, checksum, unknown = _read_config(folder / CONFIG)
        model = build_network(config, info)
        num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
        content = read_regular(folder / WEIGHTS, num_bytes + MAX_HEADER_BYTES)
        weights = safetensors.torch.load(content)
        model.load_state_dict(weights)
    except (OSError, UserError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{flag} {folder}: not readable as an exported model ({reason})") from error
    sha256 = hashlib.sha256(content).hexdigest()
    if checksum not in (None, sha256):
        raise UserError(f"{flag} {folder}: {WEIGHTS} has changed since it was written ({CONFIG} has another sha256)")
    damaged = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if damaged:
        raise UserError(f"{flag} {folder}: {damaged[0]} in {WEIGHTS} has weights of nan or inf; train it again")
    notes = [] if checksum else [f"no {WEIGHTS_CHECKSUM}, the weights cannot be checked"]
    notes += [f"{name} is a field of another version, left out" for name in unknown]
    warning = f"{folder / CONFIG}: {'; '.join(notes)}" if notes else None
    return TrainedModel(folder, config, info, model.eval(), BatchTransform(config.image), sha256, warning)


def _read_config(path: Path) -> tuple[TrainConfig, DatasetInfo, str | None, list[str]]:
    """The configuration, the data set, the checksum of the weights, and the fields that this version does not know."""
    content = read_json(path)
    if not content:
        raise UserError(f"{path}: missing or empty")
    checksum = content.pop(WEIGHTS_CHECKSUM, None)
    info = take_info(content)
    with contextlib.suppress(RunError, KeyError):  # of the run that the export is still in, if it is
        content.setdefault("data_dir", read_json(path.resolve().parent.parent.parent / CONFIG)["data_dir"])
    known = to_flat(TrainConfig())
    unknown = sorted(set(content) - set(known))
    return from_flat({name: value for name, value in content.items() if name in known}), info, checksum, unknown


def read_info(folder: Path) -> DatasetInfo:
    """The data set of an exported model, without its weights.

    Raises:
        UserError: its config.json is missing or damaged.
    """
    return _read_config(folder / CONFIG)[1]
