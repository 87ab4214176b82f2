"""TensorBoard's event files.

In: points, pictures, tables. Out: <run>/tensorboard. Only rank 0 comes here.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


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

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Adds values at a step, flushed: numbers, PNG files (paths), tables (rows of texts and numbers)."""
        for name, value in values.items():
            if isinstance(value, Path):
                pixels = np.asarray(importlib.import_module("PIL.Image").open(value).convert("RGB"))
                self._writer.add_image(name, pixels, step, dataformats="HWC")
            elif isinstance(value, list):
                header, *rows = value
                lines = [header, ["---"] * len(header), *rows]  # Markdown
                self._writer.add_text(name, "\n".join(f"|{'|'.join(map(str, line))}|" for line in lines), step)
            else:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def model(self, folder: Path, aliases: Sequence[str], metadata: dict[str, Any]) -> None:
        """TensorBoard keeps no models."""

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Closes the files, with the final numbers as a text."""
        lines = [f"    {name}: {value}" for name, value in {"status": status, **summary}.items()]  # a code block
        self._writer.add_text("summary", "\n".join(lines))
        self._writer.close()

    def hints(self) -> list[tuple[str, str]]:
        """What to type next."""
        return [("curves", f"tensorboard --logdir {self._folder}")]
