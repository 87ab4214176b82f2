"""Drawing the course of runs: loss and accuracy over steps, for ten records or ten thousand, one run or many.

In: histories. Out: a figure. Matplotlib is imported where it is used, as in canvas.py.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from operator import mul
from typing import TYPE_CHECKING, Any

import torch

from mnist.plots.canvas import GREY, HEAD, INK, LINES, MARGIN, PALE, add_axes, new_figure
from mnist.plots.history import SPLITS, Curve, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_curves(histories: Sequence[History], title: str, subtitle: str) -> Figure:
    """Loss, accuracy, learning rate and gradient norm over steps. One run has a colour per split, several one each."""
    is_single = len(histories) == 1
    num_labels = sum(len(history.curves) for history in histories) if is_single else len(histories)
    legend_rows = math.ceil(num_labels / 3)
    height = HEAD + 620 + 18 * legend_rows
    figure = new_figure(1180, height, title, subtitle)
    columns = [MARGIN + 55, MARGIN + 635]
    loss, accuracy = (add_axes(figure, left, HEAD + 40, 490, 320) for left in columns)
    rate, norm = (add_axes(figure, left, HEAD + 400, 490, 150) for left in columns)
    for number, history in enumerate(histories):
        for split, recorded in history.curves.items():
            is_train, turn = split == "train", SPLITS.index(split) if is_single else number
            curve = without_fragments(recorded) if is_train else recorded
            final = (_running_mean(curve.accuracies) if is_train else curve.accuracies)[-1]
            label = f"{split if is_single else f'{history.name}: {split}'} {final:.2%}"
            style = {
                "color": LINES[turn % len(LINES)],
                "linestyle": ("-", "--", ":")[turn // len(LINES) % 3],
                "alpha": 0.4 if is_train and not is_single else 1.0,
                "label": label if is_single or not is_train or len(history.curves) == 1 else None,
            }
            _draw_curve(loss, curve.steps, curve.losses, is_train, style)
            _draw_curve(accuracy, curve.steps, curve.accuracies, is_train, style)
            if is_train:
                style = {**style, "alpha": 1.0, "label": None}
                for axes, values in ((rate, recorded.learning_rates), (norm, recorded.grad_norms)):
                    _draw_curve(axes, recorded.steps[: len(values)], values, is_train, style)
    _label_axes((loss, accuracy, rate, norm), histories)
    _scale_axes(loss, accuracy, norm, histories)
    place = (MARGIN / 1180, 10 / height)
    handles, labels = accuracy.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=place, ncols=3, fontsize=8, frameon=False)
    return figure


def without_fragments(curve: Curve) -> Curve:
    """A training curve without the records of less than half the usual number of steps.

    A record is the mean since the one before. Log intervals and epochs end in records; where one ends shortly after the
    other, that is the mean of a few batches, and would look like an event.
    """
    stretches = [step - before for before, step in pairwise([0, *curve.steps])]
    usual = statistics.median(stretches)
    kept = [index for index, stretch in enumerate(stretches) if stretch >= usual / 2]
    columns = (curve.losses, curve.accuracies)
    return Curve([curve.steps[k] for k in kept], *([column[k] for k in kept] for column in columns))


def _draw_curve(axes: Axes, steps: list[int], values: list[float], is_train: bool, style: dict[str, Any]) -> None:
    """Training as a line, of a long run its running mean (before the raw values if alone); evaluations as points."""
    smooth = _running_mean(values) if is_train else values
    if smooth is not values and style["alpha"] == 1.0:
        axes.plot(steps, values, color=style["color"], linewidth=0.5, alpha=0.3)
    marker = "" if len(values) > 60 else "." if is_train else "o"
    axes.plot(steps[len(steps) - len(smooth) :], smooth, linewidth=1.2, marker=marker, markersize=4, **style)


def _running_mean(values: list[float]) -> list[float]:
    """The mean of each value and those before it, over a fiftieth of a long run; few values stay as they are."""
    window = len(values) // 50 if len(values) > 200 else 1
    return values if window == 1 else torch.tensor(values).unfold(0, window, 1).mean(dim=1).tolist()


def _add_epochs(axes: Axes, epoch_steps: int) -> None:
    """The same axis in epochs, above."""
    axis = axes.secondary_xaxis("top", functions=(partial(mul, 1 / epoch_steps), partial(mul, epoch_steps)))
    axis.set_xlabel("epochs", size=8.5, color=GREY)
    axis.tick_params(labelsize=8, colors=GREY, length=2)
    axis.spines["top"].set_color(PALE)


def _label_axes(panels: Sequence[Axes], histories: Sequence[History]) -> None:
    ticker = importlib.import_module("matplotlib.ticker")
    epoch_steps = {round(history.epoch_steps) for history in histories if math.isfinite(history.epoch_steps)}
    for number, (axes, name) in enumerate(
        zip(panels, ("loss", "accuracy", "learning rate", "gradient norm"), strict=True)
    ):
        axes.set_ylabel(name, size=9, color=INK)
        axes.yaxis.set_label_coords(-0.12, 0.5)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axes.grid(color="#ececec", linewidth=0.7)
        if number < 2 and len(epoch_steps) == 1:
            _add_epochs(axes, next(iter(epoch_steps)))
        elif number > 1:
            axes.set_xlabel("optimizer steps", size=9, color=INK)


def _scale_axes(loss: Axes, accuracy: Axes, norm: Axes, histories: Sequence[History]) -> None:
    """Logarithmic scales where values span much; a bad start of the accuracy may lie below the edge."""
    ticker = importlib.import_module("matplotlib.ticker")
    curves = [curve for history in histories for curve in history.curves.values()]
    for axes, columns, most in ((loss, [c.losses for c in curves], 2e4), (norm, [c.grad_norms for c in curves], 50)):
        values = [value for column in columns for value in column if math.isfinite(value)]
        if values and min(values) > 0 and max(values) > 5 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(
                ticker.LogLocator(subs=(1, 2, 5) if max(values) < most * min(values) else (1,))
            )
            axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    values = sorted(value for curve in curves for value in curve.accuracies if math.isfinite(value))
    if values:
        low = values[len(values) // 10]
        accuracy.set_ylim(max(0.0, low - 0.25 * (1 - low) - 0.002), 1.0 + 0.03 * (1 - low) + 0.0005)
    accuracy.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=" %"))
