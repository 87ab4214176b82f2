"""The pictures of a run, from its configuration, its data and its network: what a finished training leaves to be seen.

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
from mnist.plots import pictures
from mnist.plots.curves import draw_curves
from mnist.plots.features import activations, filters, find_mistakes
from mnist.plots.history import History, read_history

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_SAMPLES = 100
ENDINGS = ("preempted", "failed", "diverged")  # of a run, those that its curves should tell of

Transform = Callable[[Tensor], Tensor]


def write_run_pictures(
    run_dir: Path,
    *,
    config: TrainConfig,
    dataset: Dataset,
    model: nn.Sequential,
    transform: Transform,
    augment: Augmentation,
    confusion: Sequence[Sequence[int]],
    step: int,
) -> dict[str, Path]:
    """Draws what a finished training has to show into `run_dir`/pictures; rank 0 alone calls it.

    Args:
        run_dir: holds metrics.jsonl.
        config: resolved.
        dataset: on the model's device.
        model: the bare network that was scored (under EMA the averaged one).
        transform: of the run.
        augment: likewise.
        confusion: of the test set.
        step: at which the scored weights were.

    Returns:
        The files by name: samples, curves, features, filters, confusion, mistakes.

    Raises:
        RunError: a file cannot be written.
    """
    title = title_of(config, dataset.name, f"step {step:,}")
    figures = {
        "samples": sample_figure(config, dataset, None if augment.is_identity else augment),
        "curves": curve_figure([read_history(run_dir)]),
        "features": feature_figure(dataset, model, transform, title),
        "filters": filter_figure(model, config.image.image_size, title),
        "confusion": pictures.draw_confusion(confusion, dataset.class_names, title),
        "mistakes": mistake_figure(dataset, model, transform, title),
    }
    paths = {name: run_dir / "pictures" / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        pictures.save_picture(figure, paths[name])
    return paths


def title_of(config: TrainConfig, dataset: str | None, *more: str) -> str:
    """What every picture says of the run it belongs to; no data set where the picture needs none."""
    name = config.recipe if dataset is None else f"{config.recipe} on {dataset}"
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
        changed = [augment(b.images, step, b.rows, b.global_batch_size) for step, b in enumerate(steps)]
        subtitle, augmented = f"{subtitle}; below each what the network is trained on", torch.cat(changed)[:count]
    title = title_of(config, dataset.name)
    return pictures.draw_samples(images, labels, dataset.class_names, title, subtitle, augmented=augmented)


def curve_figure(histories: Sequence[History]) -> Figure:
    """The curves of one run, or of several."""
    training = "training as it was optimised, with the label smoothing and augmentation of its recipe"
    if len(histories) > 1:
        title = f"{len(histories)} runs on {', '.join(dict.fromkeys(history.dataset for history in histories))}"
        return draw_curves(histories, title, f"strong: validation or test; pale: {training}")
    (history,) = histories
    status = history.result and history.result.status
    ending = f", {status}" if status in ENDINGS else ""
    title = f"{history.name} on {history.dataset}, step {history.last_step:,}{ending}"
    return draw_curves(histories, title, training)


def feature_figure(dataset: Dataset, model: nn.Sequential, transform: Transform, title: str, index: int = 0) -> Figure:
    """What test image `index` becomes from layer to layer."""
    outputs = activations(model, transform(dataset.test.images[index : index + 1]))
    names, label = dataset.class_names, int(dataset.test.labels[index])
    *_, logits = outputs.values()
    predicted = names[int(logits.argmax())]
    subtitle = f"test image {index}: true {names[label]}, predicted {predicted}; red above zero, blue below"
    return pictures.draw_features({name: output[0] for name, output in outputs.items()}, names, title, subtitle)


def filter_figure(model: nn.Sequential, image_size: int, title: str) -> Figure:
    """The first layer's filters, and those of small convolutions after it."""
    subtitle = "weights of the first layer, and of small convolutions after it; red above zero, blue below"
    return pictures.draw_filters(filters(model, image_size), title, subtitle)


def mistake_figure(dataset: Dataset, model: nn.Module, transform: Transform, title: str) -> Figure:
    """The worst mistakes on the test set."""
    mistakes = find_mistakes(model, transform, dataset.test.images, dataset.test.labels)
    return pictures.draw_mistakes(mistakes, dataset.class_names, title)
