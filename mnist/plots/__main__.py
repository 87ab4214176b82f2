"""Pictures of a run: its data, its curves, its network, its mistakes.

In: a run directory, or a recipe. Out: a picture, in the run's pictures/; its path is printed.

  python -m mnist.plots curves                       the newest run, while it runs or afterwards
  python -m mnist.plots curves --run runs/a runs/b   two runs in one picture
  python -m mnist.plots features --image 7 8         what test images become, layer by layer
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import tyro

from mnist.cli import parse_options, run_command
from mnist.config import IMAGE_SIZES, Model, TrainConfig, check_choice, evolve
from mnist.errors import UserError
from mnist.recipes import RECIPES

_Flag = tyro.conf.FlagCreatePairsOff[bool]
_File = Annotated[str | None, tyro.conf.arg(metavar="FILE.png")]
# Lists of lists, so that both `--run A B` and `--run A --run B` mean two runs.
_Runs = Annotated[tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]], tyro.conf.arg(metavar="DIR [DIR ...]")]
_Dir = Annotated[str | None, tyro.conf.arg(metavar="DIR")]
_DATA_DIR_HELP = "Where the data are; default: $MNIST_DATA_DIR, else what the run was given."
_DataDir = Annotated[str | None, tyro.conf.arg(metavar="DIR", help=_DATA_DIR_HELP)]
_Untrained = Annotated[_Flag, tyro.conf.arg(help="With the random weights with which the run began.")]


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

    augmented: _Flag = False
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
    every_layer: _Flag = False
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

    model: Model | None = None
    """A network instead of a run."""


@tyro.conf.configure(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
@dataclass(frozen=True)
class Options:
    """One picture."""

    picture: Samples | Pixels | Curves | Features | Filters | Confusion | Mistakes | Architecture


if __name__ == "__main__":
    OPTIONS = parse_options(Options, "plots", __doc__)  # before torch is imported: --help answers at once

import torch
from torch import nn

from mnist.data import datasets
from mnist.data.sources import DatasetInfo, info_of
from mnist.data.transforms import Augmentation, BatchTransform
from mnist.models import seed_initial_weights
from mnist.plots import pictures, run_pictures
from mnist.plots.architecture import as_table, draw_architecture, layer_costs
from mnist.plots.history import read_history
from mnist.runs.console import Console
from mnist.runs.export import CONFIG, find_export, load_model, read_info
from mnist.runs.records import read_config, read_run_record, runs_with
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
    subject = _find_subject(options.run, options.recipe, options.data_dir)
    path = subject.path("augmented" if options.augmented else "samples", options.out)
    config = subject.config
    augment = Augmentation(config.image, config.loop.seed, torch.device("cpu"))
    if options.augmented and augment.is_identity:
        raise UserError(f"--augmented: {config.recipe} trains on its images as they are; another recipe may not")
    figure = run_pictures.sample_figure(config, subject.dataset, augment if options.augmented else None)
    return pictures.save_picture(figure, path)


def _pixels(options: Pixels) -> Path:
    subject = _find_subject(options.run, options.recipe, options.data_dir)
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
    path = _picture_path(options.out, next(iter(histories)) / "pictures", name)
    return pictures.save_picture(run_pictures.curve_figure(list(histories.values())), path)


def _features(options: Features) -> Path:
    subject = _find_subject(options.run, options.recipe, options.data_dir, untrained=options.untrained)
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
    subject = _find_subject(options.run, options.recipe, untrained=options.untrained)
    path = subject.path("filters" + "-untrained" * subject.untrained, options.out)
    figure = run_pictures.filter_figure(subject.network(), subject.image_shape, subject.title(None))
    return pictures.save_picture(figure, path)


def _confusion(options: Confusion) -> Path:
    subject = _find_subject(options.run)
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
    subject = _find_subject(options.run, data_dir=options.data_dir)
    path = subject.path("mistakes", options.out)
    network, dataset = subject.network(), subject.dataset
    figure = run_pictures.mistake_figure(dataset, network, subject.transform(), subject.title(dataset.name))
    return pictures.save_picture(figure, path)


def _architecture(options: Architecture) -> Path:
    given = [name for name in (options.run, options.recipe, options.model) if name is not None]
    if len(given) > 1:
        raise UserError("--run, --recipe, --model: give one of them")
    if options.model is None:
        subject = _find_subject(options.run, options.recipe)
    else:
        size = IMAGE_SIZES.get(options.model, TrainConfig().image.image_size)
        subject = Subject(evolve(TrainConfig(), recipe=options.model, model=options.model, image_size=size))
    path = subject.path("architecture", options.out)
    layers = layer_costs(build_network(subject.config, subject.info), subject.image_shape)
    sys.stdout.write(_align(as_table(layers)))
    return pictures.save_picture(draw_architecture(layers, subject.config.optim.model), path)


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Lines with columns of equal width, those after the third, which hold numbers, flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    forms = [f"{{:{'<' if i < 3 else '>'}{width}}}" for i, width in enumerate(widths)]
    return "".join("  ".join(forms).format(*row).rstrip() + "\n" for row in rows)


# --- the run or recipe ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A run, or a recipe that has not been run.

    Attributes:
        config: resolved, as far as it is known.
        folder: the run directory, or a copy of an exported model; None of a recipe.
        weights: the folder of the exported weights, best or last; None where the run has none yet.
        untrained: show the random weights that training begins with.
    """

    config: TrainConfig
    folder: Path | None = None
    weights: Path | None = None
    untrained: bool = True

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """The images, read when they are first asked for."""
        choice = datasets.choose(self.config.data)
        size = self.config.image.image_size
        dataset = datasets.read(choice.name, self.config.data, choice.fallback_reason, size)
        for line in dataset.warnings:
            Console().warn(line)
        return dataset

    @property
    def info(self) -> DatasetInfo:
        """Of the data set: from the exported model, or the table of data sets; of own pictures, from themselves."""
        if self.weights is not None:
            return read_info(self.weights)
        name = self.config.data.dataset
        return self.dataset.info if name == "folder" else info_of(name)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, S, S) of what the network sees."""
        size = self.config.image.image_size
        return self.info.in_channels, size, size

    def network(self) -> nn.Module:
        """The network, with the exported weights or untrained."""
        if self.untrained:
            seed_initial_weights(self.config.loop.seed)
            return build_network(self.config, self.info)
        trained = load_model(self.weights or find_export(str(self.folder)))
        if trained.warning is not None:
            Console().warn(trained.warning)
        return trained.model

    def transform(self) -> BatchTransform:
        """Pixels -> what the network sees."""
        return BatchTransform(datasets.resolve(self.config, self.dataset).image)

    def title(self, dataset: str | None) -> str:
        """Recipe, data set, seed, and at which step the weights are."""
        result = None if self.folder is None else read_run_record(self.folder)
        best, is_last = result and result.best, self.weights is not None and self.weights.name == "last"
        step = (result and result.steps) if is_last else (best and best["step"])
        when = ["before training"] if self.untrained else [] if step is None else [f"step {step:,}"]
        return run_pictures.title_of(self.config, dataset, *when)

    def path(self, name: str, out: str | None) -> Path:
        """Where a picture goes: as asked for, or to the run, or, of a recipe, to the working directory."""
        if self.folder is None:
            return _picture_path(out, Path(), f"{self.config.recipe}-{name}")
        return _picture_path(out, self.folder / "pictures", name)


def _picture_path(out: str | None, folder: Path, name: str) -> Path:
    if out is not None and Path(out).suffix not in pictures.SUFFIXES:
        raise UserError(f"--out {out}: must end in {', '.join(pictures.SUFFIXES)}")
    return folder / f"{name}.png" if out is None else Path(out)


def _find_subject(
    run: str | None, recipe: str | None = None, data_dir: str | None = None, *, untrained: bool = False
) -> Subject:
    """What the flags of these names mean. The images are where `data_dir` says, or else where the run had them."""
    folder, weights = None, None
    if recipe is not None:
        if run is not None:
            raise UserError("--run and --recipe: give one of them")
        check_choice("--recipe", recipe, list(RECIPES))
        config, untrained = RECIPES[recipe](), True
    else:
        run = run or str(find_export(None))
        with contextlib.suppress(UserError):  # a run that has not finished has no weights
            weights = find_export(run)
        folder = Path(run)
        if folder.parent.name == "export":
            folder = folder.parent.parent
        if not (folder / CONFIG).exists():
            raise UserError(f"--run {folder}: no run there (it has no {CONFIG})")
        config = read_config(folder / CONFIG)
    config = replace(config, data=datasets.relocate(config.data, None, data_dir))
    return Subject(config, folder, weights, untrained)


if __name__ == "__main__":
    run_command(main, OPTIONS)
