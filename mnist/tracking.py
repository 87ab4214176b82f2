"""What is logged where: metrics.jsonl always, W&B where it can be had, TensorBoard where it is asked for.

In: records of a split at a step, pictures, exported models. Out: each record once in metrics.jsonl, none lost and none
doubled after a resume, and from there in every sink (what a sink has not written when it is killed, it lacks). Whatever
a sink does, it costs a warning, and the sink is dropped; a disk that has no room for metrics.jsonl ends the run. All
happens on rank 0; elsewhere `Tracker` is a null object.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate import Accelerator

from mnist.config import OutputConfig, RunError, UserError, check_choice
from mnist.wandb_run import PROBE_TIMEOUT_S, Counts, WandbRun, server_answers, wandb_mode

Warn = Callable[[str], None]
Hint = tuple[str, str]  # a word, and a command to type


class Sink(Protocol):
    """Something beside metrics.jsonl that takes what is logged."""

    def log(self, step: int, points: dict[str, float]) -> None:
        """Values by name at a step."""

    def pictures(self, step: int, paths: dict[str, Path]) -> None:
        """PNG files by name."""

    def confusion(self, step: int, counts: Counts, class_names: Sequence[str]) -> None:
        """Confusion matrix of the test set, a row per true class."""

    def model(self, folder: Path, aliases: Sequence[str], metadata: dict[str, Any]) -> None:
        """An exported model."""

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """The end."""

    def hints(self) -> list[Hint]:
        """What to type next."""


def tracker_names(config: OutputConfig) -> list[str]:
    """The names under which Accelerate knows the trackers of this run.

    Raises:
        UserError: an unknown $WANDB_MODE; --tensorboard without TensorBoard, --wandb online or offline without W&B's
            package.
    """
    if config.wandb in ("online", "offline") and importlib.util.find_spec("wandb") is None:
        raise UserError(f"--wandb {config.wandb}: the package is missing; pip install wandb")
    mode = os.environ.get("WANDB_MODE")
    if config.wandb == "auto" and mode:
        check_choice("WANDB_MODE", mode, ["online", "offline", "disabled", "shared", "dryrun", "run"])
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: the package is missing; pip install tensorboard")
    return [] if wandb_mode(config) == "disabled" else ["wandb"]


class Tracker:
    """Receives what is worth keeping. On ranks other than 0 every method does nothing."""

    def __init__(self, run_dir: Path | None, dataset: str, warn: Warn) -> None:
        self._dataset = dataset
        self._warn = warn
        self._jsonl = JsonlFile(run_dir / "metrics.jsonl") if run_dir is not None else None
        self._sinks: dict[str, Sink] = {}
        self._error: RunError | None = None

    def start_wandb(
        self,
        accelerator: Accelerator,
        config: OutputConfig,
        run_dir: Path,
        run_config: dict[str, Any],
        tags: list[str],
    ) -> None:
        """Starts, or continues, the one W&B run of this job. Without an answer the run goes on offline."""
        mode = wandb_mode(config)
        if mode == "disabled":
            return
        if config.wandb == "online" and mode != "online":
            self._warn("--wandb online: no key is configured (wandb login, or $WANDB_API_KEY): tracking offline")
        if mode == "online" and not server_answers():
            self._warn(f"W&B does not answer within {PROBE_TIMEOUT_S} s: this run is tracked offline")
            mode = "offline"
        arguments: dict[str, Any] = {"config": config, "run_dir": run_dir, "run_config": run_config, "tags": tags}
        for attempt in dict.fromkeys((mode, "offline")):
            if self.attach("W&B", partial(WandbRun, accelerator, mode=attempt, **arguments)):
                return

    @property
    def next_step(self) -> int:
        """The first step that no record is of yet."""
        return self._jsonl.last_step + 1 if self._jsonl is not None else 0

    def attach(self, name: str, start: Callable[[], Sink]) -> bool:
        """Starts a sink and adds it; says whether it did. `name` is what warnings call it."""
        try:
            self._sinks[name] = start()
        except Exception as error:  # whatever it is, training goes on
            self._warn(f"{name} did not start ({_first_line(error)})")
            return False
        return True

    def check(self) -> None:
        """Raises what `log` could not, on one rank among several: that its file was not written, or is gone."""
        if self._error is not None:
            raise self._error
        if self._jsonl is not None:
            self._jsonl.check()

    def log(self, split: str, step: int, epoch: float, **values: float) -> None:
        """Records values of one split at one step, once: a step that was recorded before a crash is passed over."""
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
            self._each(lambda sink: sink.log(step, {**points, "epoch": round(epoch, 4)}))

    def pictures(self, step: int, paths: dict[str, Path]) -> None:
        """Shows PNG files."""
        if paths:
            self._each(lambda sink: sink.pictures(step, paths))

    def confusion(self, step: int, counts: Counts, class_names: Sequence[str]) -> None:
        """Shows the confusion matrix of the test set."""
        self._each(lambda sink: sink.confusion(step, counts, class_names))

    def model(self, folder: Path, aliases: Sequence[str], metadata: dict[str, Any]) -> None:
        """Keeps an exported model."""
        self._each(lambda sink: sink.model(folder, aliases, metadata))

    def finish(self, status: str, summary: dict[str, Any]) -> list[Hint]:
        """Closes all sinks with the final numbers; says what to type next."""
        self._each(lambda sink: sink.finish(status, summary))
        return [hint for sink in self._sinks.values() for hint in sink.hints()]

    def _each(self, action: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                action(sink)
            except Exception as error:  # telemetry never ends a run
                self._warn(f"{name} failed and is left alone from here on ({_first_line(error)})")
                del self._sinks[name]


_PERFORMANCE = ("images_per_s", "epoch_time_s", "memory_mb")


def _point_name(split: str, name: str) -> str:
    return f"perf/{name}" if name.startswith(_PERFORMANCE) else f"{split}/{name}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class TensorBoardRun:
    """Event files for `tensorboard --logdir`, in <run>/tensorboard.

    Args:
        run_dir: of the run.
        next_step: points that an earlier start has left from there on are hidden: the run has gone back behind them.
    """

    def __init__(self, run_dir: Path, next_step: int) -> None:
        self._folder = run_dir / "tensorboard"
        tensorboard = importlib.import_module("torch.utils.tensorboard")  # costs a second, and is not always installed
        self._writer = tensorboard.SummaryWriter(str(self._folder), purge_step=next_step)

    def log(self, step: int, points: dict[str, float]) -> None:
        """Values by name at a step; on the disk at once, so that a killed run loses none."""
        for name, value in points.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def pictures(self, step: int, paths: dict[str, Path]) -> None:
        """PNG files by name."""
        image = importlib.import_module("PIL.Image")
        for name, path in paths.items():
            pixels = np.asarray(image.open(path).convert("RGB"))
            self._writer.add_image(f"pictures/{name}", pixels, step, dataformats="HWC")

    def confusion(self, step: int, counts: Counts, class_names: Sequence[str]) -> None:
        """A table in Markdown, a row per true class."""
        lines = [["true", *class_names], ["---"] * (len(class_names) + 1)]
        lines += [[name, *map(str, row)] for name, row in zip(class_names, counts, strict=True)]
        self._writer.add_text("test/confusion", "\n".join("|".join(["", *line, ""]) for line in lines), step)

    def model(self, folder: Path, aliases: Sequence[str], metadata: dict[str, Any]) -> None:
        """TensorBoard keeps no models."""

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Closes the files, with the final numbers as a text."""
        lines = [f"    {name}: {value}" for name, value in {"status": status, **summary}.items()]  # a code block
        self._writer.add_text("summary", "\n".join(lines))
        self._writer.close()

    def hints(self) -> list[Hint]:
        """What to type next."""
        return [("curves", f"tensorboard --logdir {self._folder}")]


