"""What a person sees of a run: the banner, a progress bar, a row per epoch, closing lines; plain lines in a log file.

In: plain numbers and strings. Out: results and records on standard output, warnings and the bar on standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Self, TextIO

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.spinner import Spinner
from rich.text import Text
from rich.theme import Theme

from mnist.errors import is_first_rank, is_one_of_several

MAX_COLUMNS = 100  # wider lines are hard to read
NOTE_INTERVAL_S = 5.0
# What must be read has no colour but the terminal's own: on a white page green, yellow and cyan are pale.
_THEME = Theme({"progress.download": "none", "progress.remaining": "none"})

Rows = Sequence[tuple[str, str]]
Numbers = tuple[float, float]  # loss and accuracy


class _Stream(RichConsole):
    """Standard output or standard error. A closed pipe or a full disk silences it, and does not end the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor, in tests and notebooks
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def show_cursor(self, show: bool = True) -> bool:  # noqa: ARG002
        return False  # never hide it: a process that is killed cannot show it again


class _NotebookBar(Live):
    """The bar in a notebook: one output of the cell, replaced in place and left there at the end.

    (Live itself needs ipywidgets there.)
    """

    def __init__(self, get_renderable: Callable[[], RenderableType]) -> None:
        silent = RichConsole(quiet=True, force_jupyter=False)
        super().__init__(console=silent, get_renderable=get_renderable, refresh_per_second=4)
        self._output = importlib.import_module("IPython.display").DisplayHandle()
        self._show = self._output.display

    def refresh(self) -> None:
        with self._lock:
            page = RichConsole(file=io.StringIO(), record=True, width=MAX_COLUMNS, force_jupyter=False, theme=_THEME)
            page.print(self.get_renderable(), end="")
            html = page.export_html(clear=False, inline_styles=True, code_format="<pre>{code}</pre>")
            self._show({"text/plain": page.export_text(), "text/html": html}, raw=True)
            self._show = self._output.update


