"""Says which digit a picture shows: photographs, scans, drawings, of any size and kind; or which class of your own.

    python -m mnist.predict docs/digit.png
    python -m mnist.predict photos/ 'scans/*.jpg' --run runs/my-run --json
    python -m mnist.predict docs/digit.png --save seen.png

In: pictures, a trained model. Out: each digit, or the class of the picture, and all probabilities, as bars or as JSON,
on standard output; pictures of what the network saw with --save. A file that cannot be read is an error, and the exit
code is 1; the other files are read all the same.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import re
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
    """Print a list of {"file", "digit", "probabilities", "warning"}, or {"file", "error"}; of a picture with several
    digits these are of the largest, and "digits" lists all from left to right, each with its "box". Models of other
    data sets than digits have a "class" in their place, and the probabilities by class."""
    save: str | None = None
    """Draw the picture, what the network sees of it, and the probabilities: a file, or a folder for several."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, "predict", __doc__)  # before torch is imported: --help answers at once

import numpy as np
from rich.console import Console as RichConsole
from rich.markup import escape

from mnist.data.picture_file import IGNORED, MAX_BYTES, PictureError, decode, is_picture_name, natural_order, read_file
from mnist.data.sources import DatasetInfo
from mnist.plots.pictures import SUFFIXES, save_picture
from mnist.predict.answers import Answer, answer_digits, largest_of, see, shown_classes, training_likeness
from mnist.predict.digit_image import SeenDigit
from mnist.predict.drawing import draw_prediction
from mnist.predict.ink import MAX_SIDE, read_picture
from mnist.predict.not_a_digit import Likeness
from mnist.recipes import run_name
from mnist.runs.console import Console
from mnist.runs.export import TrainedModel, find_export, load_model

BATCH = 100  # pictures that go through the network together, and are reported together
NUM_BARS = 20  # for so many pictures at most all probabilities are shown, for more a line each
BAR_WIDTH = 40


