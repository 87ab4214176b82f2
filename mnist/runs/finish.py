"""What a finished run leaves: exported weights, the scores of the test set, pictures, models in the trackers.

In: a run that has taken its last step. Out: `<run>/export`, `<run>/pictures`, and test scores. Every rank must call
everything here; rank 0 alone touches the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from mnist.config import evolve, to_flat
from mnist.runs.checkpointing import Checkpointing
from mnist.runs.console import Console
from mnist.runs.export import export_model
from mnist.runs.setup import RunSetup
from mnist.runs.state_tensors import module_tensors
from mnist.runs.tracking.tracker import Tracker
from mnist.runs.validation import Validation
from mnist.system import ranks
from mnist.training.metrics import Scores

Draw = Callable[[RunSetup, Scores, int, Callable[[str], None]], dict[str, Path]]  # as `write_run_pictures`


def export_and_score(
    setup: RunSetup,
    validation: Validation,
    checkpointing: Checkpointing,
    *,
    tracker: Tracker,
    console: Console,
    draw: Draw,
) -> tuple[Scores, dict[str, Path]]:
    """Exports the last and the best weights, scores the best ones on the test set, draws.

    Returns:
        The scores, and the pictures' files by name.
    """
    _export(setup, "last")
    scored_step = checkpointing.load_best(console.warn)
    test = validation.score_test()
    _export(setup, "best")

    def show() -> dict[str, Path]:
        paths: dict[str, Path] = {}
        if setup.config.output.pictures:
            with console.doing("drawing pictures"):
                paths = draw(setup, test, scored_step, console.warn)
                tracker.pictures(setup.state.step, paths)
        _show_in_trackers(setup, test, scored_step, tracker)
        return paths

    return test, ranks.together(setup.accelerator, show)


def _export(setup: RunSetup, name: str) -> None:
    executed = evolve(setup.config, num_threads=torch.get_num_threads())
    weights = partial(module_tensors, setup.train_step.eval_model)
    folder, info = setup.directory.path / "export" / name, setup.dataset.info
    ranks.together(setup.accelerator, lambda: export_model(folder, weights(), {**to_flat(executed), **asdict(info)}))


def _show_in_trackers(setup: RunSetup, test: Scores, scored_step: int, tracker: Tracker) -> None:
    step, export = setup.state.step, setup.directory.path / "export"
    scores = {"step": scored_step, **test.as_dict()}
    tracker.confusion(step, test.confusion, setup.dataset.class_names)
    if scored_step == step:
        tracker.model(export / "best", ["best", "last"], scores)
    else:
        tracker.model(export / "last", ["last"], {"step": step})
        tracker.model(export / "best", ["best"], scores)