class Console:
    """All that rank 0 prints (with `quiet` warnings and closing lines only). The bar goes away when the block ends."""

    def __init__(self, is_main: bool | None = None, quiet: bool = False) -> None:
        is_main = is_first_rank() if is_main is None else is_main
        self._quiet = quiet
        self._err, err_is_terminal = _open_stream(sys.stderr, is_main)
        self._out, out_is_terminal = _open_stream(sys.stdout, is_main)
        in_notebook = RichConsole().is_jupyter
        can_draw = err_is_terminal or (in_notebook and not is_one_of_several())  # forks of a kernel can print only
        self._has_bar = can_draw and is_main and not quiet
        # In a table each number stands below its name; elsewhere each line names its numbers.
        self._is_table = not quiet and (in_notebook or (self._has_bar and out_is_terminal))
        self._has_header = False
        if self._is_table and not in_notebook:
            self._out = self._err  # one screen: rich prints the lines above the bar
        self._warned: set[str] = set()
        self._noted_s = time.monotonic()
        self._loss_name, self._best_accuracy = "train loss", 0.0
        self._num_steps, self._epoch_steps, self._activity = 0, 1.0, ""
        self._current_step: Callable[[], int] = lambda: 0
        self._task: TaskID | None = None
        self._spinner = Spinner("line")
        name, numbers = TextColumn("{task.description}"), TextColumn("{task.fields[numbers]}")
        columns = (name, BarColumn(bar_width=None), MofNCompleteColumn(), numbers, TimeRemainingColumn(compact=True))
        self._bar = Progress(*columns, expand=True)
        if in_notebook:
            self._live: Live = _NotebookBar(self._render)
        else:
            self._live = Live(console=self._err, get_renderable=self._render, transient=True, refresh_per_second=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_progress()

    def banner(self, rows: Rows) -> None:
        """The plan of the run, a line per fact."""
        if not self._quiet:
            self._print_rows(rows)

    def say(self, line: str) -> None:
        """One line of information, on standard output."""
        if not self._quiet:
            self._print(self._out, line)

    def note(self, line: str) -> None:
        """One line of information on standard error, for commands whose standard output is their result."""
        if not self._quiet:
            self._print(self._err, line)

    def warn(self, line: str) -> None:
        """A warning on standard error, once, also with --quiet."""
        if line not in self._warned:
            self._warned.add(line)
            self._print(self._err, ("warning", "bold magenta"), f"  {line}")

    def summary(self, title: str, rows: Rows, next_commands: Sequence[str] = ()) -> None:
        """The closing lines, also with --quiet: results, then commands to type next; at a terminal between two rules.

        There are no borders beside them, and commands begin at the left: they can be copied, and fit into 80 columns.
        """
        self.stop_progress()
        if not self._is_table:
            self._print_rows(rows)
            self._print_rows([("" if number else "next", line) for number, line in enumerate(next_commands)])
            return
        style = "green" if next_commands else "yellow"
        self._print_rule(title, style)
        self._print_rows(rows)
        if next_commands:
            self._print(self._out, (f"{'next':>12}", "bold"))
        for line in next_commands:
            self._print(self._out, f"  {line}")
        self._print_rule("", style)

    def _print_rows(self, rows: Rows) -> None:
        for name, value in rows:
            self._print(self._out, (f"{name:>12}  ", "bold"), value)

    def _print_rule(self, title: str, style: str) -> None:
        rule = Rule(Text(title, "bold"), characters="\u2501", align="left", style=style)
        self._render_on(self._out, Constrain(rule, MAX_COLUMNS))

    def _print(self, stream: _Stream, *parts: str | tuple[str, str]) -> None:
        self._render_on(stream, Text.assemble(*parts))

    def _render_on(self, stream: _Stream, content: RenderableType) -> None:
        try:
            stream.print(content)
        except OSError:  # the disk is full where the log is; the run directory may be on another one
            stream.on_broken_pipe()

    def start_progress(
        self, num_steps: int, current_step: Callable[[], int], epoch_steps: float, *, best: float = 0.0, loss: str = ""
    ) -> None:
        """Begins the bar. The thread that draws it calls `current_step`, for the steps done, five times a second.

        `best` is the accuracy that earlier starts of the run have reached, `loss` the name of the training loss.
        """
        self._num_steps, self._current_step, self._epoch_steps = num_steps, current_step, epoch_steps
        self._loss_name, self._best_accuracy = loss or self._loss_name, best
        self._task = self._bar.add_task("", total=num_steps, completed=current_step(), numbers="")
        self.show("")

    def show(self, activity: str) -> None:
        """Shows on a terminal what the run does besides training, such as "importing torch"; "" = training."""
        self._activity = activity
        if self._has_bar and not self._live.is_started:
            self._live.start()

    def show_progress(self, activity: str) -> None:
        """Shows how far a long work is; where there is no bar, in a line every five seconds."""
        self.show(activity)
        if not self._has_bar and time.monotonic() - self._noted_s >= NOTE_INTERVAL_S:
            self._noted_s = time.monotonic()
            self.note(activity)

    @contextlib.contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Shows `activity` until the block ends, and then again what was shown before."""
        before = self._activity
        self.show(activity)
        try:
            yield
        finally:
            self._activity = before

    def progress(self, step: int, loss: float, accuracy: float, images_per_s: float) -> None:
        """A training record: numbers beside the bar, or a line."""
        if self._task is not None:
            self._bar.update(self._task, numbers=f"loss {loss:.4f} acc {accuracy:.2%} {images_per_s:,.0f} img/s")
        if not self._is_table:
            numbers = f"{self._loss_name} {loss:.4f}  accuracy {accuracy:7.2%}  {images_per_s:9,.0f} images/s"
            self.say(f"step {step:{len(str(self._num_steps))}}/{self._num_steps}  {numbers}")

    def epoch_row(
        self, epoch: float, step: int, train: Numbers, split: str, scored: Numbers, *, lr: float, seconds: float
    ) -> None:
        """A row at each evaluation: `train` and `scored` are loss and accuracy; `seconds` of training in this epoch."""
        cells = [("epoch", 6, f"{epoch:g}"), ("step", 7, str(step))]
        cells += [(self._loss_name, 15, f"{train[0]:.4f}"), ("accuracy", 10, f"{train[1]:.2%}")]
        cells += [(f"{split} loss", 11, f"{scored[0]:.4f}"), ("accuracy", 10, f"{scored[1]:.2%}")]
        cells += [("lr", 8, f"{lr:.2g}"), ("train s", 8, f"{seconds:.2f}")]
        mark = "best" if scored[1] > self._best_accuracy else ""
        self._best_accuracy = max(self._best_accuracy, scored[1])
        if not self._is_table:
            self.say("  ".join(f"{name} {text:>{min(width, 8)}}" for name, width, text in cells) + f"  {mark}".rstrip())
            return
        if not self._has_header:
            self._has_header = True
            self._print(self._out, ("".join(f"{name:>{width}}" for name, width, _ in cells), "bold"))
        row = "".join(f"{text:>{width}}" for _, width, text in cells)
        self._print(self._out, row, (f"{mark:>5}", "bold"))

    def stop_progress(self) -> None:
        """Takes the bar away."""
        self._has_bar = False
        with contextlib.suppress(OSError):  # the terminal is gone
            self._live.stop()

    def _render(self) -> RenderableType:
        if self._task is None:
            if not self._has_bar:
                return ""
            self._spinner.update(text=self._activity)
            return self._spinner
        step, num_epochs = self._current_step(), math.ceil(self._num_steps / self._epoch_steps)
        epoch = min(num_epochs, int(step / self._epoch_steps) + 1)
        self._bar.update(self._task, completed=step, description=self._activity or f"epoch {epoch}/{num_epochs}")
        return Constrain(self._bar, MAX_COLUMNS)


def _open_stream(file: TextIO, is_main: bool) -> tuple[_Stream, bool]:
    """A stream, and whether a person sees it at a terminal that can draw."""
    is_terminal = file.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
    stream = _Stream(
        stderr=file is sys.stderr,
        quiet=not is_main,
        highlight=False,
        soft_wrap=True,
        color_system="auto" if is_terminal else None,
        force_terminal=None if is_terminal else False,
        theme=_THEME,
        force_jupyter=False,  # where it would show each line as an output of its own
    )
    return stream, is_terminal


def count(number: int, noun: str) -> str:
    """1 rank, 2 ranks, 2 processes."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"