class JsonlFile:
    """Append-only metrics.jsonl; knows what it already holds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last_step: dict[str, int] = {}
        complete = 0
        if path.exists():
            content = path.read_bytes()
            complete = content.rfind(b"\n") + 1  # a process killed while writing leaves a torn last line
            for number, line in enumerate(content[:complete].splitlines(), start=1):
                try:
                    record = json.loads(line)
                    self._last_step[record["split"]] = record["step"]
                except (ValueError, KeyError, TypeError) as error:
                    raise RunError(f"{path}: line {number} is no record; mend it, or start over elsewhere") from error
            if complete < len(content):
                os.truncate(path, complete)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    @property
    def last_step(self) -> int:
        """The largest step of any record; -1 without one."""
        return max(self._last_step.values(), default=-1)

    def check(self) -> None:
        """Raises a RunError where the file is gone: what is written into it then goes nowhere."""
        if not self._path.exists():
            raise RunError(f"{self._path}: removed or moved while the run was writing it")

    def append(self, record: dict[str, Any]) -> bool:
        """Writes one line unless the file holds this step of this split, or a later one; says whether it did."""
        if record["step"] <= self._last_step.get(record["split"], -1):
            return False
        self._last_step[record["split"]] = record["step"]
        valid = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self.check()
            self._file.write(json.dumps(valid) + "\n")  # JSON has no inf, which an fp16 gradient norm can be
        except OSError as error:
            raise RunError(f"{self._path}: not written ({error.strerror}); free some space there") from error
        return True
