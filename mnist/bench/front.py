"""The front: accuracy over training time of this project's recipes and of the usual MNIST scripts.

In: a data set, and docs/results.json for the recipes (`mnist.reproduce --publish` writes it). Out: rows; with --publish
docs/front.json, which holds the scripts, and the picture docs/pictures/front.png, whose points it carries as metadata.

The scripts are written anew here as small plain loops, with the network and the numbers that each documents, and with
the pipeline of each: a torchvision data set, transforms per image, a DataLoader; or arrays in memory. All shuffle.
Their times are of training alone, as ours are. Letters: B images in a batch.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist.bench.baselines import Job, find_device, usual_loader, usual_loop
from mnist.bench.report import Row, environment
from mnist.config import TrainConfig, evolve
from mnist.data.batches import Split
from mnist.data.sources import info_of
from mnist.data.transforms import BatchTransform
from mnist.plots.canvas import DPI, GREY, INK, LINES, PALE, add_axes, new_figure
from mnist.runs.console import count
from mnist.system.files import read_json, write_atomically, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCS = Path(__file__).parents[2] / "docs"
EVAL_BATCH = 1000
TICKS = (0.8, 0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.993, 0.995, 0.996, 0.997, 0.998)


@dataclass(frozen=True)
class Script:
    """A usual script: where it is documented, its network, and the numbers that it gives.

    Attributes:
        build: the network; images (B, 1, 28, 28) -> raw logits (B, 10), softmax being left to the loss.
        optimizer: its update rule, from parameters.
        num_train: images that it trains on; some hold the rest out.
        gamma: the learning rate is multiplied by it after each epoch.
        in_memory: the images are one float tensor in [0, 1], and batches are slices of it.
        is_prepared: everything passes through `accelerator.prepare`.
    """

    source: str
    build: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    batch_size: int
    epochs: int
    num_train: int = 60_000
    gamma: float = 1.0
    in_memory: bool = False
    is_prepared: bool = False


def _two_convolutions() -> nn.Module:
    """1,199,882 parameters."""
    features = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)]
    head = [nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)]
    return nn.Sequential(*features, *head)


def _two_pooled_convolutions() -> nn.Module:
    """34,826 parameters."""
    first = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Dropout(0.5), nn.Linear(1600, 10))


def _perceptron() -> nn.Module:
    """55,050 parameters."""
    first = [nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*first, nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))


SCRIPTS = {
    "pytorch/examples": Script(
        source="github.com/pytorch/examples, mnist/main.py",
        build=_two_convolutions,
        optimizer=partial(torch.optim.Adadelta, lr=1.0),
        batch_size=64,
        epochs=14,
        gamma=0.7,
    ),
    "Accelerate's tutorial": Script(
        source="huggingface.co/blog/pytorch-ddp-accelerate-transformers",
        build=_two_convolutions,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        batch_size=64,
        epochs=1,
        is_prepared=True,
    ),
    "Lightning's tutorial": Script(
        source="github.com/Lightning-AI/tutorials, mnist-hello-world",
        build=_perceptron,
        optimizer=partial(torch.optim.Adam, lr=2e-4),
        batch_size=64,
        epochs=3,
        num_train=55_000,
    ),
    "Keras' example": Script(
        source="keras.io/examples/vision/mnist_convnet (in PyTorch here)",
        build=_two_pooled_convolutions,
        optimizer=partial(torch.optim.Adam, lr=1e-3, eps=1e-7),
        batch_size=128,
        epochs=15,
        num_train=54_000,
        in_memory=True,
    ),
}


def measure(script: Script, config: TrainConfig, train: Split, test: Split, seed: int) -> tuple[float, float]:
    """Trains as the script does.

    Returns:
        Seconds of training, evaluation not included; the last weights' accuracy on `test`.
    """
    torch.manual_seed(seed)
    pixels = {"mean": (0.0,), "std": (1.0,)} if script.in_memory else {}
    changed = evolve(config, global_batch_size=script.batch_size, **pixels)
    job = Job(changed, train[: script.num_train], info_of("mnist"))
    model = script.build()
    batches = _Arrays(job.split, script.batch_size) if script.in_memory else usual_loader(job)
    optimizer = script.optimizer(model.parameters())
    train_epoch = usual_loop(model, optimizer, batches, F.cross_entropy, config.runtime, is_prepared=script.is_prepared)
    started = time.perf_counter()
    for _ in range(script.epochs):
        train_epoch()
        for group in optimizer.param_groups:
            group["lr"] *= script.gamma
    return time.perf_counter() - started, _accuracy(model.eval(), job, test)


class _Arrays:
    """Images in [0, 1] as one float tensor, in shuffled batches, as `fit` of Keras takes them."""

    def __init__(self, split: Split, batch_size: int) -> None:
        self.images = split.images.float().unsqueeze(1) / 255
        self.labels = split.labels
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.labels)).split(self.batch_size):
            yield self.images[rows], self.labels[rows]


@torch.inference_mode()
def _accuracy(model: nn.Module, job: Job, test: Split) -> float:
    transform, device, num_correct = BatchTransform(job.config.image), find_device(job.config.runtime), 0
    for start in range(0, len(test), EVAL_BATCH):
        batch = test[start : start + EVAL_BATCH]
        num_correct += int((model(transform(batch.images).to(device)).argmax(dim=1).cpu() == batch.labels).sum())
    return num_correct / len(test)


def measure_all(names: Iterable[str], config: TrainConfig, train: Split, test: Split, num_seeds: int) -> list[Row]:
    """A row per script, as docs/front.json holds them. The scripts take turns, seed by seed."""
    names = list(names)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for seed in range(num_seeds):
        for name in names:
            found[name].append(measure(SCRIPTS[name], config, train, test, seed))
    where = environment(config.runtime.num_threads, str(find_device(config.runtime)))
    return [
        {
            "script": name,
            "source": SCRIPTS[name].source,
            "dataset": config.data.dataset,
            "epochs": SCRIPTS[name].epochs,
            "accuracies": [accuracy for _, accuracy in results],
            "train_time_s": sum(seconds for seconds, _ in results) / len(results),
            "hardware": f"{where['cpu']}, {where['cores']} cores" if where["device"] == "cpu" else where["device"],
            "threads": where["threads"],
            "torch": where["torch"],
        }
        for name, results in found.items()
        if results
    ]


def points(results: dict[str, Any], scripts: dict[str, Any]) -> list[Row]:
    """What the picture shows, fastest first: recipes on a CPU with their accuracy on MNIST, and scripts.

    Args:
        results: docs/results.json.
        scripts: docs/front.json.
    """
    rows = [row for row in results["rows"] if row["device"] == "cpu"] + scripts["rows"]
    found = [
        {
            "name": (row.get("recipe") or row["script"]) + (" in bf16" if row.get("precision") == "bf16" else ""),
            "ours": "recipe" in row,
            "seconds": round(row["train_time_s"], 2),
            "accuracy": round(sum(row["accuracies"]) / len(row["accuracies"]), 5),
            "n": len(row["accuracies"]),
            "hardware": f"{row['hardware']}, {count(row['threads'], 'thread')}",
        }
        for row in rows
        if row["dataset"] == "mnist" and row["accuracies"]
    ]
    return sorted(found, key=lambda point: point["seconds"])


def publish(rows: list[Row], docs: Path = DOCS) -> None:
    """Replaces these rows in docs/front.json, and draws the picture anew."""
    path = docs / "front.json"
    old = read_json(path)["rows"] if path.exists() else []
    names = {row["script"] for row in rows}
    merged = {"rows": sorted([row for row in old if row["script"] not in names] + rows, key=lambda row: row["script"])}
    write_json(path, merged)
    draw(points(read_json(docs / "results.json"), merged), docs / "pictures" / "front.png")


def draw(shown: list[Row], path: Path) -> None:
    """The picture: a logarithmic axis of time, and accuracy by the logarithm of its error, which parts the best."""
    machines = sorted({point["hardware"] for point in shown})
    figure = new_figure(
        1000, 620, "Test accuracy on MNIST over seconds of training, on a CPU", "measured on " + "; ".join(machines)
    )
    axes = add_axes(figure, 70, 64, 900, 500)
    axes.set_xscale("log")
    axes.set_xlim(0.7 * shown[0]["seconds"], 8 * shown[-1]["seconds"])
    heights = [_height(point["accuracy"]) for point in shown]
    axes.set_ylim(min(heights) - 0.08, max(heights) + 0.12)
    ticks = [accuracy for accuracy in TICKS if min(heights) - 0.08 < _height(accuracy) < max(heights) + 0.12]
    axes.set_yticks([_height(accuracy) for accuracy in ticks], [f"{100 * accuracy:.3g} %" for accuracy in ticks])
    axes.set_xlabel("seconds of training, logarithmic", size=8.5, color=GREY)
    axes.grid(color=PALE, linewidth=0.5)
    best = [point for i, point in enumerate(shown) if all(p["accuracy"] < point["accuracy"] for p in shown[:i])]
    axes.step(
        [point["seconds"] for point in best],
        [_height(point["accuracy"]) for point in best],
        where="post",
        color=LINES[0],
        linewidth=1,
        alpha=0.5,
    )
    for is_ours, colour, label in ((True, LINES[0], "recipes of this project"), (False, LINES[1], "usual scripts")):
        own = [point for point in shown if point["ours"] is is_ours]
        seconds, heights = [p["seconds"] for p in own], [_height(p["accuracy"]) for p in own]
        axes.scatter(seconds, heights, color=colour, s=28, zorder=3, label=label)
    _name_points(axes, shown)
    axes.legend(loc="lower right", fontsize=8.5, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Description": json.dumps(shown)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def _height(accuracy: float) -> float:
    """Where an accuracy, a fraction, stands on the vertical axis."""
    return -math.log10(1 - accuracy)


def _name_points(axes: Axes, shown: list[Row]) -> None:
    """Writes each point's name, accuracy and n beside it, where no earlier name or other point lies."""
    places = axes.transData.transform([(p["seconds"], _height(p["accuracy"])) for p in shown])
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for (x, y), point in zip(places, shown, strict=True):
        text = f"{point['name']} {point['accuracy']:.2%}" + (f" (n={point['n']})" if point["n"] < 3 else "")
        width = 6.8 * len(text)  # about, in pixels
        offsets = [(8, dy) for dy in (-5, 4, -15, 14, -25, 24)] + [(-8 - width, dy) for dy in (-5, 8, -18)]
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + 11) for dx, dy in offsets]
        box = next((b for b in boxes if not any(_overlap(b, other) for other in taken)), boxes[0])
        taken.append(box)
        back = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        is_left = box[0] < x
        place, side = (box[2 if is_left else 0], box[1]), "right" if is_left else "left"
        axes.annotate(text, place, xycoords="figure pixels", fontsize=8, color=INK, bbox=back, ha=side, va="bottom")


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
