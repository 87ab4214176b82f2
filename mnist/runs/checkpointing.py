"""When a checkpoint is written, what it holds, and how a run continues from one.

In: the live objects of a run. Out: checkpoints of them, or the objects with the state of a checkpoint. The
files are written and read by checkpoint_files.py; resume.py decides which checkpoint fits which configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mnist.config import to_flat
from mnist.data.datasets import Dataset
from mnist.errors import RunError, UserError
from mnist.runs.checkpoint_files import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_newest,
    missing_records,
    save_checkpoint,
)
from mnist.runs.directory import branch_origin
from mnist.runs.initial_weights import begin_with_weights
from mnist.runs.resume import asks_for_more, check_checkpoint
from mnist.runs.setup import RunSetup
from mnist.runs.state_tensors import module_tensors, optimizer_tensors, restore_optimizer
from mnist.runs.tracking.tracker import Tracker
from mnist.runs.validation import Validation
from mnist.system import ranks
from mnist.system.environment import code_sha256
from mnist.system.files import remove_leftovers
from mnist.training.step import DivergedError, TrainStep


def resume_run(setup: RunSetup) -> list[str]:
    """Continues a run at its newest valid checkpoint, or at the one that it branches from, or from other weights.

    Every rank must call this.

    Args:
        setup: of the run; its training step and its state get what the checkpoint holds.

    Returns:
        Notes for people; empty where the run begins at its first step.

    Raises:
        UserError: the checkpoint is of another run, or the weights of --init-from do not fit.
        CheckpointError: there are checkpoints, and none is valid; or the code of the network has changed since.
    """
    try:
        found = ranks.together(setup.accelerator, lambda: _find(setup))
        if found is None:
            begin_with_weights(setup)
            return []
        saved, notes = found
        _restore(saved, setup.train_step)
    except (UserError, RunError):
        setup.directory.remove_if_empty()
        raise
    setup.state.load(saved.loop)
    if asks_for_more(saved, setup.config, setup.plan):
        setup.state.stop_reason = None
    return notes


def resume_facts(dataset: Dataset) -> dict[str, Any]:
    """What the weights of a run depend on besides its configuration; a resume says what has changed of it."""
    return {
        "data_files": dataset.fingerprint,
        "code": code_sha256(),
        "threads": torch.get_num_threads(),
    }


def _find(setup: RunSetup) -> tuple[Checkpoint, list[str]] | None:
    directory, origin = setup.directory, branch_origin(setup.config)
    for folder in ("", "checkpoints", "export/last", "export/best", "pictures"):
        remove_leftovers(directory.path / folder)
    saved, skipped = load_newest(directory.checkpoints)
    notes = [f"resuming {directory.path} at step {saved.step}"] if saved is not None else []
    notes += [f"skipped a checkpoint: {line}" for line in skipped]
    notes += missing_records(saved, directory.path) if saved is not None else []
    if saved is None and origin is not None:
        saved = load_checkpoint(origin)
        notes.append(f"a new run from {origin}, step {saved.step}")
        saved.loop.best = None  # its weights are the other run's
    if saved is None:
        return None
    return saved, notes + check_checkpoint(saved, setup.config, setup.plan, resume_facts(setup.dataset))


def _restore(saved: Checkpoint, train_step: TrainStep) -> None:
    try:
        train_step.bare_model.load_state_dict(saved.tensors["model"])
    except RuntimeError as error:  # names the tensors
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the checkpoint of step {saved.step} is of another network: {reason}"[:300]) from error
    if train_step.average is not None:
        train_step.average.module.load_state_dict(saved.tensors["ema"])
    restore_optimizer(train_step.optimizer, saved.tensors["optimizer"])
    scaler = train_step.accelerator.scaler
    if scaler is not None and saved.scaler is not None:
        scaler.load_state_dict(saved.scaler)


class Checkpointing:
    """Saves a run. Every method must be called by every rank; rank 0 alone touches the disk.

    Args:
        setup: of the run.
        tracker: its records are on the disk before the checkpoint that stands for them.
        validation: knows the scores of this step.
    """

    def __init__(self, setup: RunSetup, tracker: Tracker, validation: Validation) -> None:
        self._setup = setup
        self._state = setup.state
        self._train_step = setup.train_step
        self._tracker = tracker
        self._validation = validation
        self._facts = resume_facts(setup.dataset)
        self._saved_step = -1

    def is_due(self) -> bool:
        """Whether this step is to be saved: by the plan, as the best on validation so far, or because the run ends."""
        state = self._state
        is_best = self._setup.config.data.val_size > 0 and state.best is not None and state.best["step"] == state.step
        return self._setup.plan.saves_at(state.step) or is_best or state.stop_reason is not None

    def save(self) -> None:
        """Writes a checkpoint of this step, unless it has been written.

        Raises:
            DivergedError: a weight is not finite. (The loss of the last step is that of the weights before it.)
        """
        if self._saved_step == self._state.step:
            return
        finite = torch.stack([weight.isfinite().all() for weight in self._train_step.bare_model.parameters()])
        if not bool(finite.all()):  # alike on every rank
            raise DivergedError(self._state.step, self._setup.accelerator.process_index, "weights are")

        def write() -> None:
            self._tracker.check()
            output = self._setup.config.output
            save_checkpoint(self._setup.directory.checkpoints, self._capture(), output.keep_last, output.keep_best)

        ranks.together(self._setup.accelerator, write)
        self._saved_step = self._state.step

    def _capture(self) -> Checkpoint:
        step = self._train_step
        tensors = {"model": module_tensors(step.bare_model), "optimizer": optimizer_tensors(step.optimizer)}
        if step.average is not None:
            tensors["ema"] = module_tensors(step.average.module)
        scaler = step.accelerator.scaler
        return Checkpoint(
            tensors=tensors,
            loop=self._state,
            scaler=None if scaler is None else scaler.state_dict(),
            config=to_flat(self._setup.config),
            plan=self._setup.plan,
            facts=self._facts,
            scores={name: score.as_dict() for name, score in self._validation.scores.items()},
        )

    def load_best(self, warn: Callable[[str], None]) -> int:
        """Loads the weights with the best validation score into the model that is scored and exported.

        Returns:
            Their step: the last one, too, where nothing is held out, or where they are lost, of which `warn` is told.
        """
        best, last_step = self._state.best, self._state.step
        if self._setup.dataset.val is None or best is None or best["step"] == last_step:
            return last_step
        path = self._setup.directory.checkpoints / f"step-{best['step']:08d}"

        def read() -> dict[str, Any] | str:
            try:
                return load_checkpoint(path).tensors["model" if self._train_step.average is None else "ema"]
            except CheckpointError as error:
                return str(error)

        found = ranks.together(self._setup.accelerator, read)
        if isinstance(found, str):
            warn(f"the best weights are lost ({found}); the last ones are scored and exported instead")
            self._state.best = None
            return last_step
        self._train_step.eval_model.load_state_dict(found)
        return int(best["step"])
