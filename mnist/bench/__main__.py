"""Measures this project's loop against the usual loops, in one run, as ratios.

  python -m mnist.bench            the loops side by side
  python -m mnist.bench recipe     time and accuracy of a recipe over seeds
  python -m mnist.bench scaling    processes under DDP against processes that do not communicate
  python -m mnist.bench startup    where the time before the first step goes

In: options. Out: a table, or JSON. All take turns, and ratios are medians of the ratios within each round, so that what
else happens on the machine happens to all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from mnist.cli import parse_options, run_command
from mnist.config import DataConfig, DatasetName, TrainConfig, check_choice, evolve
from mnist.errors import RunError, UserError
from mnist.recipes import RECIPES

LEAST = {"images": 1, "repeats": 1, "seeds": 1, "processes": 2, "workers": 0, "num_threads": 0}


@dataclass(frozen=True)
class Options:
    """What to measure, and how often."""

    measure: tyro.conf.Positional[Literal["loops", "recipe", "scaling", "startup"]] = "loops"
    """What to measure."""
    recipe: tuple[str, ...] = ()
    """Recipes: network, batch, optimizer and loss; default convnet (loops, scaling) or fast (recipe, startup)."""
    dataset: DatasetName | None = None
    """The images; default the recipe's own."""
    data_dir: str = field(default_factory=lambda: DataConfig().data_dir)
    """Folder in torchvision's layout; default $MNIST_DATA_DIR, else "data"."""
    precisions: tuple[Literal["no", "bf16"], ...] = ("no", "bf16")
    """fp32 (no), bf16, or both (loops). With $ACCELERATE_DYNAMO_BACKEND this project runs compiled as well."""
    workers: int = 2
    """Data-loading processes of the usual pipeline's second row (loops)."""
    images: int = 6000
    """Images per measurement, for scaling per process."""
    repeats: int = 5
    """Measurements that count, after one that does not (not recipe)."""
    seeds: int = 20
    """Training runs, with seeds 0, 1, ... (recipe)."""
    processes: int = 2
    """Processes, of one thread each (scaling)."""
    num_threads: int = 0
    """CPU threads; 0 = all cores that this process may use."""
    cpu: bool = False
    """Measure on the CPU even where there is a GPU."""
    json: str | None = None
    """Also write the figures to this file; - = to standard output, instead of the table."""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be {least} or more")
        if not self.precisions:
            raise UserError("--precisions: give no, bf16 or both")
        for recipe in self.recipe:
            check_choice("--recipe", recipe, list(RECIPES))


if __name__ == "__main__":
    OPTIONS = parse_options(Options, "bench", str(__doc__))  # before torch is imported: --help answers at once

import torch

from mnist.bench.baselines import find_device, has_torchvision_files
from mnist.bench.comparison import Contestant, check_losses, compare, hold_contest, paired_ratio
from mnist.bench.scaling import ALONE, PROJECT, Turn, measure_scaling
from mnist.bench.scoreboard import Report, Row, environment, publish
from mnist.data import datasets
from mnist.data.transforms import Augmentation
from mnist.runs.console import count
from mnist.system.accelerator import open_accelerator
from mnist.system.environment import device_name
from mnist.system.process import num_usable_cores

ROOT = Path(__file__).parents[2]


def main(options: Options) -> int:
    """Measures, prints, and returns the exit code.

    Raises:
        UserError: several processes were started for what one measures.
    """
    is_launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if is_launched and options.measure != "scaling":
        raise UserError(f"{options.measure}: is measured by one process; start it without a launcher")
    if not is_launched and options.measure == "scaling":
        return launch_ranks(options)
    measure = {"loops": bench_loops, "recipe": bench_recipes, "scaling": bench_scaling, "startup": bench_startup}
    report = measure[options.measure](options)
    if os.environ.get("RANK", "0") == "0":
        publish(report, options.json)
    return 0


