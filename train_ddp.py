"""Trains an MNIST digit recogniser with Accelerate: on a CPU, one GPU or many, whatever command starts the processes.

    accelerate launch train_ddp.py --recipe lenet5
    torchrun --nproc-per-node 2 train_ddp.py
    python train_ddp.py --help

This file is the table of contents of a run. A training step is in mnist/training/step.py, the recipes are in
mnist/recipes.py.
"""

from __future__ import annotations

import time
from functools import partial

from mnist.system import process, signals

STARTED = time.perf_counter()
if __name__ == "__main__":
    # Torch takes a second to import. A signal may come in it, and --help and mistyped flags are answered before it.
    signals.install()
    process.tune()
    from mnist.cli import parse_command_line
    from mnist.runs.console import Console

    CONFIG = parse_command_line()
    CONSOLE = Console(quiet=CONFIG.output.quiet)
    CONSOLE.show("importing torch")

from accelerate import Accelerator

from mnist.config import TrainConfig, evolve
from mnist.data import datasets
from mnist.data.batches import TrainLoader
from mnist.errors import RunError, UserError, print_error
from mnist.plots.gallery import write_run_pictures
from mnist.runs.console import Console
from mnist.runs.run import Run
from mnist.runs.tracking.tracker import tracker_names
from mnist.system import drills, ranks
from mnist.system.accelerator import open_accelerator
from mnist.system.launcher import fill_in
from mnist.training.build import build_train_step
from mnist.training.loop import train_one_epoch
from mnist.training.plan import build_plan


def main(config: TrainConfig, console: Console | None = None) -> int:
    """One run on every rank. Returns the exit code: 0 finished, 1 failed, 2 wrong usage, 75 preempted."""
    console = console or Console(quiet=config.output.quiet)
    try:
        config = fill_in(config)
        with console, open_accelerator(config.runtime, tracker_names(config.output)) as accelerator:
            return train(config, accelerator, console)
    except (UserError, RunError) as error:
        if config.output.debug:
            raise
        return print_error(error)


def train(config: TrainConfig, accelerator: Accelerator, console: Console) -> int:
    """Builds everything, resumes, trains, finishes."""
    console.show("reading the data")
    together = partial(ranks.together, accelerator)  # some ranks work; all get the result, or raise the error

    choice = together(lambda: datasets.choose(config.data))
    config = evolve(config, dataset=choice.name)
    together(lambda: datasets.fetch(choice.name, config.data.data_dir), on="local_main")
    dataset = together(lambda: datasets.read(choice.name, config.data), on="all").to(accelerator.device)
    ranks.require_agreement(accelerator, data_files=dataset.fingerprint, seed=config.loop.seed, recipe=config.recipe)

    plan = build_plan(config, len(dataset.train), accelerator.num_processes, config.loop.gradient_accumulation_steps)
    train_loader = TrainLoader(
        dataset.train,
        global_batch_size=plan.global_batch_size,
        seed=config.loop.seed,
        rank=accelerator.process_index,
        world_size=plan.world_size,
        accumulation_steps=plan.accumulation_steps,
    )

    train_step = build_train_step(
        config,
        accelerator,
        num_steps=plan.num_steps,
        epoch_steps=plan.epoch_steps,
        accumulation_steps=plan.accumulation_steps,
    )
    with Run(config, plan, dataset, choice, accelerator, console, train_step, STARTED, write_run_pictures) as run:
        if run.is_finished():
            return run.exit_code()
        run.resume()
        run.begin(train_loader)
        while run.goes_on():
            steps = train_loader.steps(run.state.step, run.next_epoch_end())
            steps = drills.inject(steps, run.faults(), run.state.step, train_step.model.parameters())
            for record in train_one_epoch(
                train_step, steps, run.state, pauses_at=plan.pauses_at, heartbeat=run.heartbeat
            ):
                run.log(record)
                if plan.evaluates_at(record.step):
                    run.score()
                if run.should_save():
                    run.save()
        return run.finish()


if __name__ == "__main__":
    process.leave(main(CONFIG, CONSOLE))
