"""Which models there are to choose from, and what one of them makes of a picture; without a browser.

In: the bytes of a picture, and the folder of an exported model. Out: a `Reading`: answers as `python -m mnist.predict`
gives them, or one line that says why there is none, and the outputs of the network's layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from mnist.data.picture_file import PictureError
from mnist.errors import UserError
from mnist.plots.features import activations, main_activations
from mnist.predict.answers import Answer, answer_digits, largest_of, see, training_likeness
from mnist.predict.not_a_digit import Likeness
from mnist.recipes import run_name
from mnist.runs.export import CONFIG, WEIGHTS, TrainedModel, find_export, load_model
from mnist.runs.records import read_config, read_run_record, runs_with
from mnist.system.files import RecordError


@dataclass(frozen=True)
class Reading:
    """What a model makes of one picture.

    Attributes:
        class_names: of the model.
        answers: one for each digit in the picture, in reading order; empty where there is an error.
        error: why there is no answer, or None.
        outputs: of the layers for the largest digit, by name, (1, ...), if they were asked for.
    """

    class_names: tuple[str, ...]
    answers: tuple[Answer, ...] = ()
    error: str | None = None
    outputs: Mapping[str, Tensor] = field(default_factory=dict)


def find_models(run: str | None) -> dict[str, str]:
    """Exported models by their folders, with the text of the choice: first that of `run`, then the others below runs/.

    Args:
        run: a run directory or a folder with an exported model; None = the newest finished run.

    Raises:
        UserError: there is none. Says what to type.
    """
    first = find_export(run)
    load_model(first)  # before the page is opened: a damaged one is an error of --run
    folders = {first.resolve(): first}
    for other in runs_with(f"export/best/{WEIGHTS}"):
        folders.setdefault((other / "export" / "best").resolve(), other / "export" / "best")
    found = {}
    for folder in folders.values():
        with contextlib.suppress(RecordError):  # its configuration cannot be read
            found[str(folder)] = _describe(folder)
    return found


def _describe(folder: Path) -> str:
    """The run's name, its recipe, and how many test images were right."""
    config = read_config(folder / CONFIG)
    is_run = folder.parent.name == "export"
    run, score = folder.resolve().parents[1] if is_run else folder.resolve(), ""
    with contextlib.suppress(RecordError):
        result = read_run_record(run)
        score = f", {result.test['accuracy']:.2%}" if result is not None and result.test is not None else ""
    trained_on = "" if config.data.dataset == "mnist" else f" on {config.data.dataset}"
    return f"{run.name} ({run_name(config)}{trained_on}{score})"


def read(content: bytes, folder: str, *, with_layers: bool) -> Reading:
    """Reads the digits in a picture.

    Args:
        content: the bytes of a picture file; none = blank paper.
        folder: of the exported model.
        with_layers: also the outputs of the layers.
    """
    try:
        trained, likeness = load(folder)
    except UserError as error:
        return Reading((), error=str(error))
    class_names = trained.info.class_names
    if not content:
        return Reading(class_names)
    try:
        (answers,) = answer_digits(trained, [see(content, "", trained)], likeness)
    except PictureError as error:
        return Reading(class_names, error=str(error))
    outputs = {}
    if with_layers:
        images = trained.transform(torch.tensor(largest_of(answers).seen.pixels)[None])
        outputs = main_activations(activations(trained.model, images))
    return Reading(class_names, answers, outputs=outputs)


def load(folder: str) -> tuple[TrainedModel, Likeness | None]:
    """A model, and what tells scribbles from digits; from memory if its file has not changed.

    Raises:
        UserError: it is gone, or damaged.
    """
    try:
        return _load(folder, (Path(folder) / WEIGHTS).stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"{folder}: no model there any more; reload the page") from error


@lru_cache(maxsize=8)
def _load(folder: str, _written_ns: int) -> tuple[TrainedModel, Likeness | None]:
    trained = load_model(Path(folder))
    return trained, training_likeness(trained)
