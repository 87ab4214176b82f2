from __future__ import annotations

from mnist.config import TrainConfig
from mnist.runs import report
from mnist.training.loop import TrainState
from mnist.training.metrics import Scores, TrainSums
from mnist.training.plan import build_plan


def test_images_per_s_counts_the_images_of_a_run_that_ends_within_a_pass() -> None:
    """One step of 59,999 of 60,000 images, of two in a pass: half the pass was reported (6,416 a second)."""
    state = TrainState(step=1, run_sums=TrainSums(num_samples=59_999, time_s=4.676))
    numbers = report.result(build_plan(TrainConfig(), 60_000, 1), state, None)
    assert (numbers["train_time_s"], numbers["images_per_s"]) == (4.676, 12_831.3)


def test_images_per_s_is_null_where_nothing_was_trained() -> None:
    assert report.result(build_plan(TrainConfig(), 60_000, 1), TrainState(), None)["images_per_s"] is None


def test_worst_classes_names_only_classes_with_mistakes() -> None:
    names = ("circle", "square", "triangle")
    one_mistake = Scores(0.1, 29, 30, ((10, 0, 0), (1, 9, 0), (0, 0, 10)))
    assert report.worst_classes(one_mistake, names) == "square 90.00%"
    assert report.worst_classes(Scores(0.1, 30, 30, ((10, 0, 0), (0, 10, 0), (0, 0, 10))), names) == ""
