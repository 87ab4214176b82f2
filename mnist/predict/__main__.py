"""Says which digit a picture shows: photographs, scans, drawings, of any size and kind.

    python -m mnist.predict docs/digit.png
    python -m mnist.predict photos/ 'scans/*.jpg' --run runs/my-run --json
    python -m mnist.predict docs/digit.png --save seen.png

In: pictures, a trained model. Out: the digit and ten probabilities, as bars or as JSON, on standard output; pictures of
what the network saw with --save. A file that cannot be read is named, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import functools
import glob
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mnist.cli import RunOption, parse_options, run_command
from mnist.errors import UserError


@dataclass(frozen=True)
class Options:
    """What to look at, and with which model."""

    pictures: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE...")]
    """Files, folders (with all that is below them), patterns like 'scans/*.jpg'; - reads one from standard input."""
    run: RunOption = None
    """Run directory, or folder with an exported model; default: the newest finished run below runs/."""
    json: bool = False
    """Print a list of {"file", "digit", "probabilities", "warning"}, or {"file", "error"}."""
    save: str | None = None
    """Draw the picture, what the network sees of it, and the probabilities: a file, or a folder for several."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, "predict", __doc__)  # before torch is imported: --help answers at once

import numpy as np
import torch
from PIL import Image
from rich.console import Console as RichConsole
from rich.markup import escape

from mnist.data.datasets import SOURCES
from mnist.plots.pictures import SUFFIXES, draw_prediction, save_picture
from mnist.predict.digit_image import PictureError, SeenDigit, read_picture, see_digit
from mnist.runs.console import Console
from mnist.runs.export import TrainedModel, find_export, load_model

BATCH = 100  # pictures that go through the network together, and are reported together
UNSURE = 0.6  # a probability below it is a guess
UNSURE_WARNING = "not sure: no digit is much more probable than the others"
DIGIT_SETS = ("mnist", "digits")
NO_DIGITS = "the model knows {}, not digits; its classes are numbered"
NUM_BARS = 20  # for so many pictures at most all probabilities are shown, for more a line each
BAR_WIDTH = 40


@dataclass(frozen=True)
class Prediction:
    """What the network says of one picture; `error` says why there is nothing else.

    Attributes:
        file: as it was named, or found.
        digit: the class of the largest probability.
        probabilities: of the ten classes, in [0, 1].
        warning: why the answer may be wrong, or None.
        seen: what the network was shown.
        error: why the picture could not be read, or None.
    """

    file: str
    digit: int = -1
    probabilities: tuple[float, ...] = ()
    warning: str | None = None
    seen: SeenDigit | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """What --json prints."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        return {
            "file": self.file,
            "digit": self.digit,
            "probabilities": [round(p, 6) for p in self.probabilities],
            "warning": self.warning,
        }


def main(options: Options) -> int:
    """Predicts and prints; returns 0, or 1 if a picture could not be read."""
    files = list(find_pictures(options.pictures))
    if not files:
        raise UserError("PICTURE: name at least one file, folder or pattern")
    drawings = _drawings(files, options.save)
    trained = load_model(find_export(options.run))
    if trained.warning is not None:
        Console().warn(trained.warning)
    class_names = SOURCES[trained.config.data.dataset].class_names
    console = _stdout_console()
    printed, num_errors = [], 0
    for first in range(0, len(files), BATCH):
        for index, prediction in enumerate(predict(trained, files[first : first + BATCH]), start=first):
            num_errors += prediction.error is not None
            if options.json:
                printed.append(prediction.as_dict())
            else:
                show(console, prediction, class_names, with_bars=len(files) <= NUM_BARS)
            if drawings and prediction.seen is not None:
                _draw(prediction, drawings[index], class_names)
    if not options.json:
        kind = "" if trained.config.data.dataset == "mnist" else f", NOT MNIST but {trained.config.data.dataset}"
        Console().note(f"model: {trained.folder} ({trained.config.recipe}{kind})")
    if options.json:
        sys.stdout.write(json.dumps(printed, indent=1) + "\n")
    return 1 if num_errors else 0


def _drawings(files: Sequence[str], save: str | None) -> list[Path]:
    """Where the drawing of each file goes: to `save` itself, or below it, under names that differ."""
    if save is None:
        return []
    target = Path(save)
    if target.suffix and not target.is_dir():
        if len(files) > 1:
            raise UserError(f"--save {save}: {len(files):,} pictures need a folder, not a file")
        if target.suffix.lower() not in SUFFIXES:
            raise UserError(f"--save {save}: must be a folder, or end in {', '.join(SUFFIXES)}")
        paths = [target]
    else:
        paths = []
        for file in files:
            stem = "stdin" if file == "-" else Path(file).stem
            names = (target / f"{stem}{ending}.png" for ending in ["", *(f"-{k}" for k in range(2, len(files) + 1))])
            paths.append(next(path for path in names if path not in paths))
    inputs = {Path(file).resolve() for file in files}
    if any(path.resolve() in inputs for path in paths):
        raise UserError(f"--save {save}: would write over a picture that it is to read; choose another folder")
    return paths


def find_pictures(names: Sequence[str]) -> Iterator[str]:
    """Files from files, folders and patterns, in order; what is not there stays as it is, to be named as an error."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for name in names:
        if os.path.isdir(name):  # noqa: PTH112 - false, not an error, for what cannot be looked at
            found = [file for file in sorted(Path(name).rglob("*")) if file.suffix.lower() in suffixes]
            yield from map(str, filter(Path.is_file, found) if found else [name])
        elif not os.path.lexists(name) and glob.has_magic(name):
            yield from sorted(glob.glob(name, recursive=True)) or [name]  # noqa: PTH207 - takes absolute patterns too
        else:
            yield name


