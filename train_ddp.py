"""Trains an MNIST digit recogniser with Accelerate: on a CPU, one GPU or many, whatever command starts the processes.

    accelerate launch train_ddp.py --recipe lenet5
    torchrun --nproc-per-node 2 train_ddp.py
    python train_ddp.py --help

A training step is in mnist/training/step.py, the loop in mnist/training/loop.py, configurations in mnist/recipes.py.
"""

from __future__ import annotations

import time

from mnist.system import process, signals

STARTED_S = time.perf_counter()
if __name__ == "__main__":
    # Importing torch takes a second: signals are handled, and --help and mistyped flags answered, before it.
    signals.install()
    process.tune()
    from mnist.cli import parse_command_line
    from mnist.runs.console import Console

    CONFIG = parse_command_line()
    CONSOLE = Console(quiet=CONFIG.output.quiet)
    CONSOLE.show("importing torch")

from accelerate import Accelerator

from mnist.config import TrainConfig
from mnist.data import datasets
from mnist.errors import RunError, UserError, print_error
from mnist.plots.run_pictures import write_run_pictures
from mnist.runs import resume
from mnist.runs.checkpointing import Checkpointing, resume_run
from mnist.runs.console import Console
from mnist.runs.directory import open_run_directory
from mnist.runs.result import Result
from mnist.runs.run import Run, exit_code, report_finished
from mnist.runs.setup import RunSetup
from mnist.runs.tracking.tracker import tracker_names
from mnist.runs.validation import Validation
from mnist.system.accelerator import open_accelerator
from mnist.system.host import restored_afterwards
from mnist.system.launcher import fill_in
from mnist.training.build import build_train_loader, build_train_step
from mnist.training.loop import TrainState, train_one_epoch
from mnist.training.plan import build_plan


def main(config: TrainConfig, console: Console | None = None, started_s: float | None = None) -> int:
    """The command: 0 = finished, 1 = failed, diverged or below --min-accuracy, 2 = wrong usage, 75 = preempted."""
    try:
        return exit_code(config, train(config, console, started_s))
    except (UserError, RunError) as error:
        if config.output.debug:
            raise
        return print_error(error)


@restored_afterwards()
def train(config: TrainConfig, console: Console | None = None, started_s: float | None = None) -> Result:
    """One run in this process, timed from `started_s` on (`time.perf_counter()`; default: now).

    Every rank must call this. Ctrl-C, or the interrupt of a notebook's kernel, saves: the result is `preempted` then.
    Raises UserError for what the caller can correct (the message names the flag), and RunError for what ended the run.
    """
    started_s = time.perf_counter() if started_s is None else started_s
    config = fill_in(config)
    console = console or Console(quiet=config.output.quiet)
    with console, open_accelerator(config.runtime, tracker_names(config.output)) as accelerator:
        return run_training(config, accelerator, console, started_s)  # its model is freed before the group closes


def run_training(config: TrainConfig, accelerator: Accelerator, console: Console, started_s: float) -> Result:
    """The run between the start and the end of the process group."""
    console.show("reading the data")
    dataset = datasets.load(config.data, accelerator, config.image.image_size, console.show_progress)
    config = datasets.resolve(config, dataset)
    plan = build_plan(config, len(dataset.train), accelerator.num_processes)

    directory = open_run_directory(config, dataset.name, accelerator)
    resume.check_directory(directory, config)
    if resume.is_finished(directory, config, plan):
        return report_finished(directory, config, console)
    train_loader = build_train_loader(config, plan, dataset.train, accelerator)
    train_step = build_train_step(config, accelerator, dataset.info, plan)
    state = TrainState()
    setup = RunSetup(config, plan, dataset, directory, train_step, state)
    notes = resume_run(setup)

    with Run(setup, console, notes=notes, started_s=started_s, draw=write_run_pictures) as run:
        validation = Validation(setup, run.tracker, console, run.heartbeat)
        checkpointing = Checkpointing(setup, run.tracker, validation)
        run.warm_up(train_loader)
        while not run.is_over():
            steps = run.with_injected_faults(train_loader.steps(state.step, plan.next_epoch_end(state.step)))
            steps = run.with_profile(steps)
            for record in train_one_epoch(train_step, steps, state, pauses_at=plan.pauses_at, heartbeat=run.heartbeat):
                run.log(record)
                if plan.evaluates_at(record.step):
                    validation.score()
                if checkpointing.is_due():
                    checkpointing.save()
        return run.finish(validation, checkpointing)


if __name__ == "__main__":
    process.leave(main(CONFIG, CONSOLE, STARTED_S))
