"""Pictures of a run: its data, its curves, its network, its mistakes.

In: a run directory, or a recipe. Out: a picture, in the run's pictures/; its path is printed.

  python -m mnist.plots curves                       the newest run, while it runs or afterwards
  python -m mnist.plots curves --run runs/a runs/b   two runs in one picture
  python -m mnist.plots features --image 7 8         what test images become, layer by layer
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from mnist.cli import parse_options, run_command
from mnist.errors import UserError

_File = Annotated[str | None, tyro.conf.arg(metavar="FILE.png")]
# Lists of lists, so that both `--run A B` and `--run A --run B` mean two runs.
_Runs = Annotated[tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]], tyro.conf.arg(metavar="DIR [DIR ...]")]
_Dir = Annotated[str | None, tyro.conf.arg(metavar="DIR")]
_DATA_DIR_HELP = "Where the data are; default: $MNIST_DATA_DIR, else what the run was given."
_DataDir = Annotated[str | None, tyro.conf.arg(metavar="DIR", help=_DATA_DIR_HELP)]
_Untrained = Annotated[bool, tyro.conf.arg(help="With the random weights with which the run began.")]


@dataclass(frozen=True)
class OfRun:
    """Which run is drawn, and where the picture goes."""

    run: _Dir = None
    """A run directory, or a folder with an exported model; default: the newest finished run below runs/."""
    out: _File = None
    """The picture's file (.png, .pdf, .svg); default: <run>/pictures/<name>.png."""


@dataclass(frozen=True)
class OfRunOrRecipe(OfRun):
    """Which run or recipe is drawn, and where the picture goes."""

    recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """A recipe instead of a run; untrained."""


@dataclass(frozen=True)
class Samples(OfRunOrRecipe):
    """The first hundred training images in the order in which a run sees them, with their labels."""

    augmented: bool = False
    """Below each image what augmentation makes of it."""
    data_dir: _DataDir = None


@dataclass(frozen=True)
class Pixels(OfRunOrRecipe):
    """The numbers of one test image, printed too: 0 = paper, 255 = ink; of colours one table each."""

    image: int = 0
    """Place of the image in the test set."""
    data_dir: _DataDir = None


@dataclass(frozen=True)
class Curves:
    """Loss, accuracy, learning rate and gradient norm over the steps of one run or of several, finished or not."""

    run: _Runs = ()
    """Run directories; default: the newest one below runs/."""
    out: _File = None
    """The picture's file (.png, .pdf, .svg); default: curves.png, or comparison.png, in <first run>/pictures/."""


@dataclass(frozen=True)
class Features(OfRunOrRecipe):
    """What test images become from layer to layer, up to the logits."""

    image: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")] = (0,)
    """Places of images in the test set."""
    every_layer: bool = False
    """Also the layers between a convolution and the ReLU that follows it, such as batch norm."""
    untrained: _Untrained = False
    data_dir: _DataDir = None


@dataclass(frozen=True)
class Filters(OfRunOrRecipe):
    """The weights of the first layer, and of small convolutions after it, as images."""

    untrained: _Untrained = False


@dataclass(frozen=True)
class Confusion(OfRun):
    """Which classes of the test set are taken for which others: counts and rates."""


@dataclass(frozen=True)
class Mistakes(OfRun):
    """The test images that the model gets wrong with the greatest confidence."""

    data_dir: _DataDir = None


@dataclass(frozen=True)
class Architecture(OfRunOrRecipe):
    """A diagram and the table of layers, printed too: output shapes, neurons, parameters, connections, costs."""


