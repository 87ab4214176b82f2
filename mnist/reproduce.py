"""Time and accuracy of recipes over seeds, each run by the command that a person would type.

    python -m mnist.reproduce --recipe fast --seeds 20
    python -m mnist.reproduce --publish                                every recipe, for the README
    python -m mnist.reproduce --recipe fast --versus balanced          two recipes, seed by seed
    python -m mnist.reproduce --recipe fast --versus main              the code of this commit and of another one
    python -m mnist.reproduce --recipe accurate --sample-steps 200     not to the end: for its time alone

In: names of recipes, a number of seeds. Out: a table of mean, deviation, minimum and times; with --publish also
docs/results.json and the table in README.md, where rows of other recipes and of the other kind of device stay; with
--versus the mean difference, its confidence interval, and whether the weights are identical. Finished runs are kept and
not run again: an interrupted call, started again, continues where it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from scipy.special import stdtrit

from mnist.cli import parse_options, run_command
from mnist.config import Precision, check_choice, check_fields, option
from mnist.errors import RunError, UserError
from mnist.recipes import RECIPES
from mnist.runs.console import count
from mnist.runs.records import read_run_record
from mnist.runs.tracking.jsonl import read_records
from mnist.system.files import read_json, write_atomically, write_json
from mnist.system.process import cpu_name, num_usable_cores

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results.json"
README = ROOT / "README.md"
_BEGIN, _END = "<!-- results -->", "<!-- /results -->"
EXIT_INTERRUPTED = 130
_AGAIN = "-again"  # ends the name of the second side where both are the same, so that it is run as well


@dataclass(frozen=True)
class Options:
    """What is run, and where results go."""

    recipe: tuple[str, ...] = tuple(RECIPES)
    """Names of recipes."""
    seeds: int = option(3, "Seeds 0 .. n - 1 of each.", "[1, 1e6]")
    sample_steps: int = option(
        0, 'Steps to take, to extrapolate the time; the accuracy is then "not measured". 0 = to the end.', "[0, 1e9]"
    )
    num_threads: int = option(0, "CPU threads of a run; 0 = all cores.", "[0, 1024]")
    mixed_precision: Precision = "no"
    """Precision of all runs."""
    runs_dir: str = "runs/reproduce"
    """Where the runs are kept."""
    publish: bool = False
    """Write docs/results.json and the README's table."""
    json: bool = False
    """Print one JSON document instead of the table."""
    versus: str | None = None
    """Compare with this recipe, or with the code of this commit, over the same seeds in turns."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.recipe:
            check_choice("--recipe", name, list(RECIPES))
        num_recipes = len(self.recipe)
        if self.versus is not None and (num_recipes != 1 or self.publish or self.sample_steps):
            raise UserError(f"--versus {self.versus}: needs one --recipe, and neither --publish nor --sample-steps")


@dataclass(frozen=True)
class Side:
    """What is run: a recipe, the checkout of this repository that trains it, and the name of its run directories."""

    recipe: str
    name: str
    root: Path = ROOT

    def folder(self, seed: int, options: Options) -> Path:
        """The run directory of a seed."""
        precision = "" if options.mixed_precision == "no" else f"-{options.mixed_precision}"
        return Path(options.runs_dir, f"{self.name}-seed{seed}{precision}" + "-sample" * (options.sample_steps > 0))


def main(options: Options) -> int:
    """Runs what is missing and prints a row per recipe; after Ctrl-C, rows of the seeds that are finished."""
    if options.versus is not None:
        return compare(options, options.versus)
    rows: list[dict[str, Any]] = []
    code = 0
    for recipe in options.recipe:
        runs: list[dict[str, Any]] = []
        try:
            for seed in range(options.seeds):
                runs.append(_run(Side(recipe, recipe), seed, options))  # noqa: PERF401 - Ctrl-C keeps the earlier ones
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
        if runs:
            rows.append(summarise(recipe, runs, is_sample=options.sample_steps > 0))
        if code:
            break
        if options.publish:
            _publish(rows[-1])
    sys.stdout.write(json.dumps({"rows": rows}, indent=2) + "\n" if options.json else render({"rows": rows}))
    return code


def _publish(row: dict[str, Any]) -> None:
    """Replaces the row of this recipe and kind of device in docs/results.json, and the README's table."""
    results = json.loads(RESULTS.read_bytes()) if RESULTS.exists() else {"rows": []}
    key = (row["recipe"], row["device"])
    others = [old for old in results["rows"] if (old["recipe"], old["device"]) != key]
    results["rows"] = sorted([*others, row], key=lambda row: list(RECIPES).index(row["recipe"]))
    write_json(RESULTS, results)
    text = README.read_text(encoding="utf-8")
    begin, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    table = render(results)
    write_atomically(README, f"{text[:begin]}\n{table}{text[end:]}".encode())


