"""Pictures of a run: its data, its curves, its network, its mistakes.

In: a run directory, or a recipe. Out: a picture, in the run's pictures/; its path is printed.

  python -m mnist.plots curves                       the newest run, while it runs or afterwards
  python -m mnist.plots curves --run runs/a runs/b   two runs in one picture
  python -m mnist.plots features --image 7 8         what test images become, layer by layer
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
_Recipe = Annotated[str | None, tyro.conf.arg(metavar="NAME", help="A recipe instead of a run; untrained.")]
_Images = Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]", help="Places of images in the test set.")]
_Untrained = Annotated[_Flag, tyro.conf.arg(help="With the random weights with which the run began.")]


@dataclass(frozen=True)
class Place:
    """Which run, and where the picture goes."""

    run: _Dir = None
    """A run directory, or a folder with an exported model; default: the newest finished run below runs/."""
    out: _File = None
    """The picture's file (.png, .pdf, .svg); default: <run>/pictures/<name>.png."""


@dataclass(frozen=True)
class Samples:
    """The first hundred training images in the order in which a run sees them, with their labels."""

    place: Place = field(default_factory=Place)
    recipe: _Recipe = None
    augmented: _Flag = False
    """Below each image what augmentation makes of it."""
    data_dir: _DataDir = None


@dataclass(frozen=True)
class Pixels:
    """The numbers of one test image, printed too: 0 = paper, 255 = ink; of colours one table each."""

    place: Place = field(default_factory=Place)
    recipe: _Recipe = None
    image: Annotated[int, tyro.conf.arg(help="Place of the image in the test set.")] = 0
    data_dir: _DataDir = None


@dataclass(frozen=True)
class Curves:
    """Loss, accuracy, learning rate and gradient norm over the steps of one run or of several, finished or not."""

    run: _Runs = ()
    """Run directories; default: the newest one below runs/."""
    out: _File = None
    """The picture's file (.png, .pdf, .svg); default: curves.png, or comparison.png, in <first run>/pictures/."""


@dataclass(frozen=True)
class Features:
    """What test images become from layer to layer, up to the logits."""

    place: Place = field(default_factory=Place)
    recipe: _Recipe = None
    image: _Images = (0,)
    every_layer: _Flag = False
    """Also the layers between a convolution and the ReLU that follows it, such as batch norm."""
    untrained: _Untrained = False
    data_dir: _DataDir = None


@dataclass(frozen=True)
class Filters:
    """The weights of the first layer, and of small convolutions after it, as images."""

    place: Place = field(default_factory=Place)
    recipe: _Recipe = None
    untrained: _Untrained = False


@dataclass(frozen=True)
class Confusion:
    """Which classes of the test set are taken for which others: counts and rates."""

    place: Place = field(default_factory=Place)


@dataclass(frozen=True)
class Mistakes:
    """The test images that the model gets wrong with the greatest confidence."""

    place: Place = field(default_factory=Place)
    data_dir: _DataDir = None


@dataclass(frozen=True)
class Architecture:
    """A diagram and the table of layers, printed too: output shapes, neurons, parameters, connections, costs."""

    place: Place = field(default_factory=Place)
    recipe: _Recipe = None
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
from mnist.plots.features import as_table, layer_costs
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
    subject = _find_subject(options.place.run, options.recipe)
    path = subject.path("augmented" if options.augmented else "samples", options.place.out)
    config = subject.config
    augment = Augmentation(config.image, config.loop.seed, torch.device("cpu"))
    if options.augmented and augment.is_identity:
        raise UserError(f"--augmented: {config.recipe} trains on its images as they are; another recipe may not")
    dataset = _read_data(config, options.data_dir)
    return pictures.save_picture(
        run_pictures.sample_figure(config, dataset, augment if options.augmented else None), path
    )


def _pixels(options: Pixels) -> Path:
    subject = _find_subject(options.place.run, options.recipe)
    path = subject.path(f"pixels-{options.image}", options.place.out)
    dataset = _read_data(subject.config, options.data_dir)
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
    runs = list(dict.fromkeys(Path(run) for group in options.run for run in group)) or _newest_run()
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


def _newest_run() -> list[Path]:
    found = runs_with("metrics.jsonl")[:1]
    if not found:
        raise UserError("--run: no run below runs/; train one (python train_ddp.py), or name its directory")
    return found


def _features(options: Features) -> Path:
    subject = _find_subject(options.place.run, options.recipe)
    untrained = options.untrained or subject.folder is None
    places = "-".join(map(str, options.image)) if len(options.image) <= 8 else f"{len(options.image)}-images"
    name = "features" if options.image == (0,) else f"features-{places}"
    path = subject.path(f"{name}-untrained" if untrained else name, options.place.out)
    dataset = _read_data(subject.config, options.data_dir)
    _check_images(options.image, dataset)
    figure = run_pictures.feature_figure(
        dataset,
        _build(subject, untrained),
        BatchTransform(datasets.resolve(subject.config, dataset).image),
        subject.title(dataset.name, untrained),
        options.image,
        every_layer=options.every_layer,
    )
    return pictures.save_picture(figure, path)


