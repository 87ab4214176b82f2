"""What is drawn: a run, finished or not, or a recipe that has not been run; and where its picture goes.

In: what --run, --recipe and --data-dir say. Out: a `Subject`: configuration, images, network, title, path.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from mnist.config import TrainConfig, check_choice
from mnist.data import datasets
from mnist.data.sources import DatasetInfo, info_of
from mnist.data.transforms import BatchTransform
from mnist.errors import UserError
from mnist.models import seed_initial_weights
from mnist.plots import pictures, run_pictures
from mnist.recipes import RECIPES
from mnist.runs.console import Console
from mnist.runs.export import CONFIG, find_export, load_model, read_info
from mnist.runs.records import read_config, read_run_record
from mnist.training.build import build_network


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
    folder: Path | None
    weights: Path | None
    untrained: bool

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
            return picture_path(out, Path(), f"{self.config.recipe}-{name}")
        return picture_path(out, self.folder / "pictures", name)


def picture_path(out: str | None, folder: Path, name: str) -> Path:
    """`out`, or a .png of this name in `folder`; raises a UserError where `out` has another suffix than a picture's."""
    if out is not None and Path(out).suffix not in pictures.SUFFIXES:
        raise UserError(f"--out {out}: must end in {', '.join(pictures.SUFFIXES)}")
    return folder / f"{name}.png" if out is None else Path(out)


def find_subject(
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
