"""Scores while a run trains: which evaluation was the best, and whether the run has reached what it was started for.

In: the evaluated model and the data set. Out: `Scores`, written to the trackers and the console; `TrainState.best` and
`TrainState.stop_reason`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mnist.data.batches import Split
from mnist.runs.console import Console
from mnist.runs.setup import RunSetup
from mnist.runs.tracking.tracker import Tracker
from mnist.system import ranks
from mnist.training.evaluation import evaluate
from mnist.training.losses import build_loss
from mnist.training.metrics import Scores, TrainSums
from mnist.training.step import DivergedError


class Validation:
    """Scores the model on validation or, where nothing is held out, on test. Every rank must call every method.

    Args:
        setup: of the run; its state gets the best scores and the reason to stop.
        tracker: is told the scores.
        console: likewise.
        heartbeat: called after every chunk of images.
    """

    def __init__(self, setup: RunSetup, tracker: Tracker, console: Console, heartbeat: Callable[[], object]) -> None:
        self._setup = setup
        self._state = setup.state
        self._tracker = tracker
        self._console = console
        self._heartbeat = heartbeat
        self._loss_fn = build_loss(setup.config.optim.loss)  # without label smoothing, which is for training only
        self._scores: dict[str, Scores] = {}
        self._scored_step = -1

    @property
    def scores(self) -> dict[str, Scores]:
        """By split, of the weights of this very step; empty where they have not been evaluated."""
        return self._scores if self._scored_step == self._state.step else {}

    def score(self) -> None:
        """Evaluates during training, and decides about the best weights and early stopping."""
        ranks.together(self._setup.accelerator, self._tracker.check)
        state, split = self._state, "test" if self._setup.dataset.val is None else "val"
        scores = self._evaluate(split, self._setup.dataset.val or self._setup.dataset.test)
        is_new_best = state.best is None or scores.accuracy > state.best["accuracy"]
        if is_new_best or split == "test":  # without validation, "best" can only mean "last"
            state.best = {"step": state.step, **scores.as_dict()}
        state.evals_since_best = 0 if is_new_best else state.evals_since_best + 1
        state.stop_reason = self._reason_to_stop(scores)
        if split == "val":
            state.val_scores = scores.as_dict()
        self._show(scores, split)
        if self._setup.plan.epoch_ends_at(state.step):
            state.epoch_sums = TrainSums()

    def score_test(self) -> Scores:
        """The scores of the model on the test set, from the last evaluation if that was it."""
        if self._setup.dataset.val is None and "test" in self.scores:
            return self.scores["test"]
        return self._evaluate("test", self._setup.dataset.test)

    def _evaluate(self, name: str, split: Split) -> Scores:
        with self._console.doing("evaluating"):
            scores = evaluate(
                self._setup.train_step.eval_model,
                split,
                num_classes=self._setup.dataset.info.num_classes,
                accelerator=self._setup.accelerator,
                loss_fn=self._loss_fn,
                transform=self._setup.train_step.transform,
                sharded=self._setup.config.loop.evaluation == "sharded",
                after_chunk=self._heartbeat,
            )
        self._heartbeat()
        if not math.isfinite(scores.loss):
            raise DivergedError(self._state.step, 0)
        self._scores = {**self.scores, name: scores}
        self._scored_step = self._state.step
        self._tracker.log(name, self._state.step, self._setup.plan.epochs_done(self._state.step), **scores.as_dict())
        return scores

    def _reason_to_stop(self, scores: Scores) -> str | None:
        config = self._setup.config.loop
        targets = [
            config.target_accuracy is None or scores.accuracy >= config.target_accuracy,
            config.target_loss is None or scores.loss <= config.target_loss,
        ]
        if all(targets) and (config.target_accuracy is not None or config.target_loss is not None):
            return "target reached"
        if config.patience and self._state.evals_since_best >= config.patience:
            return f"no better for {config.patience} evaluations"
        return None

    def _show(self, scores: Scores, split: str) -> None:
        means = self._state.epoch_sums.means()
        self._console.epoch_row(
            round(self._setup.plan.epochs_done(self._state.step), 2),
            self._state.step,
            (means["loss"], means["accuracy"]),
            split,
            (scores.loss, scores.accuracy),
            lr=self._setup.train_step.lr,
            seconds=self._state.epoch_sums.time_s,
        )
