"""Which configuration may continue a run, and what changes then. Nothing here touches the disk or the network.

In: the records of an earlier start, and the configuration of this one. Out: yes or no, notes, or a one-line error.
The fields of the configuration themselves say what a difference means (`on_resume`, mnist/config.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from mnist.config import TrainConfig, fields_on_resume, from_flat, to_flat
from mnist.errors import RunError, UserError
from mnist.runs.checkpoint_files import Checkpoint
from mnist.runs.directory import RunDirectory, branch_origin
from mnist.training.plan import Plan

LENGTH_BOUND_SCHEDULES = ("cosine", "one_cycle")  # they span the whole run, so that their length is fixed
_STOPPING_FIELDS = ("target_accuracy", "target_loss", "patience")


def check_directory(directory: RunDirectory, config: TrainConfig) -> None:
    """Whether this start may write into `directory`: it is empty, or holds the same run.

    Raises:
        UserError: it holds another run, or any run with --resume never. Names the fields that differ, and what to do.
        RunError: it holds this run, which diverged, and would again.
    """
    before, result = directory.config, directory.result
    if before is None:
        return
    place, checkpoints = f"--run-dir {directory.path}", shlex.quote(str(directory.checkpoints))
    if config.output.resume == "never" and not directory.belongs_to_this_job:
        raise UserError(f"--resume never: {directory.path} holds a run already; choose another --run-dir")
    origin = branch_origin(config)
    if origin is not None and (result is None or result.origin != str(origin)):
        raise UserError(
            f"--resume {config.output.resume}: starts a new run, but {directory.path} holds one already; "
            "choose another --run-dir, or none"
        )
    changes = _differences(before, config, (*fields_on_resume("fixed"), *fields_on_resume("course")))
    if config.data.dataset == "folder" and "--mean was" in changes:
        changes += " (where not given, these are of the training pictures: the data files have changed)"
    if changes:
        raise UserError(
            f"{place}: the run there (recipe {before.recipe}) has another configuration: {changes}; choose another "
            f"--run-dir for a new run, or start one from a checkpoint of this run: --resume {checkpoints}/step-..."
        )
    if result is not None and result.status == "diverged":
        raise RunError(
            f"{place}: this run diverged at step {result.steps} and would again; start a new one from an earlier "
            f"checkpoint with a smaller --lr: --resume {checkpoints}/step-..."
        )


def is_finished(directory: RunDirectory, config: TrainConfig, plan: Plan) -> bool:
    """Whether an earlier start in this directory has done all that is asked for now."""
    before, result = directory.config, directory.result
    if before is None or result is None or result.status != "finished":
        return False
    stopped_for_other_reasons = result.stop_reason is not None and bool(_differences(before, config, _STOPPING_FIELDS))
    return plan.num_steps <= result.planned_steps and not stopped_for_other_reasons


def check_checkpoint(saved: Checkpoint, config: TrainConfig, plan: Plan, facts: dict[str, Any]) -> list[str]:
    """Whether the run may continue from `saved`; returns a note on each thing that changes from here on.

    Args:
        saved: a checkpoint of this run, or of the run that this one branches from.
        config: of this start.
        plan: of this start.
        facts: what the result depends on besides the configuration: data_files, code, threads.

    Raises:
        UserError: a setting that must not change, or the data, has changed; or the schedule cannot get a new length.
    """
    before = from_flat(saved.config)
    changes = _differences(before, config, fields_on_resume("fixed"))
    if changes:
        raise UserError(f"the checkpoint of step {saved.step} is of another run: {changes}; start a new run without it")
    if saved.facts.get("data_files") != facts["data_files"]:
        raise UserError("the data files have changed since this run began; start a new run in another --run-dir")
    old_steps, schedules = saved.plan.num_steps, (before.optim.schedule, config.optim.schedule)
    bound = [name for name in schedules if name in LENGTH_BOUND_SCHEDULES]
    if plan.num_steps != old_steps and bound:
        raise UserError(
            f"--epochs/--max-steps: the {bound[0]} schedule was laid out for {old_steps} steps and cannot be made "
            f"{plan.num_steps}; start a new run in another --run-dir"
        )
    if plan.num_steps < saved.step:
        raise UserError(f"--epochs/--max-steps: {plan.num_steps} steps, but the checkpoint has done {saved.step}")
    return _notes(saved, before, config, plan, facts)


def _notes(saved: Checkpoint, before: TrainConfig, config: TrainConfig, plan: Plan, facts: dict[str, Any]) -> list[str]:
    names = (*fields_on_resume("course"), *fields_on_resume("noted"))
    changes = _differences(before, config, names)
    notes = [f"from here on: {changes}"] if changes else []
    if saved.facts.get("code") != facts["code"]:
        notes.append("the code that trains has changed since this checkpoint was written: no longer bit for bit")
    if saved.facts.get("threads") != facts["threads"]:
        notes.append(f"from here on: threads {saved.facts.get('threads')} -> {facts['threads']}")
    if plan.world_size != saved.plan.world_size:
        notes.append(f"from here on: processes {saved.plan.world_size} -> {plan.world_size} (same global batches)")
    return notes


def asks_for_more(saved: Checkpoint, config: TrainConfig, plan: Plan) -> bool:
    """Whether this start changes the length, or the targets that ended the run of `saved` early."""
    return saved.plan.num_steps != plan.num_steps or bool(
        _differences(from_flat(saved.config), config, _STOPPING_FIELDS)
    )


def how_to_continue(directory: RunDirectory, config: TrainConfig) -> str:
    """What can be typed in the directory of a finished run."""
    more = "a larger --max-steps" if config.loop.max_steps else "more --epochs"
    is_bound = config.optim.schedule in LENGTH_BOUND_SCHEDULES
    longer = "" if is_bound else f"--resume {shlex.quote(str(directory.path))} with {more} continues it; "
    return f"{longer}another --run-dir, or none, starts a new run"


def _differences(before: TrainConfig, config: TrainConfig, names: Sequence[str]) -> str:
    """The fields that differ, with both values, for people; empty if none does."""
    old, new = to_flat(before), to_flat(config)
    changed = [name for name in names if old[name] != new[name]]
    return ", ".join(f"--{name.replace('_', '-')} was {old[name]}, now {new[name]}" for name in changed)
