from __future__ import annotations

import math
from pathlib import Path

import pytest

from mnist.plots.curves import draw_curves, without_fragments
from mnist.plots.history import Curve, History
from tests.plots.test_pictures import pixels_of, texts


def history(name: str, points: int, **splits: list[float]) -> History:
    steps = [10 * (point + 1) for point in range(points)]
    losses = [2.3 / (1 + 0.5 * point) for point in range(points)]
    curves = {"train": Curve(steps, losses, [1 - loss / 2.6 for loss in losses])}
    for split, accuracies in splits.items():
        ends = [round(steps[-1] * (place + 1) / len(accuracies)) for place in range(len(accuracies))]
        curves[split] = Curve(ends, [1 - accuracy for accuracy in accuracies], accuracies)
    return History(name, "mnist", None, curves, 100.0)


@pytest.mark.parametrize("points", [1, 10, 10_000])
def test_curves_of_any_length(tmp_path: Path, points: int) -> None:
    figure = draw_curves([history("a", points, val=[0.9], test=[0.8, 0.99])], "title", "subtitle")
    pixels_of(figure, tmp_path / "curves.png")
    written = texts(figure)
    assert {"loss", "accuracy", "optimizer steps", "val 90.00%", "test 99.00%"} <= set(written)
    steps = figure.axes[0].get_lines()[0].get_xdata()
    assert list(steps) == [10 * (point + 1) for point in range(points)]
    assert figure.axes[1].get_legend() is None, "nothing lies over the points"
    assert len(figure.axes[1].get_lines()) == (4 if points == 10_000 else 3)  # a running mean before the raw values


def test_a_logarithmic_loss_axis_has_several_labels(tmp_path: Path) -> None:
    """From 2.3 to 0.19, where "1" was the only one."""
    figure = draw_curves(
        [History("a", "mnist", None, {"train": Curve([1, 2], [2.3, 0.19], [0.1, 0.9])}, 1.0)], "t", "s"
    )
    pixels_of(figure, tmp_path / "curves.png")
    low, high = figure.axes[0].get_ylim()
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels() if low <= text.get_position()[1] <= high]
    assert labels == ["0.2", "0.5", "1", "2"]


def test_learning_rate_and_gradient_norm_have_axes_of_their_own(tmp_path: Path) -> None:
    curve = Curve([10, 20, 30], [2.0, 1.0, 0.5], [0.1, 0.5, 0.9], [0.1, 0.2, 0.3], [1.0, math.nan, 3.0])
    figure = draw_curves([History("a", "mnist", None, {"train": curve}, 10.0)], "t", "s")
    pixels_of(figure, tmp_path / "curves.png")
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy", "learning rate", "gradient norm"]
    assert list(figure.axes[2].get_lines()[0].get_ydata()) == [0.1, 0.2, 0.3]


def test_several_runs_share_the_picture(tmp_path: Path) -> None:
    runs = [history(f"run {number}", 20, test=[0.9 + number / 100]) for number in range(9)]
    figure = draw_curves(runs, "title", "subtitle")
    pixels_of(figure, tmp_path / "curves.png")
    assert [text for text in texts(figure) if "test" in text] == [f"run {n}: test {90 + n}.00%" for n in range(9)]
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[1].get_lines()}
    assert len(looks) == 9


def test_a_run_that_diverged_is_drawn_as_far_as_it_went(tmp_path: Path) -> None:
    broken = Curve([10, 20, 30], [2.0, math.nan, math.nan], [0.1, math.nan, 0.1])
    pixels_of(draw_curves([History("a", "mnist", None, {"train": broken}, math.nan)], "t", "s"), tmp_path / "c.png")


def test_the_mean_of_a_few_batches_is_left_out() -> None:
    """Records every 10 steps and at the ends of epochs of 23 steps; the last record of a run may be a short one."""
    shown = without_fragments(
        Curve([10, 20, 23, 30, 40, 46], [1.0, 0.8, 0.2, 0.6, 0.4, 0.3], [0.1, 0.2, 0.9, 0.4, 0.5, 0.6])
    )
    assert shown == Curve([10, 20, 30, 40, 46], [1.0, 0.8, 0.6, 0.4, 0.3], [0.1, 0.2, 0.4, 0.5, 0.6])
    even = Curve([50, 100], [2.0, 1.0], [0.2, 0.3])
    assert without_fragments(even) == even
