"""Measures this project's loop against the usual loops, in one run, as ratios.

  python -m mnist.bench                                   this loop and the usual loops
  torchrun --nproc-per-node 2 -m mnist.bench scaling      processes under DDP, and without communication
  python -m mnist.bench front --publish                   the usual MNIST scripts beside our recipes (own --help)

In: options. Out: a table, or JSON. All take turns, and ratios are medians of the ratios within each round, so that
other work on the machine slows all of them alike. (Time and accuracy of a recipe over seeds: mnist.reproduce.)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

import tyro

from mnist.cli import parse_options, run_command
from mnist.config import DataConfig, DatasetName, TrainConfig, check_choice, check_fields, evolve, option
from mnist.errors import UserError, is_first_rank, is_one_of_several
from mnist.recipes import RECIPES


@dataclass(frozen=True)
class Options:
    """What to measure, and how often."""

    measure: tyro.conf.Positional[Literal["loops", "scaling"]] = "loops"
    """What to measure."""
    recipe: tuple[str, ...] = ("convnet",)
    """Recipes: network, batch, optimizer and loss."""
    dataset: DatasetName | None = None
    """The images; default the recipe's own."""
    data_dir: str = field(default_factory=lambda: DataConfig().data_dir)
    """Folder of the data; default $MNIST_DATA_DIR, else "data"."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision of all of them."""
    workers: int = option(2, "Data-loading processes of the usual pipeline's second row; 0 = no such row.", "[0, 1024]")
    images: int = option(6000, "Images per measurement, for scaling per process.", "[1, 1e9]")
    repeats: int = option(5, "Measurements that count, after one that does not.", "[1, 1e6]")
    num_threads: int = option(0, "CPU threads per process; 0 = its share of the cores.", "[0, 1024]")
    cpu: bool = False
    """Measure on the CPU even where there is a GPU."""
    json: bool = False
    """Print one JSON document instead of the table."""

    def __post_init__(self) -> None:
        check_fields(self)
        for recipe in self.recipe:
            check_choice("--recipe", recipe, list(RECIPES))


@dataclass(frozen=True)
class FrontOptions:
    """Which of the usual scripts are run on MNIST, and how often."""

    scripts: tuple[str, ...] = ()
    """Names of scripts; default: all of them."""
    seeds: int = option(1, "Runs of each script; 0 = only show, or draw, what docs/ has.", "[0, 1e6]")
    data_dir: str = field(default_factory=lambda: DataConfig().data_dir)
    """Folder of MNIST; default $MNIST_DATA_DIR, else "data"."""
    publish: bool = False
    """Write docs/front.json and the picture docs/pictures/front.png, which are about CPUs."""
    num_threads: int = option(0, "CPU threads; 0 = all cores that this process may use.", "[0, 1024]")
    cpu: bool = False
    """Measure on the CPU even where there is a GPU."""
    json: bool = False
    """Print one JSON document instead of the table."""

    def __post_init__(self) -> None:
        check_fields(self)


if __name__ == "__main__":  # before torch is imported: --help answers at once
    OPTIONS: Options | FrontOptions
    if sys.argv[1:2] == ["front"]:
        del sys.argv[1]
        OPTIONS = parse_options(FrontOptions, "bench front", __doc__, has_ranks=True)
    else:
        OPTIONS = parse_options(Options, "bench", __doc__, has_ranks=True)

import torch

from mnist.bench.baselines import find_device
from mnist.bench.comparison import Loop, check_losses, compare, measure_loops
from mnist.bench.front import DOCS, SCRIPTS, measure_all, points, publish
from mnist.bench.report import Report, environment, print_report
from mnist.bench.scaling import ALONE, PROJECT, compare_rates, measure_scaling
from mnist.data import datasets
from mnist.data.transforms import Augmentation
from mnist.system.accelerator import open_accelerator
from mnist.system.environment import device_name
from mnist.system.files import read_json
from mnist.system.process import num_usable_cores


def main(options: Options | FrontOptions) -> int:
    """Measures, prints, and returns the exit code.

    Raises:
        UserError: several processes were started for what one measures, or one for what several do.
    """
    if isinstance(options, Options) and options.measure == "scaling":
        if not is_one_of_several():
            raise UserError("scaling: needs several processes: torchrun --nproc-per-node 2 -m mnist.bench scaling")
        report = bench_scaling(options)
    elif is_one_of_several():
        raise UserError("bench: several processes measure scaling alone; start this without a launcher")
    else:
        report = bench_front(options) if isinstance(options, FrontOptions) else bench_loops(options)
    if is_first_rank():
        print_report(report, as_json=options.json)
    return 0