def bench_loops(options: Options) -> Report:
    """All loops on each recipe, in turns."""
    rows = []
    for recipe in options.recipe or ("convnet",):
        config = settle(recipe, options)
        entries = hold_contest(contestants(options), config, options.images, options.repeats)
        check_losses(entries)
        rows += compare(recipe, entries)
    is_real = has_torchvision_files(config.data.dataset, config.data.data_dir)
    source = "torchvision's class" if is_real else "a stand-in for torchvision's class, whose files are not there"
    device = device_used(options)
    return Report(
        title=f"training loops, {options.images:,} images a pass, {options.repeats} passes each in turns",
        environment=environment(threads(options), device) | {"data": f"{config.data.dataset}, {source}"},
        rows=rows,
        notes=[
            "x usual and over bare: medians of the ratios within each round; the bare loop of the same mode",
            "memory: " + ("resident set, libraries included, workers not" if device == "cpu" else "allocated on GPU"),
            f"bare loop and this project: equal losses, to {max(row['loss difference'] or 0 for row in rows):.1e}",
        ],
        hidden=("loss difference", "loss", "passes", "images seen"),
    )


def settle(recipe: str, options: Options) -> TrainConfig:
    """The recipe with its data set and threads settled, and without what the other loops have not got.

    Raises:
        UserError: its augmentation cannot be left out without changing its work.
    """
    config = RECIPES[recipe]()
    choice = datasets.choose(DataConfig(options.dataset or config.data.dataset, options.data_dir))
    config = evolve(
        config,
        dataset=choice.name,
        data_dir=options.data_dir,
        schedule="constant",
        grad_clip=0.0,
        ema=0.0,
        num_threads=threads(options),
        cpu=options.cpu,
    )
    if not Augmentation(config.image, 0, torch.device("cpu")).is_identity:
        raise UserError(f"--recipe {recipe}: has augmentation, which the other loops have not; choose another one")
    return config


def contestants(options: Options) -> list[Contestant]:
    """The usual loops; then the bare one and the project's in each precision, captured and compiled where possible."""
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    found = [Contestant("pipeline"), Contestant("prepared")]
    if options.workers:
        found.insert(1, Contestant("pipeline", num_workers=options.workers))
    for precision in options.precisions:
        found += [Contestant("bare", precision), Contestant("project", precision)]
        found += [Contestant("project", precision, dynamo=dynamo)] if dynamo != "no" else []
        if torch.cuda.is_available() and not options.cpu:
            found += [Contestant(loop, precision, step_mode="captured") for loop in ("bare", "project")]
    return found


def bench_recipes(options: Options) -> Report:
    """The whole command, seed after seed, in a temporary folder."""
    rows = []
    for recipe in options.recipe or ("fast",):
        results = []
        for seed in range(options.seeds):
            sys.stderr.write(f"{recipe}, seed {seed} ...\n")
            with tempfile.TemporaryDirectory() as folder:
                seconds = run_training(recipe, options, "--seed", str(seed), "--run-dir", folder)
                results.append(json.loads(Path(folder, "result.json").read_bytes()) | {"command_time_s": seconds})
        rows.append(summarise(recipe, results))
    return Report(
        title=f"recipes over {count(options.seeds, 'seed')} (accuracy: mean; times: medians)",
        environment=environment(threads(options, recipe), device_used(options)) | {"data": results[0]["dataset"]},
        rows=rows,
        notes=["command: python train_ddp.py as a whole, imports, evaluation and checkpoints included"],
        hidden=("accuracies",),
    )


def summarise(recipe: str, results: Sequence[Row]) -> Row:
    """A row from the result.json of several seeds."""
    accuracies = [100 * result["test"]["accuracy"] for result in results]
    return {
        "recipe": recipe,
        "runs": len(results),
        "accuracy %": statistics.mean(accuracies),
        "deviation": statistics.stdev(accuracies) if len(results) > 1 else None,
        "min": min(accuracies),
        "training s": statistics.median(result["train_time_s"] for result in results),
        "command s": statistics.median(result["command_time_s"] for result in results),
        "accuracies": accuracies,
    }


def run_training(recipe: str, options: Options, *flags: str) -> float:
    """Runs train_ddp.py; returns its seconds, from the command to its end.

    Raises:
        RunError: it failed; its last line says why.
    """
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "train_ddp.py"), *training_flags(recipe, options), *flags]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)  # noqa: S603
    if done.returncode:
        raise RunError(f"train_ddp.py --recipe {recipe}: exit code {done.returncode}; {done.stderr.strip()[-300:]}")
    return time.perf_counter() - started


def threads(options: Options, recipe: str = "fast") -> int:
    """CPU threads of one process."""
    return options.num_threads or RECIPES[recipe]().runtime.num_threads or num_usable_cores()


