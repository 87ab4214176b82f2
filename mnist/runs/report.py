"""What a run says about itself: the banner, the warnings, result.json, the closing lines.

In: configuration, plan, facts and numbers. Out: rows of words for the console, dictionaries for files.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mnist.config import TrainConfig
from mnist.data.sources import info_of
from mnist.models import count_parameters
from mnist.recipes import run_name
from mnist.runs.console import Rows, count
from mnist.runs.directory import branch_origin
from mnist.runs.setup import RunSetup
from mnist.system.accelerator import executed_precision
from mnist.system.process import num_usable_cores, started_by
from mnist.training.loop import TrainState
from mnist.training.metrics import Scores
from mnist.training.plan import Plan

GUESSING_MARGIN = 0.01  # above the share of the most frequent class


def banner(setup: RunSetup, facts: dict[str, Any], environment: dict[str, Any]) -> Rows:
    """The plan of a run, a row per fact."""
    config, plan, dataset = setup.config, setup.plan, setup.dataset
    copies = dataset.train_copies
    sizes = f"{len(dataset.train):,} train" + (f" ({len(dataset.train) // copies:,} x {copies})" if copies > 1 else "")
    sizes += f" / {len(dataset.val):,} val" if dataset.val is not None else ""
    classes = "" if dataset.info.has_digits else f", {len(dataset.class_names)} classes"
    world = f"{count(plan.world_size, 'process')} ({environment['launcher']})"
    threads = count(environment["threads_per_process"], "thread")
    share = f"{plan.world_size} x {plan.accumulation_steps} x {plan.micro_batch_size}"
    optim, weights = config.optim, setup.state.initialised_from
    return [
        ("recipe", f"{run_name(config)}: {optim.model}, {facts['num_params']:,} parameters"),
        *([("weights", str(weights))] if weights is not None else []),
        ("data", f"{dataset.name}: {sizes} / {len(dataset.test):,} test{classes}"),
        ("device", f"{environment['ranks'][0]['device']}, {threads}, {world}"),
        ("precision", facts["precision"]),
        ("batch", f"{plan.global_batch_size} = processes x micro-batches x images {share}"),
        ("plan", f"{plan.describe_length()}; {optim.optimizer} {optim.lr:g}, {optim.schedule}"),
        ("run", str(setup.directory.path)),
    ]


def run_facts(setup: RunSetup) -> dict[str, Any]:
    """What result.json says of a run from its first step on."""
    config, accelerator = setup.config, setup.accelerator
    origin, weights = branch_origin(config), setup.state.initialised_from
    return {
        "recipe": run_name(config),
        "dataset": setup.dataset.name,
        "seed": config.loop.seed,
        "num_params": count_parameters(setup.train_step.bare_model),
        "world_size": accelerator.num_processes,
        "precision": executed_precision(accelerator),
        "evaluation": config.loop.evaluation,
        "origin": None if origin is None else str(origin),
        "initialised_from": None if weights is None else dataclasses.asdict(weights),
    }


def warnings(setup: RunSetup, *, has_resumed: bool) -> list[str]:
    """Warnings about the hardware, the data, the run directory, and faults that are injected on purpose."""
    path = setup.directory.path
    found = [*hardware_warnings(setup.accelerator), *setup.dataset.warnings]
    if setup.config.runtime.num_threads > torch.get_num_threads():  # see `build_accelerator`
        found.append(f"--num-threads {setup.config.runtime.num_threads}: a forked process can have one thread only")
    if setup.directory.lock is None:  # as on all ranks but 0, which print nothing
        found.append(f"--run-dir {path}: no locks on this file system; start no second run there")
    if setup.directory.config is not None and not has_resumed:
        found.append(f"--run-dir {path}: the earlier start saved no checkpoint; the run begins at its first step")
    if setup.config.output.inject:
        meaning = "not repeated, because this run was resumed" if has_resumed else "this run is made to fail"
        found.append(f"DRILL: --inject {' '.join(setup.config.output.inject)}: {meaning}")
    return found


def command_to_continue(run_dir: Path) -> str:
    """The command that continues a run on this machine, ready to be typed."""
    num_local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    starts = {
        "torchrun": f"torchrun --nproc-per-node {num_local} train_ddp.py",
        "accelerate launch": f"accelerate launch --num_processes {num_local} train_ddp.py",
    }
    start = starts.get(started_by(), "python train_ddp.py") if num_local != "1" else "python train_ddp.py"
    return f"{start} --resume {shlex.quote(str(run_dir))}"


def result(plan: Plan, state: TrainState, test: Scores | None) -> dict[str, Any]:
    """The numbers of result.json, apart from the facts that were known before the first step."""
    return {
        "epochs": plan.epochs_done(state.step),
        "steps": state.step,
        "planned_steps": plan.num_steps,
        "stop_reason": state.stop_reason,
        "test": None if test is None else test.as_dict(),
        "val": state.val_scores,
        "best": state.best,
        "test_confusion": None if test is None else test.confusion,
        "train_time_s": round(state.run_sums.time_s, 3),
        "images_per_s": round(state.run_sums.images_per_s, 1) or None,
    }


def missed_gate(config: TrainConfig, accuracy: float) -> str | None:
    """What to warn of where the test accuracy is below --min-accuracy."""
    gate = config.loop.min_accuracy
    return None if gate is None or accuracy >= gate else f"--min-accuracy {gate}: missed with {accuracy:.4f}"


def headline(accuracy: float) -> str:
    """What a person wants to know first."""
    return f"{accuracy:.2%} of the test images are classified correctly"


def closing(setup: RunSetup, test: Scores) -> Rows:
    """How a finished run went."""
    dataset, plan, state = setup.dataset, setup.plan, setup.state
    chosen = "weights with the best validation accuracy" if dataset.val is not None else "last weights"
    name = f"NOT MNIST, {dataset.name}" if dataset.is_fallback else dataset.name
    counts = f"{test.num_correct:,}/{test.num_samples:,}"
    rows = [("test", f"{name}: accuracy {test.accuracy:.2%} ({counts}), loss {test.loss:.4f}, {chosen}")]
    most_frequent = max(sum(row) for row in test.confusion) / test.num_samples
    if test.accuracy <= most_frequent + GUESSING_MARGIN:
        advice = f"no better than one answer for all images ({most_frequent:.2%}): nothing was learnt; a smaller --lr?"
        rows.append(("remark", advice))
    if worst := worst_classes(test, dataset.class_names):
        rows.append(("worst", worst))
    if state.stop_reason:
        rows.append(("stopped", f"{state.stop_reason} after step {state.step} of {plan.num_steps}"))
    return rows


def worst_classes(test: Scores, class_names: Sequence[str], most: int = 3) -> str:
    """The classes with the lowest accuracy, such as "9 98.12%, 5 98.43%, 8 98.77%"; empty where all are right."""
    rates = zip(test.accuracy_per_class, class_names, strict=True)
    faulty = sorted((rate, name) for rate, name in rates if rate is not None and rate < 1)
    return ", ".join(f"{name} {rate:.2%}" for rate, name in faulty[:most])


def next_commands(path: Path, dataset: str) -> list[str]:
    """What to type after a finished run, quoted for a shell."""
    run = shlex.quote(str(path))
    first = "predict docs/digit.png" if info_of(dataset).has_digits else "evaluate"
    return [f"python -m mnist.{first} --run {run}", f"python -m mnist.plots mistakes --run {run}"]


def hardware_warnings(accelerator: Accelerator) -> list[str]:
    """A line about GPUs that are not used, or about more threads than cores."""
    num_processes, num_threads = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.get_num_threads()
    if accelerator.device.type == "cuda":
        visible = torch.cuda.device_count()
        hint = f"{visible} GPUs visible, {num_processes} in use: add --num_processes {visible} to accelerate launch"
        return [hint] if visible > num_processes else []
    share = max(1, num_usable_cores() // num_processes)
    hint = f"--num-threads {num_threads}: a process has {count(share, 'core')} here, and more threads are slower"
    return [hint] if num_threads > share else []
