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
from dataclasses import dataclass, replace
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
from torch import Tensor, nn

from mnist.data import datasets
from mnist.data.batches import Split
from mnist.data.datasets import Dataset
from mnist.data.sources import DatasetInfo
from mnist.runs.console import Console
from mnist.runs.export import TrainedModel, find_export, load_model
from mnist.runs.records import Numbers, read_run_record
from mnist.system.accelerator import open_accelerator
from mnist.training.evaluation import EVAL_CHUNK, evaluate
from mnist.training.losses import build_loss
from mnist.training.metrics import Scores


@dataclass(frozen=True)
class Scored:
    """A model's scores on a split, and whether each image was right, bool (N,); empty on ranks that saw not all."""

    trained: TrainedModel
    scores: Scores
    is_correct: Tensor

    def batches(self) -> list[tuple[int, float, float]]:
        """Of each batch: images up to its end, its own accuracy, and that of all images so far."""
        rows, num_correct, end = [], 0, 0
        for batch in self.is_correct.split(EVAL_CHUNK):
            correct, end = int(batch.sum()), end + len(batch)
            num_correct += correct
            rows.append((end, correct / len(batch), num_correct / end))
        return rows


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
        scored = _score(trained, split, accelerator, options)
        versus = None if other is None else _score(other, theirs, accelerator, options)
        if accelerator.is_main_process:
            report = Report(dataset, options, scored, versus)
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


def _score(trained: TrainedModel, split: Split, accelerator: Accelerator, options: Options) -> Scored:
    """Scores a model. Every rank must call this."""
    predictions: list[Tensor] = []

    def watch(_model: nn.Module, _images: tuple[Tensor, ...], logits: Tensor) -> None:
        predictions.append(logits.argmax(dim=1))
        bar.advance(task, len(logits))

    placed = trained.model.to(accelerator.device)  # to place it, Accelerate would first import much, for 0.4 s
    model = accelerator.prepare_model(placed, device_placement=False, evaluation_mode=True)  # without DDP
    model.register_forward_hook(watch)
    with Progress(console=RichConsole(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(options.split, total=len(split))
        scores = evaluate(
            model,
            split,
            num_classes=trained.info.num_classes,
            accelerator=accelerator,
            loss_fn=build_loss(trained.config.optim.loss),
            transform=trained.transform,
            sharded=options.evaluation == "sharded",
        )
    has_seen_all = accelerator.is_main_process and options.evaluation == "rank0"
    is_correct = torch.cat(predictions) == split.labels if has_seen_all else torch.empty(0, dtype=torch.bool)
    return Scored(trained, scores, is_correct)


def check_fits(info: DatasetInfo, dataset: Dataset, flag: str = "--run") -> None:
    """Checks that a network, which `flag` names, can be scored on a data set.

    Raises:
        UserError: it has another number of channels or of classes, or, people's own pictures, other classes.
    """
    but = "but the model was trained for" if flag == "--run" else f"but the model of {flag} was trained for"
    channels = ("channels", dataset.info.in_channels, info.in_channels)
    for what, number, expected in (channels, ("classes", dataset.info.num_classes, info.num_classes)):
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
class Report:
    """How one model, or two, did on the images that `options` asks for."""

    dataset: Dataset
    options: Options
    scored: Scored
    versus: Scored | None = None

    def as_trained(self) -> Numbers | None:
        """The training's own scores of these weights on this split; None where it has none."""
        folder = self.scored.trained.folder
        if folder.name != "best" or self.options.split != "test":
            return None
        result = read_run_record(folder.resolve().parents[1])
        return result.test if result is not None and result.dataset == self.dataset.name else None

    def as_json(self) -> str:
        """One object: scores, accuracy per class, confusion matrix, and the training's own scores."""
        scores = self.scored.scores
        content: dict[str, Any] = {
            "model": str(self.scored.trained.folder),
            "dataset": self.dataset.name,
            "split": self.options.split,
            **scores.as_dict(),
            "accuracy_per_class": dict(zip(self.dataset.class_names, scores.accuracy_per_class, strict=True)),
            "confusion": scores.confusion,
            "as_trained": self.as_trained(),
        }
        if self.versus is not None:
            other, comparison = self.versus, compare(self.scored.is_correct, self.versus.is_correct)
            content["versus"] = {"model": str(other.trained.folder), **other.scores.as_dict(), **comparison}
        if self.options.per_batch:
            _, content["accuracy_per_batch"], content["accuracy_so_far"] = zip(*self.scored.batches(), strict=True)
        return json.dumps(content, indent=2) + "\n"

    def as_text(self) -> str:
        """A line per batch, and a table with a row per class: its accuracy, and the predicted classes of its images."""
        lines = ""
        for end, rate, so_far in self.scored.batches() if self.options.per_batch else []:
            lines += f"{end:>6,} images: accuracy of this batch {rate:7.2%}, so far {so_far:7.2%}\n"
        names, scores = self.dataset.class_names, self.scored.scores
        table = Table("class", "accuracy", *names, box=SIMPLE_HEAD, pad_edge=False)
        table.title = "rows: true class, columns: predicted class"
        for name, accuracy, row in zip(names, scores.accuracy_per_class, scores.confusion, strict=True):
            shown = "-" if accuracy is None else f"{accuracy:.2%}"
            table.add_row(name, shown, *(str(count) if count else "" for count in row))
        for column in table.columns[1:]:
            column.justify = "right"
        console = RichConsole(width=200, markup=False, emoji=False)  # a terminal may wrap long names; nothing is cut
        with console.capture() as captured:
            console.print(table)
        return lines + captured.get() + self._closing_lines()

    def _closing_lines(self) -> str:
        scores, trained = self.scored.scores, self.as_trained()
        line = f"{self.dataset.name} {self.options.split}: accuracy {scores.accuracy:.2%}"
        line += f" ({scores.num_correct:,}/{scores.num_samples:,}), loss {scores.loss:.4f}"
        if trained is not None:
            is_same = (trained["num_correct"], trained["loss"]) == (scores.num_correct, scores.loss)
            theirs = f", in training {trained['num_correct']:,} and {trained['loss']}"
            line += ", exactly as in training" if is_same else theirs
        lines = [line, str(self.scored.trained.folder)]
        if self.versus is not None:
            only_first, only_second, p_value = compare(self.scored.is_correct, self.versus.is_correct).values()
            verdict = "they differ" if p_value < 0.05 else "no difference shown"
            found = f"images that one model alone gets right: {only_first} the first, {only_second} the other"
            lines += [
                f"versus {self.versus.trained.folder}: accuracy {self.versus.scores.accuracy:.2%}",
                f"{found}; McNemar's exact test p = {p_value:.3g}: {verdict}",
            ]
        return "\n".join(lines) + "\n"


def compare(first: Tensor, second: Tensor) -> dict[str, float]:
    """Two models, from whether each image was right, bool (N,): images that one alone gets right, and the p-value."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    p_value = mcnemar(only_first, only_second)
    return {"only_first_correct": only_first, "only_versus_correct": only_second, "p_value": p_value}


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided exact p-value of McNemar's test: how likely so uneven a split is where both models are as good."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    p_value: float = 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    return min(1.0, p_value)


if __name__ == "__main__":
    run_command(main, OPTIONS)
