from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mnist.bench import front
from mnist.bench.__main__ import FrontOptions, bench_front
from mnist.bench.front import DOCS, SCRIPTS, measure, measure_all, points, publish
from mnist.config import DataConfig, TrainConfig, evolve
from mnist.data.datasets import read
from mnist.errors import UserError
from mnist.models import count_parameters
from mnist.recipes import RECIPES
from tests.processes import PYTHON, finish

DIGITS = read("digits", DataConfig()).train
CONFIG = evolve(TrainConfig(), dataset="digits", data_dir="none", num_threads=1, cpu=True)


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("pytorch/examples", 1_199_882),
        ("Accelerate's tutorial", 1_199_882),
        ("Lightning's tutorial", 55_050),
        ("Keras' example", 34_826),
    ],
)
def test_a_script_has_the_parameters_of_its_source_and_learns(name: str, num_params: int) -> None:
    script = SCRIPTS[name]
    assert count_parameters(script.build()) == num_params
    short = dataclasses.replace(script, num_train=640, epochs=2)
    seconds, accuracy = measure(short, CONFIG, DIGITS, DIGITS[:500], seed=0)
    assert seconds > 0
    assert accuracy > (0.2 if name.startswith("Lightning") else 0.5)


def test_gamma_lowers_the_rate_after_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers: list[torch.optim.Optimizer] = []

    def build(parameters: Any) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.SGD(parameters, lr=1e-3))
        return optimizers[0]

    script = dataclasses.replace(SCRIPTS["Keras' example"], optimizer=build, num_train=64, epochs=2, gamma=0.5)
    measure(script, CONFIG, DIGITS, DIGITS[:10], seed=0)
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(2.5e-4)


def row(**changes: Any) -> dict[str, Any]:
    machine = {"hardware": "a machine", "threads": 1, "device": "cpu", "dataset": "mnist"}
    return machine | {"accuracies": [0.99, 0.98], "train_time_s": 5.0} | changes


def test_points_are_sorted_by_time_and_leave_out_what_cannot_be_compared() -> None:
    ours = [
        row(recipe="slow", train_time_s=9.0),
        row(recipe="quick", train_time_s=1.0, precision="bf16"),
        row(recipe="elsewhere", device="gpu"),
        row(recipe="smoke", dataset="digits"),
        row(recipe="not measured", accuracies=[]),
    ]
    found = points({"rows": ours}, {"rows": [row(script="a script")]})
    assert [(point["name"], point["ours"]) for point in found] == [
        ("quick in bf16", True),
        ("a script", False),
        ("slow", True),
    ]
    assert (found[1]["accuracy"], found[1]["n"]) == (0.985, 2)


def test_the_picture_shows_what_the_results_say() -> None:
    """Drawn anew by `python -m mnist.bench front --seeds 0 --publish`."""
    drawn = json.loads(Image.open(DOCS / "pictures" / "front.png").info["Description"])
    results, scripts = (json.loads((DOCS / name).read_text()) for name in ("results.json", "front.json"))
    assert drawn == points(results, scripts)
    assert {point["name"].removesuffix(" in bf16") for point in drawn} <= set(RECIPES) | set(SCRIPTS)


def test_published_rows_replace_those_of_the_same_scripts(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"rows": [row(recipe="fast")]}))
    publish([row(script="b", train_time_s=1.0), row(script="a")], tmp_path)
    publish([row(script="b", train_time_s=2.0)], tmp_path)
    kept = json.loads((tmp_path / "front.json").read_text())["rows"]
    assert [(kept_row["script"], kept_row["train_time_s"]) for kept_row in kept] == [("a", 5.0), ("b", 2.0)]
    drawn = json.loads(Image.open(tmp_path / "pictures" / "front.png").info["Description"])
    assert [point["name"] for point in drawn] == ["b", "fast", "a"]


def test_scripts_take_turns_and_each_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int]] = []

    def measure_nothing(script: front.Script, *_: Any, seed: int) -> tuple[float, float]:
        turns.append((next(name for name, known in SCRIPTS.items() if known is script), seed))
        return 2.0 + seed, 0.9

    monkeypatch.setattr(front, "measure", lambda script, *rest: measure_nothing(script, seed=rest[-1]))
    names = list(SCRIPTS)[:2]
    rows = measure_all(names, CONFIG, DIGITS, DIGITS, 2)
    assert turns == [(names[0], 0), (names[1], 0), (names[0], 1), (names[1], 1)]
    assert [(r["script"], r["accuracies"], r["train_time_s"], r["threads"]) for r in rows] == [
        (name, [0.9, 0.9], 2.5, 1) for name in names
    ]


@pytest.mark.launch
def test_the_command_shows_the_recipes_without_measuring(tmp_path: Path) -> None:
    command = [*PYTHON, "-m", "mnist.bench", "front", "--seeds", "0"]
    done = finish([*command, "--json"], tmp_path)
    assert done.code == 0, done.err
    names = {point["name"] for point in json.loads(done.out)["rows"]}
    assert "fast" in names
    done = finish([*command, "--scripts", "keras"], tmp_path)
    assert done.code == 2
    assert done.err.startswith("error: --scripts keras: unknown; ")


def test_figures_of_a_gpu_are_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(UserError, match=r"--publish: docs/front.json is about CPUs; add --cpu"):
        bench_front(FrontOptions(publish=True))