def predict(trained: TrainedModel, files: Sequence[str]) -> list[Prediction]:
    """What the network says of each file, in order. All pictures go through it as one batch."""
    looked = [_look(file) for file in files]
    digits = [digit.pixels for digit in looked if isinstance(digit, SeenDigit)]
    images = torch.from_numpy(np.stack(digits)) if digits else torch.empty(0, 28, 28)
    with torch.inference_mode():
        logits = trained.model(trained.transform(images))
    dataset = trained.config.data.dataset
    answers = zip(logits.argmax(dim=1).tolist(), logits.softmax(dim=1).tolist(), strict=True)
    predictions = []
    for file, digit in zip(files, looked, strict=True):
        if isinstance(digit, SeenDigit):
            best, probabilities = next(answers)
            warning = digit.warning or (UNSURE_WARNING if max(probabilities) < UNSURE else None)
            warning = NO_DIGITS.format(dataset) if dataset not in DIGIT_SETS else warning
            predictions.append(Prediction(file, best, tuple(probabilities), warning, digit))
        else:
            predictions.append(Prediction(file, error=digit))
    return predictions


def _look(file: str) -> SeenDigit | str:
    """What is to be shown to the network, or why there is nothing."""
    if os.path.isdir(file):  # noqa: PTH112 - as above
        return "a folder without pictures"
    if not os.path.lexists(file) and glob.has_magic(file):
        return "no file matches"
    try:
        return see_digit(_read(file))
    except PictureError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _read(file: str) -> Image.Image:
    return read_picture(io.BytesIO(_standard_input()) if file == "-" else Path(file))


@functools.cache
def _standard_input() -> bytes:
    return sys.stdin.buffer.read()


def show(console: RichConsole, prediction: Prediction, class_names: Sequence[str], with_bars: bool) -> None:
    """Prints a prediction: a line, and the ten probabilities as bars."""
    name = escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in prediction.file))  # no control characters
    if prediction.error is not None:
        console.print(f"{name}  [bold red]error[/bold red]  {escape(prediction.error)}")
        return
    best = prediction.probabilities[prediction.digit]
    line = f"{name}  [bold]{class_names[prediction.digit]}[/bold]  {best:.1%}"
    if prediction.warning is not None:
        line += f"  [bold yellow]warning[/bold yellow]  {escape(prediction.warning)}"
    console.print(line)
    if not with_bars:
        return
    width = max(map(len, class_names))
    filled, empty = ("\u2588", "\u2591") if console.is_terminal else ("#", ".")
    for k, (label, p) in enumerate(zip(class_names, prediction.probabilities, strict=True)):
        length = round(p * BAR_WIDTH)
        bar = f"{label:>{width}}  {filled * length}{empty * (BAR_WIDTH - length)}  {p:6.1%}"
        console.print(f"  [bold]{bar}[/bold]" if k == prediction.digit else f"  {bar}")


def _stdout_console() -> RichConsole:
    if sys.stdout.isatty():
        return RichConsole(highlight=False, soft_wrap=True)
    return RichConsole(highlight=False, soft_wrap=True, color_system=None, force_terminal=False)


def _draw(prediction: Prediction, path: Path, class_names: Sequence[str]) -> None:
    assert prediction.seen is not None
    source, seen = np.asarray(_read(prediction.file)), prediction.seen
    save_picture(draw_prediction(source, seen.pixels, prediction.probabilities, class_names, seen.box), path)


if __name__ == "__main__":
    run_command(main, OPTIONS)
