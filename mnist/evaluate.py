"""Scores an exported model: the numbers of its training again, class by class.

    python -m mnist.evaluate                                   the newest run, on the test set it was scored on
    python -m mnist.evaluate --run runs/a --dataset kmnist     another data set
    python -m mnist.evaluate --run runs/a --versus runs/b      two models on the same images
    accelerate launch -m mnist.evaluate --evaluation sharded   on all processes

In: a run directory or an exported folder. Out: accuracy, loss, a table of classes, the confusion matrix; of two models,
how many images only one of them gets right, and McNemar's exact test.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from mnist.cli import RunOption, parse_options, run_command
from mnist.config import DataConfig, DatasetName, Evaluation, Precision, RuntimeConfig
from mnist.errors import UserError
from mnist.system.process import num_usable_cores


@dataclass(frozen=True)
class Options:
    """What is scored, and on what."""

    run: RunOption = None
    """Run directory, or folder with an exported model; default: the newest finished run."""
    dataset: DatasetName | None = None
    """Default: the data set it was trained on."""
    data_dir: str | None = None
    """Default: $MNIST_DATA_DIR, else the folder it was trained from."""
    split: Literal["test", "val", "train"] = "test"
    """Which images (val: those that its training held out)."""
    evaluation: Evaluation = "rank0"
    """Rank 0 scores everything, or every rank a share."""
    mixed_precision: Precision | None = None
    """Default: that of its training, but no (fp32) where fp16 has no GPU."""
    num_threads: int = 0
    """CPU threads per process; 0 = as in its training, where this machine has so many cores for each."""
    cpu: bool = False
    """Evaluate on the CPU even where there is a GPU."""
    per_batch: bool = False
    """Also the accuracy of each batch of 1,000 images, and of all images so far."""
    json: bool = False
    """Print one JSON object instead of tables."""
    versus: str | None = None
    """Another run directory or exported model, to be compared on the same images."""

    def __post_init__(self) -> None:
        if self.versus is not None and self.evaluation == "sharded":
            raise UserError("--versus: needs --evaluation rank0, where one rank sees all images")
        if self.per_batch and self.evaluation == "sharded":
            raise UserError("--per-batch: needs --evaluation rank0, where one rank sees all batches, in their order")


if __name__ == "__main__":
    OPTIONS = parse_options(
        Options, "evaluate", __doc__, has_ranks=True
    )  # before torch is imported: --help answers at once

import torch
from accelerate import Accelerator
from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from mnist.data import datasets
from mnist.data.batches import Split
from mnist.data.datasets import Dataset
from mnist.data.sources import DatasetInfo
from mnist.runs.console import Console
from mnist.runs.export import TrainedModel, find_export, load_model
from mnist.runs.records import Numbers, read_run_record
from mnist.system.accelerator import open_accelerator
from mnist.training.evaluation import evaluate
from mnist.training.losses import build_loss
from mnist.training.metrics import Scores


def main(options: Options) -> int:
    """Scores one model or two, and prints how they did. Every rank must call this."""
    trained = load_model(find_export(options.run))
    other = None if options.versus is None else load_model(find_export(options.versus, "--versus"), "--versus")
    config = datasets.relocate(trained.config.data, options.dataset, options.data_dir)
    with open_accelerator(_runtime_here(trained.config.runtime, options)) as accelerator:
        console = Console(accelerator.is_main_process)
        dataset = _load_for(trained, config, accelerator)
        split = _split_of(dataset, options)
        theirs = split if other is None else _split_of(_load_for(other, config, accelerator, "--versus"), options)
        for line in (*(model.warning for model in (trained, other) if model), *dataset.warnings):
            if line is not None:
                console.warn(line)
        scores, batches, is_correct = _score(trained, split, accelerator, options)
        report = Report(trained, dataset.name, options.split, dataset.class_names, scores, batches)
        if other is not None:
            other_scores, _, other_is_correct = _score(other, theirs, accelerator, options)
            report = replace(report, versus=Comparison.of(other, other_scores, is_correct, other_is_correct))
        if accelerator.is_main_process:
            sys.stdout.write(report.as_json() if options.json else report.as_text())
    return 0


def _load_for(trained: TrainedModel, config: DataConfig, accelerator: Accelerator, flag: str = "--run") -> Dataset:
    """The images as this network takes them: own pictures in its size and channels. Every rank must call this."""
    if config.dataset == "folder":
        config = replace(config, channels=trained.info.in_channels)
    dataset = datasets.load(config, accelerator, trained.config.image.image_size)
    check_fits(trained.info, dataset, flag)
    return dataset


def _split_of(dataset: Dataset, options: Options) -> Split:
    split = {"test": dataset.test, "val": dataset.val, "train": dataset.train}[options.split]
    if split is None:
        raise UserError("--split val: no images were held out when this model was trained; choose test or train")
    return split


def _score(
    trained: TrainedModel, split: Split, accelerator: Accelerator, options: Options
) -> tuple[Scores, list[tuple[int, int]], Tensor]:
    """Scores a model. Every rank must call this.

    Returns:
        Its scores; images right and images scored up to the end of each batch, where --per-batch asks for them; and
        whether each image was right, bool (N,), where two models are compared (else empty).
    """
    batches: list[tuple[int, int]] = []
    num_classes = trained.info.num_classes
    predictions: list[Tensor] = []

    def watch(counts: Tensor) -> None:
        bar.update(task, completed=int(counts.sum()))
        if options.per_batch:
            batches.append((int(counts.view(num_classes, num_classes).trace()), int(counts.sum())))

    placed = trained.model.to(accelerator.device)  # to place it, Accelerate would first import much, for 0.4 s
    model = accelerator.prepare_model(placed, device_placement=False, evaluation_mode=True)  # without DDP
    if options.versus is not None:
        model.register_forward_hook(lambda _model, _images, logits: predictions.append(logits.argmax(dim=1)))
    with Progress(console=RichConsole(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(options.split, total=len(split))
        scores = evaluate(
            model,
            split,
            num_classes=num_classes,
            accelerator=accelerator,
            loss_fn=build_loss(trained.config.optim.loss),
            transform=trained.transform,
            sharded=options.evaluation == "sharded",
            after_chunk=watch if options.per_batch or not bar.disable else None,
        )
    is_correct = torch.cat(predictions) == split.labels if predictions else torch.empty(0, dtype=torch.bool)
    return scores, batches, is_correct


def check_fits(info: DatasetInfo, dataset: Dataset, flag: str = "--run") -> None:
    """Checks that a network, which `flag` names, can be scored on a data set.

    Raises:
        UserError: it has another number of channels or of classes, or, people's own pictures, other classes.
    """
    but = "but the model was trained for" if flag == "--run" else f"but the model of {flag} was trained for"
    theirs = (info.in_channels, info.num_classes)
    found = (dataset.info.in_channels, dataset.info.num_classes)
    for expected, number, what in zip(theirs, found, ("channels", "classes"), strict=True):
        if number != expected:
            raise UserError(f"--dataset {dataset.name}: has {number} {what}, {but} {expected}")
    if dataset.name == "folder" and dataset.class_names != info.class_names:
        names, known = ", ".join(dataset.class_names), ", ".join(info.class_names)
        raise UserError(f"--dataset folder: has the classes {names}, {but} {known}")


def _runtime_here(trained: RuntimeConfig, options: Options) -> RuntimeConfig:
    """The settings of the training, as far as this machine has what they need."""
    precision = options.mixed_precision or trained.mixed_precision
    if options.mixed_precision is None and precision == "fp16" and (options.cpu or not torch.cuda.is_available()):
        precision = "no"
    share = num_usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = options.num_threads or (trained.num_threads if trained.num_threads <= share else 0)
    return replace(trained, mixed_precision=precision, num_threads=threads, cpu=options.cpu)


@dataclass(frozen=True)
class Comparison:
    """Another model on the same images: its scores, and the images that only one of the two models gets right."""

    trained: TrainedModel
    scores: Scores
    only_first: int
    only_second: int

    @classmethod
    def of(cls, other: TrainedModel, scores: Scores, first: Tensor, second: Tensor) -> Comparison:
        """From whether each image was right, bool (N,), for the first model and for the other."""
        return cls(other, scores, int((first & ~second).sum()), int((second & ~first).sum()))

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided: how likely so uneven a split is where both models are equally good."""
        return mcnemar(self.only_first, self.only_second)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        counts = {"only_first_correct": self.only_first, "only_versus_correct": self.only_second}
        return {"model": str(self.trained.folder), **self.scores.as_dict(), **counts, "p_value": self.p_value}

    def as_text(self) -> str:
        """Two lines."""
        line = f"versus {self.trained.folder}: accuracy {self.scores.accuracy:.2%}\nimages that one model alone gets "
        line += f"right: {self.only_first} the first, {self.only_second} the other; "
        verdict = "they differ" if self.p_value < 0.05 else "no difference shown"
        return f"{line}McNemar's exact test p = {self.p_value:.3g}: {verdict}\n"


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided exact p-value of McNemar's test: a fair coin's, for that many heads and tails."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    p_value: float = 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    return min(1.0, p_value)


