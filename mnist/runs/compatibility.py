"""Whether a start continues an earlier one: the same run, under a configuration that may differ in some fields.

In: the configuration, plan and facts of both. Out: notes on what changes, or one line that names what must not differ.
"""

from __future__ import annotations

from typing import Any

from mnist.config import TrainConfig, fields_on_resume, to_flat
from mnist.errors import UserError
from mnist.runs.checkpoint_files import Checkpoint
from mnist.training.plan import Plan

LENGTH_BOUND_SCHEDULES = ("cosine", "one_cycle")


def check_same_run(old: dict[str, Any], config: TrainConfig) -> None:
    """Whether a run with the flat configuration `old` is the one that `config` describes.

    Raises:
        UserError: it is another one. Names the fields with both values.
    """
    new = to_flat(config)
    differing = [name for name in fields_on_resume("fixed") if old.get(name) != new[name]]
    if differing:
        listed = ", ".join(f"--{n.replace('_', '-')} was {old.get(n)}, now {new[n]}" for n in differing)
        place = f"--run-dir {config.output.run_dir}: " if config.output.run_dir else ""
        raise UserError(
            f"{place}this run (recipe {old.get('recipe')}) has another configuration: {listed}; "
            "use --resume never to start over, or another --run-dir"
        )


def check_compatible(checkpoint: Checkpoint, config: TrainConfig, plan: Plan, facts: dict[str, Any]) -> list[str]:
    """Whether `checkpoint` may continue under `config` and `plan`; returns notes on what changes from here on.

    Raises:
        UserError: it would be another run, or its schedule does not fit the new length.
    """
    check_same_run(checkpoint.config, config)
    old, new, done = checkpoint.config, to_flat(config), checkpoint.step
    old_steps = checkpoint.plan["num_steps"]
    if checkpoint.facts.get("data_files") != facts["data_files"]:
        raise UserError("the data files have changed since this run began; use --resume never to start over")
    bound = [name for name in (old["schedule"], new["schedule"]) if name in LENGTH_BOUND_SCHEDULES]
    if plan.num_steps != old_steps and bound:
        raise UserError(
            f"--epochs/--max-steps: the {bound[0]} schedule was laid out for {old_steps} steps and cannot go on "
            f"to {plan.num_steps}; use --resume never to start over"
        )
    if plan.num_steps < done:
        raise UserError(f"--epochs/--max-steps: {plan.num_steps} steps, but the checkpoint has done {done}")
    noted = (*fields_on_resume("noted"), *fields_on_resume("course"))
    notes = [f"{name} {old.get(name)} -> {new[name]}" for name in noted if old.get(name) != new[name]]
    notes += [f"{name} {was} -> {facts.get(name)}" for name, was in checkpoint.facts.items() if was != facts.get(name)]
    if plan.accumulation_steps != checkpoint.plan["accumulation_steps"]:
        notes.append(f"accumulation {checkpoint.plan['accumulation_steps']} -> {plan.accumulation_steps}")
    if plan.world_size != checkpoint.plan["world_size"]:
        notes.append(f"processes {checkpoint.plan['world_size']} -> {plan.world_size} (same global batches)")
    return notes