def _filters(options: Filters) -> Path:
    subject = _find_subject(options.place.run, options.recipe)
    untrained = options.untrained or subject.folder is None
    path = subject.path("filters-untrained" if untrained else "filters", options.place.out)
    title = subject.title(None, untrained)
    return pictures.save_picture(
        run_pictures.filter_figure(_build(subject, untrained), subject.image_shape, title), path
    )


def _confusion(options: Confusion) -> Path:
    subject = dataclasses.replace(_find_subject(options.place.run), export="best")  # the one that is scored
    if subject.folder is None:
        raise UserError("plots confusion: no finished run found; name one with --run")
    path = subject.path("confusion", options.place.out)
    result = read_run_record(subject.folder)
    if result is None or result.test_confusion is None:
        raise UserError(f"--run {subject.folder}: no test scores in result.json; a run writes them when it finishes")
    dataset, names, counts = subject.config.data.dataset, subject.info.class_names, result.test_confusion
    if len(counts) != len(names):
        raise UserError(
            f"--run {subject.folder}: {len(counts)} rows of test_confusion, but {dataset} has {len(names)} classes"
        )
    return pictures.save_picture(pictures.draw_confusion(counts, names, subject.title(dataset)), path)


def _mistakes(options: Mistakes) -> Path:
    subject = _find_subject(options.place.run)
    path = subject.path("mistakes", options.place.out)
    model = _build(subject)
    dataset = _read_data(subject.config, options.data_dir)
    transform = BatchTransform(datasets.resolve(subject.config, dataset).image)
    title = subject.title(dataset.name)
    return pictures.save_picture(run_pictures.mistake_figure(dataset, model, transform, title), path)


def _architecture(options: Architecture) -> Path:
    given = [name for name in (options.place.run, options.recipe, options.model) if name is not None]
    if len(given) > 1:
        raise UserError("--run, --recipe, --model: give one of them")
    if options.model is None:
        subject = _find_subject(options.place.run, options.recipe)
    else:
        size = IMAGE_SIZES.get(options.model, TrainConfig().image.image_size)
        subject = Subject(evolve(TrainConfig(), recipe=options.model, model=options.model, image_size=size), None)
    path = subject.path("architecture", options.place.out)
    name = subject.config.optim.model
    layers = layer_costs(build_network(subject.config, subject.info), subject.image_shape)
    sys.stdout.write(_align(as_table(layers)))
    return pictures.save_picture(pictures.draw_architecture(layers, name), path)


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
        folder: the run directory, or None.
        export: "best" or "last", which of the run's weights are meant.
    """

    config: TrainConfig
    folder: Path | None
    export: str = "best"

    @property
    def info(self) -> DatasetInfo:
        """Of the data set: from the exported model, else from the table of data sets."""
        if self.folder is None:
            return info_of(self.config.data.dataset)
        exported = self.folder / "export" / self.export
        return read_info(exported if exported.is_dir() else self.folder)  # which may be a copy of an exported model

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, S, S) of what the network sees."""
        size = self.config.image.image_size
        return self.info.in_channels, size, size

    def title(self, dataset: str | None, untrained: bool = False) -> str:
        """Recipe, data set, seed, and at which step the weights are."""
        result = None if self.folder is None else read_run_record(self.folder)
        best = result and result.best
        step = (result and result.steps) if self.export == "last" else (best and best["step"])
        when = ["before training"] if untrained else [] if step is None else [f"step {step:,}"]
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


def _find_subject(run: str | None, recipe: str | None = None) -> Subject:
    if recipe is not None and run is not None:
        raise UserError("--run and --recipe: give one of them")
    if recipe is not None:
        check_choice("--recipe", recipe, list(RECIPES))
        return Subject(RECIPES[recipe](), None)
    folder, export = find_export(None) if run is None else Path(run), "best"
    if folder.parent.name == "export":
        folder, export = folder.parent.parent, folder.name
    if not (folder / CONFIG).exists():
        raise UserError(f"--run {folder}: no run there (it has no {CONFIG})")
    return Subject(read_config(folder / CONFIG), folder, export)


def _build(subject: Subject, untrained: bool = False) -> nn.Module:
    """The network with the run's exported weights, or with those that it began with."""
    if not untrained and subject.folder is not None:
        exported = subject.folder / "export" / subject.export
        trained = load_model(find_export(str(exported if exported.is_dir() else subject.folder)))
        if trained.warning is not None:
            Console().warn(trained.warning)
        return trained.model
    seed_initial_weights(subject.config.loop.seed)
    return build_network(subject.config, subject.info)


def _read_data(config: TrainConfig, data_dir: str | None) -> datasets.Dataset:
    """The run's data set, from the folder that is named now, or else from where the run had it."""
    wanted = datasets.relocate(config.data, None, data_dir)
    choice = datasets.choose(wanted)
    dataset = datasets.read(choice.name, wanted, choice.fallback_reason, config.image.image_size)
    for line in dataset.warnings:
        Console().warn(line)
    return dataset


if __name__ == "__main__":
    run_command(main, OPTIONS)