def compare(options: Options, versus: str) -> int:
    """Runs both sides seed by seed, in turns, and prints how they differ."""
    pairs: list[list[dict[str, Any]]] = []
    num_identical = 0
    with _sides(options.recipe[0], versus) as sides:
        for seed in range(options.seeds):
            pairs.append([_run(side, seed, options) for side in sides])
            first, second = (run["dataset"] for run in pairs[-1])
            if first != second:
                raise RunError(f"--versus {versus}: trained on {second}, but --recipe {options.recipe[0]} on {first}")
            _require_one_origin(pairs[-1], is_one_commit=sides[0].root == sides[1].root)
            num_identical += _same_weights(*(side.folder(seed, options) for side in sides))
    rows = [summarise(side.recipe, list(runs)) for side, runs in zip(sides, zip(*pairs, strict=True), strict=True)]
    mean, interval = paired_difference(*(row["accuracies"] for row in rows))
    ratio = statistics.median(second["train_time_s"] / first["train_time_s"] for first, second in pairs)
    found = {"difference": mean, "interval": interval, "time_ratio": ratio, "num_identical_weights": num_identical}
    if options.json:
        sys.stdout.write(json.dumps({"rows": rows, "comparison": found}, indent=2) + "\n")
        return 0
    for side, row in zip(sides, rows, strict=True):
        mean_text, minimum, n = _accuracy(row)
        sys.stdout.write(
            f"{side.name}: test accuracy, %: {mean_text}, minimum {minimum}, n={n}; {_time(row)} of training\n"
        )
    verdict = "no difference shown"
    if interval is not None and not interval[0] <= 0 <= interval[1]:
        verdict = f"{sides[mean > 0].name} is better"
    bounds = "" if interval is None else f", 95 % confidence interval {interval[0]:+.3%} to {interval[1]:+.3%}"
    sys.stdout.write(
        f"difference of {options.seeds} pairs: {mean:+.3%}{bounds}: {verdict}\n"
        f"training takes {ratio:.2f} times as long (median of the pairs)\n"
        f"weights: bit-identical for {num_identical} of {options.seeds} seeds\n"
    )
    return 0


@contextmanager
def _sides(recipe: str, versus: str) -> Iterator[tuple[Side, Side]]:
    """Two recipes, or a recipe at this commit and at another one, which is checked out in a temporary worktree.

    Raises:
        UserError: `versus` is neither, or there are uncommitted changes.
    """
    if versus in RECIPES:
        yield Side(recipe, recipe), Side(versus, versus + _AGAIN * (versus == recipe))
        return
    try:
        here, there = (_git("rev-parse", "--short=12", "--verify", f"{name}^{{commit}}") for name in ("HEAD", versus))
    except (OSError, RunError) as error:
        raise UserError(f"--versus {versus}: neither a recipe ({', '.join(RECIPES)}) nor a commit") from error
    if _git("status", "--porcelain", "--untracked-files=no"):
        raise UserError(f"--versus {versus}: compares commits; commit or stash your changes first")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, there)
        _git("worktree", "add", "--detach", str(root), there)
        try:
            yield (
                Side(recipe, f"{recipe}-{here}", ROOT),
                Side(recipe, f"{recipe}-{there}" + _AGAIN * (there == here), root),
            )
        finally:
            _git("worktree", "remove", "--force", str(root))