@dataclass(frozen=True)
class Prediction:
    """What the network says of one picture.

    Attributes:
        file: as it was named, or found.
        answers: one for each digit, in reading order.
        error: why the picture could not be read, or None.
    """

    file: str
    answers: tuple[Answer, ...] = ()
    error: str | None = None

    def as_dict(self, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """What --json prints; `class_names` where the classes are no digits, and so each picture has one answer."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        largest = {"file": self.file, **largest_of(self.answers).as_dict(class_names)}
        if len(self.answers) == 1:
            return largest
        number = "".join(str(answer.digit) for answer in self.answers)
        warning = f"{len(self.answers)} digits in one picture: {number}"
        digits = [{**answer.as_dict(), "box": answer.seen.box} for answer in self.answers]
        return {**largest, "warning": warning, "digits": digits}


def main(options: Options) -> int:
    """Predicts and prints; returns 0, or 1 if a picture could not be read."""
    files = list(find_pictures(options.pictures))
    if not files:
        raise UserError("PICTURE: name at least one file, folder or pattern")
    drawings = _drawings(files, options.save)
    trained = load_model(find_export(options.run))
    if trained.warning is not None:
        Console().warn(trained.warning)
    class_names = trained.info.class_names
    likeness = training_likeness(trained)
    console = RichConsole(highlight=False, emoji=False, soft_wrap=True)
    printed, num_errors = [], 0
    for first in range(0, len(files), BATCH):
        for index, prediction in enumerate(predict(trained, files[first : first + BATCH], likeness), start=first):
            num_errors += prediction.error is not None
            if options.json:
                printed.append(prediction.as_dict(None if trained.info.has_digits else class_names))
            else:
                show(console, prediction, class_names, with_bars=len(files) <= NUM_BARS)
            if drawings:
                _draw(prediction, drawings[index], trained.info)
    if not options.json:
        dataset = trained.config.data.dataset
        kind = "" if dataset == "mnist" else f", trained on {dataset}, NOT on MNIST"
        kind = kind if trained.info.has_digits else f", {len(class_names)} classes of {dataset}"
        Console().note(f"model: {trained.folder} ({run_name(trained.config)}{kind})")
    if options.json:
        sys.stdout.write(json.dumps(printed, indent=1) + "\n")
    return 1 if num_errors else 0


def _drawings(files: Sequence[str], save: str | None) -> list[Path]:
    """Where the drawing of each file goes: to `save` itself, or below it, numbered where two files have one name."""
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
        stems = ["stdin" if file == "-" else Path(file).stem for file in files]
        if len(set(stems)) < len(stems):
            stems = [f"{number:0{len(str(len(files)))}}-{stem}" for number, stem in enumerate(stems, start=1)]
        paths = [target / f"{stem}.png" for stem in stems]
    inputs = {Path(file).resolve() for file in files}
    inputs |= {path.with_stem(re.sub(r"-digit\d+$", "", path.stem)) for path in inputs if path.stem}  # see _draw
    if any(path.resolve() in inputs for path in paths):
        raise UserError(f"--save {save}: would write over a picture that it is to read; choose another folder")
    return paths


def find_pictures(names: Sequence[str]) -> Iterator[str]:
    """Files from files, folders and patterns, in natural order; what is missing stays, to be named as an error."""
    for name in names:
        if os.path.isdir(name):  # noqa: PTH112 - false, not an error, for what cannot be looked at
            found = [path for path in Path(name).rglob("*") if _is_shown(path.relative_to(name)) and path.is_file()]
            yield from sorted(map(str, found), key=natural_order) or [name]
        elif not os.path.lexists(name) and glob.has_magic(name):
            found_names = glob.glob(name, recursive=True)  # noqa: PTH207 - takes absolute patterns too
            yield from sorted(found_names, key=natural_order) or [name]
        else:
            yield name


def _is_shown(path: Path) -> bool:
    """Whether a file in a folder is a picture of its user's, not one that a system or an editor keeps there."""
    return is_picture_name(path.name) and not any(part.startswith(IGNORED) for part in path.parts)


def predict(trained: TrainedModel, files: Sequence[str], likeness: Likeness | None = None) -> list[Prediction]:
    """What the network says of each file, in order. All digits, or whole pictures, go through it as one batch."""
    looked = [_look(file, trained) for file in files]
    answers = iter(answer_digits(trained, [found for found in looked if not isinstance(found, str)], likeness))
    return [
        Prediction(file, error=found) if isinstance(found, str) else Prediction(file, next(answers))
        for file, found in zip(files, looked, strict=True)
    ]


def _look(file: str, trained: TrainedModel) -> list[SeenDigit] | str:
    """What is to be shown to the network, or why there is nothing: digits, or the whole picture if it knows none."""
    if os.path.isdir(file):  # noqa: PTH112 - as above
        return "a folder without pictures"
    if not os.path.lexists(file) and glob.has_magic(file):
        return "no file matches"
    try:
        return see(_content(file), Path(file).suffix, trained)
    except PictureError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _content(file: str) -> bytes:
    """The bytes of a file, or with - of standard input; raises a PictureError or an OSError."""
    return _standard_input() if file == "-" else read_file(Path(file))


@functools.cache
def _standard_input() -> bytes:
    content = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise PictureError(f"too large: more than {MAX_BYTES:,} bytes")
    return content


def show(console: RichConsole, prediction: Prediction, class_names: Sequence[str], with_bars: bool) -> None:
    """Prints a prediction: for each digit a line, and the ten probabilities as bars."""
    name = escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in prediction.file))  # no control characters
    if prediction.error is not None:
        console.print(f"{name}  [bold red]error[/bold red]  {escape(prediction.error)}")
    for number, answer in enumerate(prediction.answers, start=1):
        place = "" if len(prediction.answers) == 1 else f"  digit {number} of {len(prediction.answers)}"
        line = (
            f"{name}{place}  [bold]{escape(class_names[answer.digit])}[/bold]  {answer.probabilities[answer.digit]:.1%}"
        )
        if answer.warning is not None:
            line += f"  [bold magenta]warning[/bold magenta]  {escape(answer.warning)}"
        console.print(line)
        if with_bars:
            _print_bars(console, answer, class_names)


def _print_bars(console: RichConsole, answer: Answer, class_names: Sequence[str]) -> None:
    shown = shown_classes(answer.probabilities)
    width = max(len(class_names[k]) for k in shown)
    has_blocks = console.is_terminal and not console.options.ascii_only
    filled, empty = ("\u2588", "\u2591") if has_blocks else ("#", ".")
    for k in shown:
        label, p = class_names[k], answer.probabilities[k]
        length = round(p * BAR_WIDTH)
        bar = f"{escape(f'{label:>{width}}')}  {filled * length}{empty * (BAR_WIDTH - length)}  {p:6.1%}"
        console.print(f"  [bold]{bar}[/bold]" if k == answer.digit else f"  {bar}")


def _draw(prediction: Prediction, path: Path, info: DatasetInfo) -> None:
    """A drawing for each digit; of several in one picture the names end in -digit1, -digit2, ..."""
    if prediction.error is not None:
        return
    content, suffix = _content(prediction.file), Path(prediction.file).suffix
    source = np.asarray(read_picture(content, suffix) if info.has_digits else decode(content, suffix, MAX_SIDE))
    for number, answer in enumerate(prediction.answers, start=1):
        place = path if len(prediction.answers) == 1 else path.with_stem(f"{path.stem}-digit{number}")
        save_picture(draw_prediction(source, answer, info.class_names), place)
        Console().note(f"drawn: {place}")


if __name__ == "__main__":
    run_command(main, OPTIONS)
