"""The pictures of a run, from its configuration, its data and its network.

In: the pieces that a run holds, or that `mnist.plots` has read back. Out: figures, and `write_run_pictures` -> files.
No global random state is drawn from or changed, and networks stay in the mode that they are in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mnist.config import TrainConfig
from mnist.data.batches import TrainLoader
from mnist.data.datasets import Dataset
from mnist.data.transforms import Augmentation
from mnist.errors import UserError
from mnist.plots import pictures
from mnist.plots.canvas import fit
from mnist.plots.curves import draw_curves
from mnist.plots.features import activations, filters, find_mistakes, main_activations
from mnist.plots.history import History, read_history
from mnist.recipes import run_name
from mnist.runs.setup import RunSetup
from mnist.system.files import refuse_symlink
from mnist.training.metrics import Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_SAMPLES = 100
ENDINGS = ("preempted", "failed", "diverged")  # of a run, those that its curves should tell of

Transform = Callable[[Tensor], Tensor]


def write_run_pictures(setup: RunSetup, scores: Scores, step: int, warn: Callable[[str], None]) -> dict[str, Path]:
    """Draws what a finished training has to show into the pictures/ of its directory; rank 0 alone calls it.

    Args:
        setup: of the run, whose network has the weights that were scored.
        scores: of the test set.
        step: at which the scored weights were.
        warn: is told of each picture that could not be drawn or written; the others are.

    Returns:
        The files by name: samples, curves, features, filters, confusion, mistakes.
    """
    config, dataset, folder = setup.config, setup.dataset, setup.directory.path / "pictures"
    model, transform, augment = setup.train_step.eval_model, setup.train_step.transform, setup.train_step.augment
    title, size = title_of(config, dataset.name, f"step {step:,}"), config.image.image_size
    drawings: dict[str, Callable[[], Figure]] = {
        "samples": lambda: sample_figure(config, dataset, None if augment.is_identity else augment),
        "curves": lambda: curve_figure([read_history(setup.directory.path)]),
        "features": lambda: feature_figure(dataset, model, transform, title),
        "filters": lambda: filter_figure(model, (dataset.info.in_channels, size, size), title),
        "confusion": lambda: pictures.draw_confusion(scores.confusion, dataset.class_names, title),
        "mistakes": lambda: mistake_figure(dataset, model, transform, title),
    }
    paths: dict[str, Path] = {}
    try:
        refuse_symlink(folder)
    except UserError as error:
        warn(f"no pictures: {error}")
        return paths
    for name, draw in drawings.items():
        try:
            paths[name] = pictures.save_picture(draw(), folder / f"{name}.png")
        except Exception as error:  # a full disk, a GPU without room, a network that cannot be drawn
            warn(f"picture {name} not drawn: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return paths


def title_of(config: TrainConfig, dataset: str | None, *more: str) -> str:
    """What every picture says of the run it belongs to; no data set where the picture needs none."""
    name = run_name(config) if dataset is None else f"{run_name(config)} on {dataset}"
    return ", ".join([name, f"seed {config.loop.seed}", *more])


def sample_figure(config: TrainConfig, dataset: Dataset, augment: Augmentation | None) -> Figure:
    """The first hundred training images in the order of training; with `augment`, fifty, and what becomes of them."""
    count = NUM_SAMPLES if augment is None else NUM_SAMPLES // 2
    batch = config.loop.global_batch_size
    loader = TrainLoader(dataset.train, global_batch_size=batch, seed=config.loop.seed)
    steps = [micro_batches[0] for micro_batches in loader.steps(0, math.ceil(count / batch))]
    images, labels = (torch.cat([getattr(b, name) for b in steps])[:count] for name in ("images", "labels"))
    subtitle, augmented = f"the first {len(labels)} training images, in the order of training", None
    if augment is not None:
        changed = [augment(b.images, step, b.rows) for step, b in enumerate(steps)]
        subtitle, augmented = f"{subtitle}; below each what the network is trained on", torch.cat(changed)[:count]
    title = title_of(config, dataset.name)
    return pictures.draw_samples(images, labels, dataset.class_names, title, subtitle, augmented=augmented)


def curve_figure(histories: Sequence[History]) -> Figure:
    """The curves of one run, or of several."""
    if len(histories) > 1:
        title = f"{len(histories)} runs on {' and '.join(dict.fromkeys(history.dataset for history in histories))}"
        return draw_curves(
            histories, title, "strong: validation or test; pale: training, the mean since the last record"
        )
    (history,) = histories
    ending = f", {history.status}" if history.status in ENDINGS else ""
    title = f"{history.name} on {history.dataset}, step {history.last_step:,}{ending}"
    subtitle = "training: the mean since the last record; validation and test: the whole set"
    subtitle += "; the training loss includes label smoothing" if history.is_smoothed else ""
    return draw_curves(histories, title, subtitle)


def feature_figure(
    dataset: Dataset,
    model: nn.Module,
    transform: Transform,
    title: str,
    indices: Sequence[int] = (0,),
    *,
    every_layer: bool = False,
) -> Figure:
    """What test images become from layer to layer."""
    outputs = activations(model, transform(dataset.test.images[list(indices)]))
    *_, logits = outputs.values()
    names = dataset.class_names
    short = [fit(name, 160, 8) for name in names]
    true, predicted = ([short[k] for k in ks.tolist()] for ks in (dataset.test.labels[list(indices)], logits.argmax(1)))
    facts = zip(indices, true, predicted, strict=True)
    captions = [f"test image {index}: true {label}, predicted {guess}" for index, label, guess in facts]
    subtitle = f"{captions[0]}; red above zero, blue below"
    if len(indices) > 1:
        subtitle = f"{len(indices)} test images, a row each; red above zero, blue below"
    shown = outputs if every_layer else main_activations(outputs)
    return pictures.draw_features(shown, names, title, subtitle, captions)


def filter_figure(model: nn.Module, image_shape: tuple[int, int, int], title: str) -> Figure:
    """The first layer's filters, and those of small convolutions after it."""
    subtitle = "weights of the first layer, and of small convolutions after it; red above zero, blue below"
    return pictures.draw_filters(filters(model, image_shape), title, subtitle)


def mistake_figure(dataset: Dataset, model: nn.Module, transform: Transform, title: str) -> Figure:
    """The worst mistakes on the test set."""
    found = find_mistakes(model, transform, dataset.test)
    return pictures.draw_mistakes(dataset.test, found, dataset.class_names, title)
