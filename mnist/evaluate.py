"""Scores an exported model: the numbers of its training again, class by class.

    python -m mnist.evaluate                                   the newest run, on the test set it was scored on
    python -m mnist.evaluate --run runs/a --dataset kmnist     another data set
    accelerate launch -m mnist.evaluate --evaluation sharded   on all processes

In: a run directory or an exported folder. Out: accuracy, loss, a table of classes, the confusion matrix.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from mnist.cli import RunOption, parse_options, run_command
from mnist.config import DatasetName, Evaluation, Precision, RuntimeConfig
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

    def __post_init__(self) -> None:
        if self.per_batch and self.evaluation == "sharded":
            raise UserError("--per-batch: needs --evaluation rank0, where one rank sees all batches, in their order")


if __name__ == "__main__":
    OPTIONS = parse_options(
        Options, "evaluate", __doc__, has_ranks=True
    )  # before torch is imported: --help answers at once

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from mnist.data import datasets
from mnist.runs.console import Console
from mnist.runs.export import TrainedModel, find_export, load_model
from mnist.runs.records import ScoreRecord, read_result
from mnist.system.accelerator import open_accelerator
from mnist.training.evaluation import evaluate
from mnist.training.losses import build_loss
from mnist.training.metrics import NUM_CLASSES, Scores


def main(options: Options) -> int:
    """Scores a model and prints how it did. Every rank must call this."""
    trained = load_model(find_export(options.run))
    config = datasets.relocate(trained.config.data, options.dataset, options.data_dir)
    with open_accelerator(_settle_runtime(trained.config.runtime, options)) as accelerator:
        console = Console(accelerator.is_main_process)
        dataset = datasets.load(config, accelerator)
        if trained.warning is not None:
            console.warn(trained.warning)
        split = {"test": dataset.test, "val": dataset.val, "train": dataset.train}[options.split]
        if split is None:
            raise UserError("--split val: no images were held out when this model was trained; choose test or train")
        for line in dataset.warnings:
            console.warn(line)
        prepared = accelerator.prepare_model(trained.model, evaluation_mode=True)
        batches: list[tuple[int, int]] = []

        def watch(counts: Tensor) -> None:
            bar.update(task, completed=int(counts.sum()))
            if options.per_batch:
                batches.append((int(counts.view(NUM_CLASSES, NUM_CLASSES).trace()), int(counts.sum())))

        with Progress(console=RichConsole(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task(options.split, total=len(split))
            scores = evaluate(
                accelerator.unwrap_model(prepared),
                split,
                accelerator=accelerator,
                loss_fn=build_loss(trained.config.optim.loss),
                transform=trained.transform,
                sharded=options.evaluation == "sharded",
                after_chunk=watch if options.per_batch or not bar.disable else None,
            )
        if accelerator.is_main_process:
            report = Report(trained, dataset.name, options.split, dataset.class_names, scores, batches)
            sys.stdout.write(report.as_json() if options.json else report.as_text())
    return 0


def _settle_runtime(trained: RuntimeConfig, options: Options) -> RuntimeConfig:
    """The settings of the training, as far as this machine has what they need."""
    precision = options.mixed_precision or trained.mixed_precision
    if options.mixed_precision is None and precision == "fp16" and (options.cpu or not torch.cuda.is_available()):
        precision = "no"
    share = num_usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = options.num_threads or (trained.num_threads if trained.num_threads <= share else 0)
    return replace(trained, mixed_precision=precision, num_threads=threads, cpu=options.cpu)


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

    def as_trained(self) -> ScoreRecord | None:
        """The training's own scores of these weights on this split; None where it has none."""
        if self.trained.folder.name != "best" or self.split != "test":
            return None
        result = read_result(self.trained.folder.resolve().parents[1])
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
        console = RichConsole(width=200)  # a terminal may wrap long class names, but nothing is cut
        with console.capture() as captured:
            console.print(table)
        return lines + captured.get() + self._closing_line()

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