@dataclass(frozen=True)
class Report:
    """How a trained model did on a split.

    `batches` has the images that were right, and those that were scored, up to the end of each batch; empty where this
    was not asked for.
    """

    trained: TrainedModel
    dataset: str
    split: str
    class_names: tuple[str, ...]
    scores: Scores
    batches: Sequence[tuple[int, int]] = ()
    versus: Comparison | None = None

    def as_trained(self) -> Numbers | None:
        """The training's own scores of these weights on this split; None where it has none."""
        if self.trained.folder.name != "best" or self.split != "test":
            return None
        result = read_run_record(self.trained.folder.resolve().parents[1])
        return result.test if result is not None and result.dataset == self.dataset else None

    def as_json(self) -> str:
        """One object: scores, accuracy per class, confusion matrix, and the training's own scores."""
        content = {
            "model": str(self.trained.folder),
            "dataset": self.dataset,
            "split": self.split,
            **self.scores.as_dict(),
            "accuracy_per_class": dict(zip(self.class_names, self.scores.accuracy_per_class, strict=True)),
            "confusion": self.scores.confusion,
            "as_trained": self.as_trained(),
        }
        if self.versus is not None:
            content["versus"] = self.versus.as_dict()
        if self.batches:
            content["accuracy_per_batch"] = [batch for batch, _ in self._batch_accuracies()]
            content["accuracy_so_far"] = [so_far for _, so_far in self._batch_accuracies()]
        return json.dumps(content, indent=2) + "\n"

    def as_text(self) -> str:
        """A line per batch, and a table with a row per class: its accuracy, and the predicted classes of its images."""
        lines = ""
        for (batch, so_far), (_, scored) in zip(self._batch_accuracies(), self.batches, strict=True):
            lines += f"{scored:>6,} images: accuracy of this batch {batch:7.2%}, so far {so_far:7.2%}\n"
        table = Table("class", "accuracy", *self.class_names, box=SIMPLE_HEAD, pad_edge=False)
        table.title = "rows: true class, columns: predicted class"
        scores = self.scores
        for name, accuracy, row in zip(self.class_names, scores.accuracy_per_class, scores.confusion, strict=True):
            shown = "-" if accuracy is None else f"{accuracy:.2%}"
            table.add_row(name, shown, *(str(count) if count else "" for count in row))
        for column in table.columns[1:]:
            column.justify = "right"
        console = RichConsole(
            width=200, markup=False, emoji=False
        )  # a terminal may wrap long class names; nothing is cut
        with console.capture() as captured:
            console.print(table)
        versus = "" if self.versus is None else self.versus.as_text()
        return lines + captured.get() + self._closing_line() + versus

    def _batch_accuracies(self) -> list[tuple[float, float]]:
        """Of each batch: its own accuracy, and that of all images so far."""
        ends = [(0, 0), *self.batches]
        return [((c - b) / (n - m), c / n) for (b, m), (c, n) in pairwise(ends)]

    def _closing_line(self) -> str:
        scores, trained = self.scores, self.as_trained()
        line = f"{self.dataset} {self.split}: accuracy {scores.accuracy:.2%}"
        line += f" ({scores.num_correct:,}/{scores.num_samples:,}), loss {scores.loss:.4f}"
        if trained is not None:
            is_same = (trained["num_correct"], trained["loss"]) == (scores.num_correct, scores.loss)
            theirs = f", in training {trained['num_correct']:,} and {trained['loss']}"
            line += ", exactly as in training" if is_same else theirs
        return f"{line}\n{self.trained.folder}\n"


if __name__ == "__main__":
    run_command(main, OPTIONS)