def device_used(options: Options) -> str:
    """What a run takes here: the GPU's name, or cpu."""
    return device_name(find_device(evolve(TrainConfig(), cpu=options.cpu)))


def training_flags(recipe: str, options: Options) -> list[str]:
    """The command line of a training run, without tracking, and without a gate: a low accuracy is a figure too."""
    flags = ["--recipe", recipe, "--data-dir", options.data_dir, "--wandb", "disabled", "--min-accuracy", "None"]
    flags += ["--dataset", options.dataset] if options.dataset else []
    flags += ["--num-threads", str(options.num_threads)] if options.num_threads else []
    return [*flags, *(["--cpu"] if options.cpu else [])]


def launch_ranks(options: Options) -> int:
    """Starts this command again in `processes` processes, once their work is known to be possible."""
    for recipe in options.recipe:
        settle(recipe, options)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(  # noqa: S603
        [*launcher, "-m", "mnist.bench", *sys.argv[1:]],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        check=False,
    ).returncode


def bench_scaling(options: Options) -> Report:
    """Every way to communicate against none. Every rank must call this."""
    rows = []
    configs = {name: evolve(settle(name, options), num_threads=1) for name in options.recipe or ("convnet",)}
    with open_accelerator(next(iter(configs.values())).runtime) as accelerator:
        for recipe, config in configs.items():
            split = datasets.read(config.data.dataset, config.data).train.to(accelerator.device)
            num_steps = max(1, options.images // config.loop.global_batch_size)
            turns = measure_scaling(accelerator, config, split, num_steps, options.repeats)
            rows += [{"recipe": recipe, "ranks": way, **compare_turns(turns[way], turns[ALONE])} for way in turns]
    return Report(
        title=f"{os.environ['WORLD_SIZE']} processes, the recipe's batch each, {options.repeats} rounds in turns",
        environment=environment(1, device_used(options)) | {"data": config.data.dataset},
        rows=rows,
        notes=[
            f"ratio: of images/s to '{ALONE}' in the same round; '{PROJECT}' is DDP as train_ddp.py sets it",
            "CPU ratio: the same of CPU time, without the waiting for one another that a busy machine adds",
        ],
    )


def compare_turns(turns: Sequence[Turn], alone: Sequence[Turn]) -> Row:
    """How much of its speed without communication a way keeps, by the clock and in CPU time."""
    ratios = [one.images_per_s / limit.images_per_s for one, limit in zip(turns, alone, strict=True)]
    return {
        "images/s": statistics.median(turn.images_per_s for turn in turns),
        "ratio": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "CPU ratio": paired_ratio([limit.cpu_s for limit in alone], [turn.cpu_s for turn in turns]),
    }


def bench_startup(options: Options) -> Report:
    """Fresh processes, a stage at a time, and the whole command."""
    rows = []
    for recipe in options.recipe or ("fast",):
        starts = [start_once(recipe, options) for _ in range(options.repeats + 1)][1:]  # the first one fills caches
        for stage in starts[0]:
            seconds = [start[stage] for start in starts]
            rows.append(
                {
                    "recipe": recipe,
                    "stage": stage,
                    "seconds": statistics.median(seconds),
                    "min": min(seconds),
                    "max": max(seconds),
                }
            )
    return Report(
        title=f"start-up, medians of {options.repeats} fresh processes",
        environment=environment(threads(options, recipe), device_used(options))
        | {"data": options.dataset or "the recipe's own"},
        rows=rows,
        notes=["the last two rows are whole commands: train_ddp.py --help, and train_ddp.py --max-steps 1"],
    )


def start_once(recipe: str, options: Options) -> dict[str, float]:
    """Seconds of each stage of one start; then of two whole commands."""
    command = [sys.executable, "-m", "mnist.bench.startup", *training_flags(recipe, options)]
    began = time.time()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RunError(f"mnist.bench.startup: exit code {done.returncode}; {done.stderr.strip()[-300:]}")
    inside = json.loads(done.stdout)
    with tempfile.TemporaryDirectory() as folder:
        return {
            "start Python": inside["began"] - began,
            **inside["stages"],
            "--help": run_training(recipe, options, "--help"),
            "--max-steps 1": run_training(recipe, options, "--max-steps", "1", "--run-dir", folder),
        }


if __name__ == "__main__":
    run_command(main, OPTIONS)
