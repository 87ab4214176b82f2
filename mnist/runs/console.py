"""What a person sees: banner, one progress bar, a row per epoch, the closing lines; plain lines where nobody watches.

In: plain numbers and strings. Out: text on standard error, from rank 0 only. On other ranks, with `--quiet`, or where
standard error is no terminal, the same calls print less.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0


class _RichConsole(RichConsole):
    def on_broken_pipe(self) -> None:
        """Falls silent: whoever read the log has gone, or it has no room, and that is no reason to end a run."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class Console:
    """The one voice of a job.

    Args:
        is_main: false on all ranks but 0, which then stay silent.
        quiet: warnings and the closing lines only.
    """

    def __init__(self, is_main: bool = True, quiet: bool = False) -> None:
        self._rich = _RichConsole(stderr=True, quiet=not is_main, highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._live = self._rich.is_terminal and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
        if not self._live:
            self._rich = _RichConsole(
                stderr=True, quiet=not is_main, highlight=False, soft_wrap=True, color_system=None, force_terminal=False
            )
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._num_steps = 0
        self._last_line_s = 0.0
        self._warned: set[str] = set()

    def banner(self, rows: Sequence[tuple[str, str]]) -> None:
        """The plan of the run, a line per fact."""
        if not self._quiet:
            self._print_rows(rows)

    def say(self, line: str) -> None:
        """One line of information."""
        if not self._quiet:
            self._print(escape(line))

    def warn(self, line: str) -> None:
        """One line that matters, once."""
        if line not in self._warned:
            self._warned.add(line)
            self._print(f"[bold yellow]warning[/bold yellow]  {escape(line)}")

    def _print(self, text: str) -> None:
        try:
            self._rich.print(text)
        except OSError:  # the disk is full below the log; the run's own may be another one
            self._rich.on_broken_pipe()

    def start_progress(self, num_steps: int, done: int) -> None:
        """Begins the bar of the run (on a terminal)."""
        self._num_steps = num_steps
        self._last_line_s = time.monotonic()
        if self._live and not self._quiet and not self._rich.quiet:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._rich, transient=True, refresh_per_second=4)
            self._task = self._progress.add_task("", total=num_steps, completed=done)
            self._progress.start()

    def progress(self, step: int, loss: float, accuracy: float, images_per_s: float) -> None:
        """A training record: moves the bar, or prints a line every ten seconds."""
        text = f"loss {loss:.4f}  accuracy {accuracy:.2%}  {images_per_s:,.0f} images/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._last_line_s >= PLAIN_EVERY_S:
            self._last_line_s = time.monotonic()
            self.say(f"step {step}/{self._num_steps}  {text}")

    def epoch_row(
        self, epoch: float, step: int, train: tuple[float, float], split: str, scored: tuple[float, float, str]
    ) -> None:
        """A line at each evaluation.

        Args:
            epoch: where the run is.
            step: likewise, in steps.
            train: loss and accuracy of training since the epoch began.
            split: what was scored.
            scored: its loss, accuracy and counts.
        """
        self._last_line_s = time.monotonic()
        loss, accuracy, counts = scored
        self.say(
            f"epoch {epoch:g}  step {step}/{self._num_steps}  |  train loss {train[0]:.4f} accuracy {train[1]:.2%}  |  "
            f"{split} loss {loss:.4f} accuracy {accuracy:.2%} ({counts})"
        )

    def stop_progress(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def summary(self, rows: Sequence[tuple[str, str]]) -> None:
        """The closing lines; printed even with --quiet."""
        self.stop_progress()
        self._print_rows(rows)

    def _print_rows(self, rows: Sequence[tuple[str, str]]) -> None:
        for name, value in rows:
            self._print(f"[bold]{name:>12}[/bold]  {escape(value)}")


def count(number: int, noun: str) -> str:
    """1 rank, 2 ranks, 2 processes."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"
