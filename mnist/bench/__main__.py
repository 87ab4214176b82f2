"""Measures this project's loop against the usual loops, in one run, as ratios.

  python -m mnist.bench                    this loop and the usual loops
  python -m mnist.bench scaling            processes under DDP, and processes that do not communicate
  python -m mnist.bench front --publish    the usual MNIST scripts: accuracy and time, beside those of our recipes

In: options. Out: a table, or JSON. All take turns, and ratios are medians of the ratios within each round, so that
other work on the machine slows all of them alike. (Time and accuracy of a recipe over seeds: mnist.reproduce.)
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from mnist.cli import parse_options, run_command
from mnist.config import DataConfig, DatasetName, TrainConfig, check_choice, evolve
from mnist.errors import UserError, is_first_rank, is_one_of_several
from mnist.recipes import RECIPES

MINIMUM = {"images": 1, "repeats": 1, "seeds": 0, "processes": 2, "workers": 0, "num_threads": 0}


@dataclass(frozen=True)
class Options:
    """What to measure, and how often."""

    measure: tyro.conf.Positional[Literal["loops", "scaling", "front"]] = "loops"
    """What to measure."""
    recipe: tuple[str, ...] = ("convnet",)
    """Recipes: network, batch, optimizer and loss."""
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
    """Measurements that count, after one that does not."""
    processes: int = 2
    """Processes, of one thread each (scaling)."""
    scripts: tuple[str, ...] = ()
    """Names of scripts; default: all of them (front)."""
    seeds: int = 1
    """Runs of each script; 0 = only show, or draw, what docs/ has (front)."""
    publish: bool = False
    """Write docs/front.json and the picture docs/pictures/front.png (front)."""
    num_threads: int = 0
    """CPU threads; 0 = all cores that this process may use."""
    cpu: bool = False
    """Measure on the CPU even where there is a GPU."""
    json: bool = False
    """Print one JSON document instead of the table."""

    def __post_init__(self) -> None:
        for name, minimum in MINIMUM.items():
            value = getattr(self, name)
            if value < minimum:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be {minimum} or more")
        if not self.precisions:
            raise UserError("--precisions: give no, bf16 or both")
        for recipe in self.recipe:
            check_choice("--recipe", recipe, list(RECIPES))


if __name__ == "__main__":
    OPTIONS = parse_options(
        Options, "bench", __doc__, has_ranks=True
    )  # before torch is imported: --help answers at once

import torch

from mnist.bench.baselines import find_device, has_torchvision_files
from mnist.bench.comparison import Loop, check_losses, compare, measure_loops, paired_ratio
from mnist.bench.front import DOCS, SCRIPTS, measure_all, points, publish
from mnist.bench.report import Report, Row, environment, print_report
from mnist.bench.scaling import ALONE, PROJECT, Turn, measure_scaling
from mnist.data import datasets
from mnist.data.transforms import Augmentation
from mnist.system.accelerator import open_accelerator
from mnist.system.environment import device_name
from mnist.system.files import read_json
from mnist.system.process import num_usable_cores

ROOT = Path(__file__).parents[2]


def main(options: Options) -> int:
    """Measures, prints, and returns the exit code.

    Raises:
        UserError: several processes were started for what one measures.
    """
    is_launched = is_one_of_several()
    if is_launched and options.measure != "scaling":
        raise UserError(f"{options.measure}: is measured by one process; start it without a launcher")
    if not is_launched and options.measure == "scaling":
        return launch_ranks(options)
    report = {"loops": bench_loops, "scaling": bench_scaling, "front": bench_front}[options.measure](options)
    if is_first_rank():
        print_report(report, as_json=options.json)
    return 0


def bench_loops(options: Options) -> Report:
    """All loops on each recipe, in turns."""
    rows = []
    for recipe in options.recipe:
        config = comparable_config(recipe, options)
        results = measure_loops(loops(options), config, options.images, options.repeats)
        check_losses(results)
        rows += compare(recipe, results)
    is_real = has_torchvision_files(config.data.dataset, config.data.data_dir)
    source = "torchvision's class" if is_real else "a stand-in for torchvision's class, whose files are not there"
    device = device_used(options)
    return Report(
        title=f"training loops, {options.images:,} images a pass, {options.repeats} passes each in turns",
        environment=environment(threads(options), device) | {"data": f"{config.data.dataset}, {source}"},
        rows=rows,
        notes=[
            "x usual, over bare: the median of all rounds' ratios; over bare: to the bare loop in the same mode",
            "memory: " + ("resident set, libraries included, workers not" if device == "cpu" else "allocated on GPU"),
            f"bare loop and this project: equal losses, to {max(row['loss difference'] or 0 for row in rows):.1e}",
        ],
        hidden=("loss difference", "loss", "passes", "images seen"),
    )


def bench_front(options: Options) -> Report:
    """The usual scripts, measured here, beside the recipes as docs/results.json has them."""
    for name in options.scripts:
        check_choice("--scripts", name, list(SCRIPTS))
    choice = datasets.choose(DataConfig(options.dataset or "mnist", options.data_dir))
    config = evolve(
        TrainConfig(), dataset=choice.name, data_dir=options.data_dir, num_threads=threads(options), cpu=options.cpu
    )
    torch.set_num_threads(threads(options))
    dataset = datasets.read(choice.name, config.data, size=config.image.image_size)
    rows = measure_all(options.scripts or SCRIPTS, config, dataset.train, dataset.test, options.seeds)
    if options.publish:
        publish(rows)
    kept = read_json(DOCS / "front.json")["rows"]
    measured = {row["script"] for row in rows}
    rows += [row for row in kept if row["script"] not in measured]
    return Report(
        title=f"the usual scripts, {options.seeds} seeds each, and the recipes of docs/results.json",
        environment=environment(threads(options), device_used(options)) | {"data": choice.name},
        rows=points(read_json(DOCS / "results.json"), {"rows": rows}),
        notes=["seconds: of training alone; recipes, and scripts that were not run now, on the hardware of their row"],
        hidden=("hardware", "ours"),
    )


def comparable_config(recipe: str, options: Options) -> TrainConfig:
    """The recipe with its data set and threads resolved, and without what the other loops do not have.

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
        raise UserError(f"--recipe {recipe}: has augmentation, which the other loops lack; choose another recipe")
    return datasets.resolve(config, datasets.read(choice.name, config.data, size=config.image.image_size))


