"""What is logged where: metrics.jsonl always, W&B where it is configured, TensorBoard with --tensorboard.

In: records of a split at a step, pictures, exported models. Out: each record once in metrics.jsonl, none lost and none
doubled after a resume, and then in every sink. A sink that fails costs a warning, and nothing else; a metrics.jsonl
that cannot be written ends the run. All of this is done by rank 0; on other ranks a `Tracker` does nothing.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mnist.config import OutputConfig, check_choice
from mnist.errors import RunError, UserError
from mnist.runs.console import Console
from mnist.runs.setup import RunSetup
from mnist.runs.tracking.jsonl import RECORDS, JsonlFile
from mnist.runs.tracking.tensorboard import TensorBoardRun
from mnist.runs.tracking.wandb import NO_KEY, WandbRun, choose_mode
from mnist.system.accelerator import executed_precision

Hint = tuple[str, str]  # a word, and a command to type


class Sink(Protocol):
    """What a tracker of one's own must do; rank 0 alone calls it, and an error in it is a warning."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Takes numbers by name ("train/loss"), files of pictures (Path), and tables (lists of rows)."""

    def model(self, folder: Path, aliases: Sequence[str], metadata: dict[str, Any]) -> None:
        """Takes an exported model: model.safetensors and config.json."""

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Ends the run: finished, preempted, failed or diverged."""

    def hints(self) -> list[Hint]:
        """Says what to type next."""


# Name -> a sink of every run, from the run directory and the flat configuration. Here is the place for one's own.
SINKS: dict[str, Callable[[Path, dict[str, Any]], Sink]] = {}


def tracker_names(config: OutputConfig) -> list[str]:
    """The names under which Accelerate knows the trackers of this run; W&B's settings may still disable it.

    Raises:
        UserError: an unknown $WANDB_MODE; --tensorboard without TensorBoard, --wandb online or offline without W&B's
            package.
    """
    has_wandb = importlib.util.find_spec("wandb") is not None
    if config.wandb in ("online", "offline") and not has_wandb:
        raise UserError(f"--wandb {config.wandb}: the package is missing; pip install wandb")
    mode = os.environ.get("WANDB_MODE")
    if config.wandb == "auto" and mode:
        check_choice("WANDB_MODE", mode, ["online", "offline", "disabled", "shared", "dryrun", "run"])
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: the package is missing; pip install tensorboard")
    return ["wandb"] if has_wandb and config.wandb != "disabled" else []


class Tracker:
    """Passes records, pictures and models to metrics.jsonl and all sinks. On ranks other than 0 it does nothing."""

    def __init__(self, run_dir: Path | None, dataset: str, warn: Callable[[str], None]) -> None:
        self._dataset = dataset
        self._warn = warn
        self._jsonl = JsonlFile(run_dir / RECORDS) if run_dir is not None else None
        self._sinks: dict[str, Sink] = {}
        self._error: RunError | None = None

    @property
    def next_step(self) -> int:
        """The first step that no record is of yet."""
        return self._jsonl.last_step + 1 if self._jsonl is not None else 0

    def attach(self, name: str, start: Callable[[], Sink]) -> bool:
        """Starts a sink and adds it; says whether it did. `name` is what warnings call it."""
        return self._try(f"{name} did not start", lambda: self._sinks.update({name: start()}))

    def check(self) -> None:
        """Raises what `log` could not, on one rank among several: that its file was not written, or is gone."""
        if self._error is not None:
            raise self._error
        if self._jsonl is not None:
            self._jsonl.check()

    def log(self, split: str, step: int, epoch: float, **values: float) -> None:
        """Records values of one split at one step, once: a step that was recorded before a crash is skipped."""
        if self._jsonl is None or self._error is not None:
            return
        place = {"step": step, "epoch": round(epoch, 4), "split": split, "dataset": self._dataset}
        try:
            is_new = self._jsonl.append({**place, **values})
        except RunError as error:
            self._error = error
            return
        if is_new:
            points = {_point_name(split, name): value for name, value in values.items()}
            self._log("lacks points", step, {**points, "epoch": round(epoch, 4)})

    def pictures(self, step: int, paths: dict[str, Path]) -> None:
        """Shows PNG files."""
        for name, path in paths.items():
            self._log(f"lacks the picture {name}", step, {f"pictures/{name}": path})

    def confusion(self, step: int, counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> None:
        """Shows the confusion matrix of the test set."""
        table = [["true", *class_names], *([name, *row] for name, row in zip(class_names, counts, strict=True))]
        self._log("lacks the confusion matrix", step, {"test/confusion": table})

    def model(self, folder: Path, aliases: Sequence[str], metadata: dict[str, Any]) -> None:
        """Keeps an exported model."""
        self._each("lacks the model", lambda sink: sink.model(folder, aliases, metadata))

    def finish(self, status: str, summary: dict[str, Any]) -> list[Hint]:
        """Closes all sinks with the final numbers; says what to type next."""
        self._each("is incomplete", lambda sink: sink.finish(status, summary))
        return [hint for sink in self._sinks.values() for hint in sink.hints()]

    def _log(self, complaint: str, step: int, values: dict[str, Any]) -> None:
        self._each(complaint, lambda sink: sink.log(step, values))

    def _each(self, complaint: str, action: Callable[[Sink], None]) -> None:
        for name, sink in self._sinks.items():
            self._try(f"{name} {complaint}", partial(action, sink))

    def _try(self, complaint: str, action: Callable[[], None]) -> bool:
        """Does it, or says once that it failed: whatever a sink raises, training is not ended by it."""
        try:
            action()
        except (Exception, SystemExit) as error:
            self._warn(f"{complaint} ({_one_line(f'{type(error).__name__}: {error}')})")
            return False
        return True


def open_tracker(setup: RunSetup, run_config: dict[str, Any], console: Console) -> Tracker:
    """The tracker of a run, with W&B, TensorBoard and `SINKS` started as configured. Rank 0 alone calls it.

    Args:
        setup: of the run.
        run_config: what sinks show as the configuration: flat, with the run's environment.
        console: is told how W&B starts. Without an answer from its server the run is tracked offline.
    """
    path, config, accelerator = setup.directory.path, setup.config.output, setup.accelerator
    tracker = Tracker(path, setup.dataset.name, console.warn)
    tags = [setup.dataset.name, setup.config.optim.model, executed_precision(accelerator), f"w{setup.plan.world_size}"]
    start = partial(WandbRun, accelerator, config=config, run_dir=path, run_config=run_config, tags=tags)
    mode, reason = choose_mode(config)
    is_expected = reason is None or (reason == NO_KEY and config.wandb == "auto")
    (console.say if is_expected else console.warn)(f"W&B: {mode}" + (f" ({_one_line(reason)})" if reason else ""))
    for attempt in dict.fromkeys((mode, "offline")):
        if mode == "disabled" or tracker.attach(f"W&B ({attempt})", partial(start, mode=attempt)):
            break
    if config.tensorboard:
        tracker.attach("TensorBoard", partial(TensorBoardRun, path, tracker.next_step))
    for name, start_sink in SINKS.items():
        tracker.attach(name, partial(start_sink, path, run_config))
    return tracker


_PERFORMANCE = ("images_per_s", "epoch_time_s", "memory_mb")


def _point_name(split: str, name: str) -> str:
    return f"perf/{name}" if name.startswith(_PERFORMANCE) else f"{split}/{name}"


def _one_line(text: str) -> str:
    """A message on one line, its beginning and its end where it is long: the reason is in one of them."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-150:]}"
