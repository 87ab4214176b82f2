"""What is logged where: metrics.jsonl always, W&B where it can be had, TensorBoard where it is asked for.

In: records of a split at a step, pictures, exported models. Out: each record once in metrics.jsonl, none lost and none
doubled after a resume, and from there in every sink (what a sink has not written when it is killed, it lacks). Whatever
a sink does, it costs a warning, and the sink is dropped; a disk that has no room for metrics.jsonl ends the run. All
happens on rank 0; elsewhere `Tracker` is a null object.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mnist.config import OutputConfig, check_choice
from mnist.errors import RunError, UserError
from mnist.runs.tracking.jsonl import JsonlFile
from mnist.runs.tracking.sink import Counts, Hint, Sink
from mnist.runs.tracking.wandb import PROBE_TIMEOUT_S, WandbRun, server_answers, wandb_mode

Warn = Callable[[str], None]


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
