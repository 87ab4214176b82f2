from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch import nn

from mnist.config import TrainConfig, evolve, to_flat
from mnist.data import datasets
from mnist.data.batches import TrainLoader
from mnist.data.transforms import Augmentation, BatchTransform
from mnist.plots import pictures, run_pictures
from mnist.plots.history import Curve, History, read_history
from mnist.recipes import RECIPES
from mnist.training.metrics import Scores
from tests.networks import mnist_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = ["samples", "curves", "features", "filters", "confusion", "mistakes"]


def digits(config: TrainConfig) -> datasets.Dataset:
    return datasets.read("digits", config.data)


def augmentation(config: TrainConfig) -> Augmentation:
    return Augmentation(config.image, config.loop.seed, torch.device("cpu"))


def write_all(
    run_dir: Path, config: TrainConfig, model: nn.Module, warn: Callable[[str], None] | None = None
) -> dict[str, Path]:
    facts = {"step": 20, "epoch": 0.5, "split": "train", "dataset": "digits", "loss": 1.0, "accuracy": 0.5}
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text(json.dumps(facts) + "\n")
    step = SimpleNamespace(eval_model=model, transform=BatchTransform(config.image), augment=augmentation(config))
    parts = {
        "config": config,
        "dataset": digits(config),
        "train_step": step,
        "directory": SimpleNamespace(path=run_dir),
    }
    setup: Any = SimpleNamespace(**parts)
    scores = Scores.from_sums({"loss": 36.0}, 36 * torch.eye(10).long())
    return run_pictures.write_run_pictures(setup, scores, 20, pytest.fail if warn is None else warn)


def test_pictures_are_not_written_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pictures").symlink_to(tmp_path / "elsewhere")
    warnings: list[str] = []
    config = RECIPES["smoke"]()
    assert write_all(tmp_path / "run", config, mnist_model(config.optim.model), warnings.append) == {}
    assert ["a symbolic link to" in line for line in warnings] == [True]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(("recipe", "is_training"), [("smoke", True), ("lenet5_original", False), ("mlp", True)])
def test_a_run_leaves_six_pictures_and_no_other_trace(tmp_path: Path, recipe: str, is_training: bool) -> None:
    config = RECIPES[recipe]()
    model = mnist_model(config.optim.model).train(is_training)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    paths = write_all(tmp_path / "run", config, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is is_training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert paths == {name: tmp_path / "run" / "pictures" / f"{name}.png" for name in NAMES}
    for path in paths.values():
        with Image.open(path) as image:
            assert len(image.convert("L").getcolors() or []) > 2


def test_a_picture_that_fails_leaves_the_five_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Figure:
        raise ValueError("no\nroom")

    monkeypatch.setattr(run_pictures, "feature_figure", fail)
    warnings: list[str] = []
    paths = write_all(tmp_path / "run", RECIPES["smoke"](), mnist_model("tinynet"), warnings.append)
    assert list(paths) == [name for name in NAMES if name != "features"]
    assert all(path.exists() for path in paths.values())
    assert warnings == ["picture features not drawn: ValueError: no room"]


def test_a_run_whose_name_looks_like_mathematics_is_drawn(tmp_path: Path) -> None:
    assert list(write_all(tmp_path / "$...^{$", RECIPES["smoke"](), mnist_model("tinynet"))) == NAMES


def test_the_same_run_gives_the_same_pictures(tmp_path: Path) -> None:
    model = mnist_model("tinynet")
    once, again = (write_all(tmp_path / folder, RECIPES["smoke"](), model) for folder in ("run", "moved"))
    assert all(
        once[name].read_bytes() == again[name].read_bytes() for name in NAMES if name != "curves"
    )  # which name the folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `draw_samples` was given."""
    seen: dict[str, Any] = {}
    draw = pictures.draw_samples

    def spy(images: torch.Tensor, labels: torch.Tensor, *rest: Any, augmented: torch.Tensor | None) -> Figure:
        seen.update(images=images, labels=labels, augmented=augmented)
        return draw(images, labels, *rest, augmented=augmented)

    monkeypatch.setattr(pictures, "draw_samples", spy)
    return seen


@pytest.mark.parametrize("batch", [64, 256])
def test_samples_are_what_the_first_steps_see(drawn: dict[str, Any], batch: int) -> None:
    config = evolve(RECIPES["smoke"](), global_batch_size=batch, seed=3)
    run_pictures.sample_figure(config, digits(config), None)
    loader = TrainLoader(digits(config).train, global_batch_size=batch, seed=3)
    steps = [step for (step,) in loader.steps(0, 2)]
    assert torch.equal(drawn["images"], torch.cat([step.images for step in steps])[:100])
    assert torch.equal(drawn["labels"], torch.cat([step.labels for step in steps])[:100])
    assert drawn["augmented"] is None


def test_augmented_samples_are_what_training_makes_of_them(drawn: dict[str, Any]) -> None:
    config = evolve(RECIPES["accurate"](), global_batch_size=32)
    run_pictures.sample_figure(config, digits(config), augmentation(config))
    loader = TrainLoader(digits(config).train, global_batch_size=32, seed=0)
    augment = augmentation(config)
    expected = [augment(step.images, number, slice(0, 32)) for number, (step,) in enumerate(loader.steps(0, 2))]
    assert torch.equal(drawn["augmented"], torch.cat(expected)[:50])
    assert not torch.equal(drawn["augmented"], drawn["images"].float())


@pytest.mark.parametrize(("recipe", "is_smoothed"), [("fast", True), ("lenet5", False)])
def test_curves_speak_of_label_smoothing_where_there_is_some(tmp_path: Path, recipe: str, is_smoothed: bool) -> None:
    record = {"step": 20, "epoch": 0.5, "split": "train", "dataset": "digits", "loss": 1.0, "accuracy": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "config.json").write_text(json.dumps(to_flat(RECIPES[recipe]())))
    texts = [text.get_text() for text in run_pictures.curve_figure([read_history(tmp_path)]).texts]
    assert any("includes label smoothing" in text for text in texts) is is_smoothed


@pytest.mark.parametrize(
    ("status", "title"),
    [
        ("running", "run on digits, step 20"),
        ("finished", "run on digits, step 20"),
        ("diverged", "run on digits, step 20, diverged"),
    ],
)
def test_curves_tell_of_a_bad_ending(status: str, title: str) -> None:
    history = History("run", "digits", status, {"train": Curve([20], [1.0], [0.5])}, 40.0)
    assert title in [text.get_text() for text in run_pictures.curve_figure([history]).texts]