def bench_loops(options: Options) -> Report:
    """All loops on each recipe, in turns."""
    rows, differences = [], []
    num_threads = options.num_threads or num_usable_cores()
    for recipe in options.recipe:
        config = evolve(comparable_config(recipe, options), num_threads=num_threads)
        results = measure_loops(loops(options), config, options.images, options.repeats)
        differences.append(check_losses(results))
        rows += compare(recipe, results)
    device = find_device(config.runtime)
    return Report(
        title=f"training loops, {options.images:,} images a pass, {options.repeats} passes each in turns",
        environment=environment(num_threads, device_name(device), options.mixed_precision),
        rows=rows,
        notes=[
            "x usual, over bare: the median of all rounds' ratios; over bare: to the bare loop in the same mode",
            "memory: " + ("allocated on GPU" if device.type == "cuda" else "resident set, libraries included"),
            f"bare loop and this project: equal losses, to {max(differences):.1e}",
        ],
    )


def loops(options: Options) -> list[Loop]:
    """The usual loops; then the bare one and the project's, and both captured where there is a GPU."""
    found = [Loop("pipeline"), Loop("prepared"), Loop("bare"), Loop("project")]
    if options.workers:
        found.insert(1, Loop("pipeline", num_workers=options.workers))
    if torch.cuda.is_available() and not options.cpu:
        found += [Loop(name, step_mode="captured") for name in ("bare", "project")]
    return found


def bench_scaling(options: Options) -> Report:
    """DDP, and one number a step, against no communication. Every rank must call this."""
    rows = []
    configs = {name: comparable_config(name, options) for name in options.recipe}
    with open_accelerator(next(iter(configs.values())).runtime) as accelerator:
        for recipe, config in configs.items():
            dataset = datasets.read(config.data.dataset, config.data, size=config.image.image_size)
            num_steps = max(1, options.images // config.loop.global_batch_size)
            rates = measure_scaling(accelerator, config, dataset.to(accelerator.device), num_steps, options.repeats)
            rows += [{"recipe": recipe, "ranks": way, **compare_rates(rates[way], rates[ALONE])} for way in rates]
        where = environment(torch.get_num_threads(), device_name(accelerator.device), options.mixed_precision)
        return Report(
            title=f"{accelerator.num_processes} processes, the recipe's batch each, {options.repeats} rounds in turns",
            environment=where,
            rows=rows,
            notes=[f"ratio: of images/s to '{ALONE}' in the same round; '{PROJECT}' is DDP as train_ddp.py sets it"],
        )


def comparable_config(recipe: str, options: Options) -> TrainConfig:
    """The recipe with its data set resolved, and without what the other loops do not have.

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
        mixed_precision=options.mixed_precision,
        num_threads=options.num_threads,
        cpu=options.cpu,
    )
    if not Augmentation(config.image, 0, torch.device("cpu")).is_identity:
        raise UserError(f"--recipe {recipe}: has augmentation, which the other loops lack; choose another recipe")
    return datasets.resolve(config, datasets.read(choice.name, config.data, size=config.image.image_size))


def bench_front(options: FrontOptions) -> Report:
    """The usual scripts, measured here, beside the recipes as docs/results.json has them.

    Raises:
        UserError: what is measured on a GPU cannot be published.
    """
    for name in options.scripts:
        check_choice("--scripts", name, list(SCRIPTS))
    num_threads = options.num_threads or num_usable_cores()
    config = evolve(TrainConfig(), dataset="mnist", data_dir=options.data_dir, num_threads=num_threads, cpu=options.cpu)
    device = find_device(config.runtime)
    if options.publish and options.seeds and device.type != "cpu":
        raise UserError("--publish: docs/front.json is about CPUs; add --cpu")
    rows = []
    if options.seeds:
        datasets.choose(config.data)  # downloads what is missing
        torch.set_num_threads(num_threads)
        dataset = datasets.read("mnist", config.data)
        rows = measure_all(options.scripts or SCRIPTS, config, dataset.train, dataset.test, options.seeds)
    if options.publish:
        publish(rows)
    measured = {row["script"] for row in rows}
    rows += [row for row in read_json(DOCS / "front.json")["rows"] if row["script"] not in measured]
    shown = points(read_json(DOCS / "results.json"), {"rows": rows})
    return Report(
        title=f"the usual scripts, {options.seeds} seeds each, and the recipes of docs/results.json",
        environment=environment(num_threads, device_name(device)),
        rows=[{name: value for name, value in point.items() if name != "ours"} for point in shown],
        notes=["seconds: of training alone; recipes, and scripts that were not run now, on the hardware of their row"],
    )


if __name__ == "__main__":
    run_command(main, OPTIONS)