@tyro.conf.configure(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
@dataclass(frozen=True)
class Options:
    """One picture."""

    picture: Samples | Pixels | Curves | Features | Filters | Confusion | Mistakes | Architecture


if __name__ == "__main__":
    OPTIONS = parse_options(Options, "plots", __doc__)  # before torch is imported: --help answers at once

import torch

from mnist.data import datasets
from mnist.data.transforms import Augmentation
from mnist.plots import pictures, run_pictures
from mnist.plots.architecture import as_table, draw_architecture, layer_costs
from mnist.plots.history import read_history
from mnist.plots.subject import find_subject, picture_path
from mnist.runs.console import Console
from mnist.runs.records import read_run_record, runs_with
from mnist.training.build import build_network


def main(options: Options) -> int:
    """Draws one picture, writes it, prints where."""
    drawings: dict[type, Callable[[Any], Path]] = {
        Samples: _samples,
        Pixels: _pixels,
        Curves: _curves,
        Features: _features,
        Filters: _filters,
        Confusion: _confusion,
        Mistakes: _mistakes,
        Architecture: _architecture,
    }
    path = drawings[type(options.picture)](options.picture)
    sys.stdout.write(f"{path}\n")
    return 0


def _samples(options: Samples) -> Path:
    subject = find_subject(options.run, options.recipe, options.data_dir)
    path = subject.path("augmented" if options.augmented else "samples", options.out)
    config = subject.config
    augment = Augmentation(config.image, config.loop.seed, torch.device("cpu"))
    if options.augmented and augment.is_identity:
        raise UserError(f"--augmented: {config.recipe} trains on its images as they are; another recipe may not")
    figure = run_pictures.sample_figure(config, subject.dataset, augment if options.augmented else None)
    return pictures.save_picture(figure, path)


def _pixels(options: Pixels) -> Path:
    subject = find_subject(options.run, options.recipe, options.data_dir)
    path = subject.path(f"pixels-{options.image}", options.out)
    dataset = subject.dataset
    _check_images([options.image], dataset)
    image, label = dataset.test.images[options.image], int(dataset.test.labels[options.image])
    channels = image.reshape(-1, *image.shape[-2:]).tolist()
    tables = ["".join("".join(f"{pixel:4}" for pixel in row) + "\n" for row in channel) for channel in channels]
    sys.stdout.write("\n".join(tables))
    title = f"{dataset.name}, test image {options.image}: {dataset.class_names[label]}"
    scale = "0 = paper, 255 = ink" if dataset.info.has_digits else "0 to 255, large numbers dark"
    scale = "red, green and blue, one below the other; 0 to 255, large numbers dark" if len(channels) == 3 else scale
    return pictures.save_picture(pictures.draw_pixels(image, title, scale), path)


def _check_images(indices: Sequence[int], dataset: datasets.Dataset) -> None:
    if not indices:
        raise UserError("--image: name an image of the test set, or several")
    for index in indices:
        if not 0 <= index < len(dataset.test):
            raise UserError(f"--image {index}: must lie in 0..{len(dataset.test) - 1}")


def _curves(options: Curves) -> Path:
    runs = list(dict.fromkeys(Path(run) for group in options.run for run in group)) or runs_with("metrics.jsonl")[:1]
    if not runs:
        raise UserError("--run: no run below runs/; train one (python train_ddp.py), or name its directory")
    histories, left_out = {}, []
    for run in runs:  # runs/*/ also names folders without records, such as runs/reproduce
        try:
            histories[run] = read_history(run)
        except UserError as error:
            left_out.append(error)
    if not histories:
        raise left_out[0]
    for reason in left_out:
        Console().warn(f"left out: {reason}")
    name = "curves" if len(histories) == 1 else "comparison"
    path = picture_path(options.out, next(iter(histories)) / "pictures", name)
    return pictures.save_picture(run_pictures.curve_figure(list(histories.values())), path)


def _features(options: Features) -> Path:
    subject = find_subject(options.run, options.recipe, options.data_dir, untrained=options.untrained)
    places = "-".join(map(str, options.image)) if len(options.image) <= 8 else f"{len(options.image)}-images"
    name = "features" if options.image == (0,) else f"features-{places}"
    path = subject.path(name + "-untrained" * subject.untrained, options.out)
    dataset = subject.dataset
    _check_images(options.image, dataset)
    network, title, is_every = subject.network(), subject.title(dataset.name), options.every_layer
    figure = run_pictures.feature_figure(
        dataset, network, subject.transform(), title, options.image, every_layer=is_every
    )
    return pictures.save_picture(figure, path)


def _filters(options: Filters) -> Path:
    subject = find_subject(options.run, options.recipe, untrained=options.untrained)
    path = subject.path("filters" + "-untrained" * subject.untrained, options.out)
    figure = run_pictures.filter_figure(subject.network(), subject.image_shape, subject.title(None))
    return pictures.save_picture(figure, path)


def _confusion(options: Confusion) -> Path:
    subject = find_subject(options.run)
    path = subject.path("confusion", options.out)
    result = None if subject.folder is None else read_run_record(subject.folder)
    if result is None or result.test_confusion is None:
        raise UserError(f"--run {subject.folder}: no test scores in result.json; a run writes them when it finishes")
    dataset, names, counts = subject.config.data.dataset, subject.info.class_names, result.test_confusion
    if len(counts) != len(names):
        raise UserError(
            f"--run {subject.folder}: {len(counts)} rows of test_confusion, but {dataset} has {len(names)} classes"
        )
    title = replace(subject, weights=None).title(dataset)  # the best weights are those that are scored
    return pictures.save_picture(pictures.draw_confusion(counts, names, title), path)


def _mistakes(options: Mistakes) -> Path:
    subject = find_subject(options.run, data_dir=options.data_dir)
    path = subject.path("mistakes", options.out)
    network, dataset = subject.network(), subject.dataset
    figure = run_pictures.mistake_figure(dataset, network, subject.transform(), subject.title(dataset.name))
    return pictures.save_picture(figure, path)


def _architecture(options: Architecture) -> Path:
    subject = find_subject(options.run, options.recipe)
    path = subject.path("architecture", options.out)
    layers = layer_costs(build_network(subject.config, subject.info), subject.image_shape)
    sys.stdout.write(_align(as_table(layers)))
    return pictures.save_picture(draw_architecture(layers, subject.config.optim.model), path)


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Lines with columns of equal width, those after the third, which hold numbers, flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    forms = [f"{{:{'<' if i < 3 else '>'}{width}}}" for i, width in enumerate(widths)]
    return "".join("  ".join(forms).format(*row).rstrip() + "\n" for row in rows)


if __name__ == "__main__":
    run_command(main, OPTIONS)
