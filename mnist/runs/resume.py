"""Taking a run up where an earlier start left it: what is continued, from which checkpoint, and how.

In: the live objects of a run and its directory. Out: a checkpoint of them, or the objects as a checkpoint has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnist.config import TrainConfig, fields_on_resume, to_flat
from mnist.errors import RunError, UserError
from mnist.runs.checkpoint_files import Checkpoint, list_steps, load_checkpoint, load_newest
from mnist.runs.compatibility import LENGTH_BOUND_SCHEDULES, check_compatible, check_same_run
from mnist.runs.directory import RunDir, is_restart, resume_mode
from mnist.runs.live_state import module_tensors, optimizer_tensors, restore_optimizer
from mnist.runs.records import MANIFEST
from mnist.training.loop import TrainState
from mnist.training.metrics import Scores
from mnist.training.plan import Plan
from mnist.training.step import TrainStep

_STOPPING_FIELDS = ("target_accuracy", "target_loss", "patience")


def check_finished(previous: dict[str, Any], old: dict[str, Any], config: TrainConfig, plan: Plan, path: Path) -> bool:
    """Whether an earlier start in this directory has done all that is asked for now.

    Args:
        previous: its result.json, {} where there is none.
        old: its config.json, likewise.
        config: the configuration of this start.
        plan: the plan of this start.
        path: the run directory.

    Raises:
        UserError: that start had another configuration.
        RunError: that start diverged, and would again.
    """
    status = previous.get("status")
    if resume_mode(config) != "auto" or status not in ("finished", "diverged"):
        return False
    check_same_run(old, config)
    if status == "diverged":
        raise RunError(
            f"--run-dir {path}: this run diverged at step {previous['steps']} and would again; start over with a "
            f"smaller --lr and --resume never, or name an earlier checkpoint with --resume PATH"
        )
    stopped_otherwise = previous["stop_reason"] is not None and not _is_alike(old, config, _STOPPING_FIELDS)
    return plan.num_steps <= previous["planned_steps"] and not stopped_otherwise


def ways_on(config: TrainConfig) -> str:
    """What can be done in the directory of a finished run."""
    more = "a larger --max-steps" if config.loop.max_steps else "more --epochs"
    longer = "" if config.optim.schedule in LENGTH_BOUND_SCHEDULES else f"continue it with {more}, "
    return f"{longer}start over with --resume never, or name another --run-dir"


def _is_alike(old: dict[str, Any], config: TrainConfig, names: Sequence[str]) -> bool:
    new = to_flat(config)
    return all(old.get(name) == new[name] for name in names)


def find_checkpoint(
    directory: RunDir, config: TrainConfig, plan: Plan, facts: dict[str, Any]
) -> tuple[Checkpoint, list[str]] | None:
    """The newest valid checkpoint, or the one named by --resume, and notes for people; None = start from scratch.

    Raises:
        UserError: it belongs to another run, or there is none at the path given.
        CheckpointError: there are checkpoints, and none is valid.
    """
    wanted = resume_mode(config)
    if wanted == "never":
        return None
    saved, skipped = load_newest(directory.checkpoints) if wanted == "auto" else (None, [])
    if saved is None and config.output.resume not in ("auto", "never"):  # also where a restart finds none of its own
        wanted = config.output.resume
        if not Path(wanted, MANIFEST).is_file():
            raise UserError(f"--resume {wanted}: no checkpoint; give auto, never or the path of a step-... directory")
        saved = load_checkpoint(Path(wanted))
    last = directory.read("config.json")  # of the start that made the latest records
    if saved is None:
        if last and directory.has_records():  # it ended before its first checkpoint
            check_same_run(last, config)
            if not _is_alike(last, config, fields_on_resume("course")):
                directory.rewind(0, [])
        return None
    changes = check_compatible(saved, config, plan, facts)
    steps = list_steps(directory.checkpoints)
    later = [path for step, path in steps.items() if step > saved.step]
    if not _is_alike(last or saved.config, config, fields_on_resume("course")) or (
        wanted != "auto" and not is_restart()
    ):
        directory.rewind(saved.step, later)
    else:
        directory.move_aside(later)  # the broken ones, which must not pass for this run's steps again
    if saved.loop["best"] is not None and saved.loop["best"]["step"] not in steps:
        saved.loop["best"] = None  # it stayed behind in another directory
    if saved.plan["num_steps"] != plan.num_steps or not _is_alike(saved.config, config, _STOPPING_FIELDS):
        saved.loop["stop_reason"] = None  # whoever asks for something else wants to go on
    notes = [f"skipped a broken checkpoint: {line}" for line in skipped]
    return saved, notes + [f"from here on: {change}" for change in changes]


def capture(
    train_step: TrainStep,
    state: TrainState,
    scores: dict[str, Scores],
    *,
    config: TrainConfig,
    plan: Plan,
    facts: dict[str, Any],
) -> Checkpoint:
    """The state of a run after the step that it has just done."""
    scaler = train_step.accelerator.scaler
    tensors = {"model": module_tensors(train_step.bare_model), "optimizer": optimizer_tensors(train_step.optimizer)}
    if train_step.average is not None:
        tensors["ema"] = module_tensors(train_step.average.module)
    return Checkpoint(
        step=state.step,
        tensors=tensors,
        loop=dataclasses.asdict(state),
        scaler=None if scaler is None else scaler.state_dict(),
        config=to_flat(config),
        plan=dataclasses.asdict(plan),
        facts=facts,
        scores={name: score.as_dict() for name, score in scores.items()},
    )


def restore(saved: Checkpoint, train_step: TrainStep) -> TrainState:
    """Puts the live objects where `saved` has them; returns the loop's state. Every rank must call this."""
    train_step.bare_model.load_state_dict(saved.tensors["model"])
    if train_step.average is not None:
        train_step.average.module.load_state_dict(saved.tensors["ema"])
    restore_optimizer(train_step.optimizer, saved.tensors["optimizer"])
    scaler = train_step.accelerator.scaler
    if scaler is not None and saved.scaler is not None:
        scaler.load_state_dict(saved.scaler)
    return TrainState.from_dict({**saved.loop, "is_stopping": False})