def _git(*arguments: str) -> str:
    """What git prints in this repository; raises a RunError with its last line where it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=False, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise RunError(f"git {arguments[0]}: {(done.stderr.splitlines() or ['failed'])[-1]}")
    return done.stdout.strip()


def _same_weights(*folders: Path) -> bool:
    """Whether two runs have ended with the same weights, to the last bit."""
    first, second = (load_file(folder / "export" / "last" / "model.safetensors") for folder in folders)
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """The mean of `second` - `first` over pairs, and its 95 % confidence interval by Student's t; None of one pair."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, None
    half = float(stdtrit(len(differences) - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, (mean - half, mean + half)


def _run(side: Side, seed: int, options: Options) -> dict[str, Any]:
    """The result of one training, which is run unless it is there."""
    folder = side.folder(seed, options)
    result = read_run_record(folder)
    if result is None or result.status != "finished":
        command = [sys.executable, str(side.root / "train_ddp.py"), "--recipe", side.recipe, "--seed", str(seed)]
        command += ["--mixed-precision", options.mixed_precision, "--run-dir", str(folder)]
        command += ["--max-steps", str(options.sample_steps)] if options.sample_steps else []
        command += ["--num-threads", str(options.num_threads)] if options.num_threads else []
        command += ["--wandb", "disabled", "--no-pictures", "--quiet"]
        training = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 - our own
        try:
            training.wait()
        finally:
            code = training.wait()  # Ctrl-C reaches it too, and it gets the time to save
        result = read_run_record(folder)
        if result is None or result.status != "finished":
            raise RunError(f"{side.name}, seed {seed}: exit code {code}, no result in {folder}")
    assert result.test is not None
    times = f"{result.train_time_s:.2f} s training, {result.total_time_s:.1f} s in all"
    sys.stderr.write(f"{side.name}, seed {seed}: {result.test['accuracy']:.2%}, {times}\n")
    environment = read_json(folder / "environment.json")
    return {**dataclasses.asdict(result), "environment": environment, "epoch_accuracies": _epoch_accuracies(folder)}


def _epoch_accuracies(folder: Path) -> list[float | None]:
    """Test accuracy after each epoch, where the test set is scored then (--val-size 0)."""
    records = read_records(folder / "metrics.jsonl")
    return [record.accuracy for record in records if record.split == "test" and record.epoch.is_integer()]


def summarise(recipe: str, runs: list[dict[str, Any]], *, is_sample: bool = False) -> dict[str, Any]:
    """A row of results.json from the results of n seeds.

    Args:
        recipe: its name.
        runs: contents of result.json, each with its "environment" and its "epoch_accuracies".
        is_sample: the runs were cut short: their times are extrapolated, their accuracies not used.
    """
    first, config = runs[0], RECIPES[recipe]()
    environment = first["environment"]
    device = environment["ranks"][0]["device"]
    accuracies = [] if is_sample else [run["test"]["accuracy"] for run in runs]
    whole, precision = config.loop.epochs, first["precision"]
    flags = f" --mixed-precision {precision}" if precision in ("bf16", "fp16") else ""
    threads = environment["threads_per_process"]
    if device == "cpu" and threads != (config.runtime.num_threads or num_usable_cores()):
        flags += f" --num-threads {threads}"
    has_epochs = bool(accuracies) and config.data.val_size == 0 and whole > 1
    times = [run["train_time_s"] * (whole / run["epochs"] if is_sample else 1) for run in runs]
    _require_one_origin(runs)
    return {
        "recipe": recipe,
        "device": "cpu" if device == "cpu" else "gpu",
        "dataset": first["dataset"],
        "num_params": first["num_params"],
        "epochs": config.loop.epochs,
        "accuracies": accuracies,
        "accuracy_mean": statistics.fmean(accuracies) if accuracies else None,
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "epoch_accuracies": [run["epoch_accuracies"] for run in runs] if has_epochs else None,
        "train_time_s": statistics.median(times),
        "train_time_is_extrapolated": is_sample,
        "total_time_s": None if is_sample else statistics.median(run["total_time_s"] for run in runs),
        "hardware": f"{cpu_name()}, {num_usable_cores()} cores" if device == "cpu" else device,
        "threads": threads,
        "precision": precision,
        "torch": environment["packages"]["torch"],
        "command": f"python train_ddp.py --recipe {recipe} --seed SEED{flags}",
    }


def _require_one_origin(runs: list[dict[str, Any]], *, is_one_commit: bool = True) -> None:
    """Checks that runs that are compared, or averaged, are of one program on one machine and data set."""
    for name in (*["git_commit"] * is_one_commit, "threads_per_process", "packages", "platform"):
        found = {json.dumps(run["environment"].get(name)) for run in runs}
        if len(found) > 1:
            raise RunError(
                f"--runs-dir: runs with different {name.replace('_', ' ')} ({', '.join(sorted(found))}); "
                "remove the older ones, or give another --runs-dir"
            )
    if len({run["dataset"] for run in runs}) > 1:
        raise RunError("--runs-dir: runs on different data sets; remove those of the other one")


def render(results: dict[str, Any]) -> str:
    """A table with a row per recipe that has been measured, and a line that says where that was.

    Args:
        results: {"rows": rows of `summarise`}.
    """
    rows = {(row["recipe"], row["device"]): row for row in results["rows"]}
    heads = ["recipe", "source", "parameters", "epochs", "source states", "ours likewise"]
    heads += ["test accuracy, %", "min", "n", "CPU", "GPU"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for recipe in dict.fromkeys(row["recipe"] for row in results["rows"]):
        cpu, gpu = rows.get((recipe, "cpu")), rows.get((recipe, "gpu"))
        source, stated = describe(recipe)
        known = gpu if cpu is None or not cpu["accuracies"] else cpu
        any_row = cpu or gpu
        size = f"{any_row['num_params']:,}" if any_row else "-"
        cells = [f"`{recipe}`", source, size, str(RECIPES[recipe]().loop.epochs), stated, _as_stated(known, stated)]
        lines.append(f"| {' | '.join([*cells, *_accuracy(known), _time(cpu), _time(gpu)])} |")
    foot = "Where a source states another number than the accuracy of its last weights, ours is counted likewise. "
    foot += f"Times are medians, of training alone. Measured on: {_machines(list(rows.values()))}."
    return "\n".join([*lines, "", foot, ""])


def _machines(rows: list[dict[str, Any]]) -> str:
    """Where most rows were measured, and where the others, by name."""
    recipes = defaultdict(list)
    for row in rows:
        precision = f"{row['precision']}, " if row["precision"] != "fp32" else ""
        machine = f"{row['hardware']}, {count(row['threads'], 'thread')}, {precision}torch {row['torch']}"
        recipes[machine].append(f"`{row['recipe']}`")
    most, *others = sorted(recipes, key=lambda machine: -len(recipes[machine])) or ["nothing yet"]
    return "; ".join([most, *(f"{', '.join(recipes[machine])} on: {machine}" for machine in others)])


def describe(recipe: str) -> tuple[str, str]:
    """Where a recipe comes from and what its source states, as its docstring has it.

    What is stated is an accuracy in %, of the last weights; "mean over epochs", where it is that; or one per epoch.
    """
    text = " ".join((RECIPES[recipe].__doc__ or "").split())
    source = text.partition("Source: ")[2].partition(" Differs: ")[0]
    stated = re.search(r"states ((?:about )?[\d./ ]+) %( \(mean over epochs\))?", source)
    name = re.split(r"[;,.] |, which|\.$", source)[0]
    return name, stated[1] + (stated[2] or "") if stated else "-"


def _as_stated(row: dict[str, Any] | None, stated: str) -> str:
    """Our number beside one that is not of the last weights: the mean over epochs, or the mean after each epoch."""
    runs = None if row is None else row.get("epoch_accuracies")
    if runs and "mean over epochs" in stated:
        return _percent([statistics.fmean(run) for run in runs])
    if runs and "/" in stated:
        return " / ".join(_percent([statistics.fmean(epoch)]) for epoch in zip(*runs, strict=True))
    return "-"


def _percent(accuracies: Sequence[float]) -> str:
    """Mean and, of several, standard deviation: "99.19 +- 0.05"."""
    spread = f" +- {statistics.stdev(accuracies):.2%}"[:-1] if len(accuracies) > 1 else ""
    return f"{statistics.fmean(accuracies):.2%}"[:-1] + spread


def _accuracy(row: dict[str, Any] | None) -> list[str]:
    if row is None or not row["accuracies"]:
        return ["not measured", "-", "-"]
    note = "" if row["dataset"] == "mnist" else f" (of {row['dataset']})"
    accuracies = row["accuracies"]
    return [_percent(accuracies) + note, _percent([min(accuracies)]), str(len(accuracies))]


def _time(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not measured"
    seconds = row["train_time_s"]
    time = f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"
    return f"{time}, extrapolated" if row["train_time_is_extrapolated"] else time


if __name__ == "__main__":
    run_command(main, parse_options(Options, "reproduce", __doc__))