def loops(options: Options) -> list[Loop]:
    """The usual loops; then the bare one and the project's in each precision, captured and compiled where possible."""
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    found = [Loop("pipeline"), Loop("prepared")]
    if options.workers:
        found.insert(1, Loop("pipeline", num_workers=options.workers))
    for precision in options.precisions:
        found += [Loop("bare", precision), Loop("project", precision)]
        found += [Loop("project", precision, dynamo=dynamo)] if dynamo != "no" else []
        if torch.cuda.is_available() and not options.cpu:
            found += [Loop(loop, precision, step_mode="captured") for loop in ("bare", "project")]
    return found


def threads(options: Options) -> int:
    """CPU threads of one process."""
    return options.num_threads or num_usable_cores()


def device_used(options: Options) -> str:
    """The GPU's name, or cpu."""
    return device_name(find_device(evolve(TrainConfig(), cpu=options.cpu)))


def launch_ranks(options: Options) -> int:
    """Starts this command again in `processes` processes, once their work is known to be possible."""
    for recipe in options.recipe:
        comparable_config(recipe, options)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(  # noqa: S603
        [*launcher, "-m", "mnist.bench", *sys.argv[1:]],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        check=False,
    ).returncode


def bench_scaling(options: Options) -> Report:
    """DDP, and one number a step, against no communication. Every rank must call this."""
    rows = []
    configs = {name: evolve(comparable_config(name, options), num_threads=1) for name in options.recipe}
    with open_accelerator(next(iter(configs.values())).runtime) as accelerator:
        for recipe, config in configs.items():
            dataset = datasets.read(config.data.dataset, config.data, size=config.image.image_size).to(
                accelerator.device
            )
            num_steps = max(1, options.images // config.loop.global_batch_size)
            turns = measure_scaling(accelerator, config, dataset, num_steps, options.repeats)
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
    """The share of the speed without communication that is left, by the clock and in CPU time."""
    ratios = [one.images_per_s / limit.images_per_s for one, limit in zip(turns, alone, strict=True)]
    return {
        "images/s": statistics.median(turn.images_per_s for turn in turns),
        "ratio": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "CPU ratio": paired_ratio([limit.cpu_s for limit in alone], [turn.cpu_s for turn in turns]),
    }


if __name__ == "__main__":
    run_command(main, OPTIONS)
