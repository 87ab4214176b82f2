"""What a tracker beside metrics.jsonl has to do.

In: points, pictures, exported models. Out: whatever the sink keeps. Only rank 0 comes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

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


Counts = Sequence[Sequence[int]]
