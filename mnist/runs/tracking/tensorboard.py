"""TensorBoard's event files.

In: points and pictures. Out: <run>/tensorboard. Only rank 0 comes here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mnist.runs.tracking.sink import Counts, Hint


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
