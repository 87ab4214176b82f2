from typing import Any

import pytest

from mnist.config import LoopConfig, RuntimeConfig, TrainConfig, evolve, from_flat, to_flat
from mnist.recipes import RECIPES, fast, run_name
from mnist.training.build import build_network
from mnist.training.optim import build_optimizer
from tests.networks import INFO
from tests.test_models import PARAMETERS

OF_THE_SOURCES = ["convnet", "mycnn", "lenet5", "lenet5_original", "lenet5_classic", "mlp", "mlp_sigmoid", "yannet"]
OF_THE_PAPER = ["lenet5_1998"]
MADE_HERE = ["fast", "balanced", "thorough", "strong", "accurate", "resnet", "smoke"]
OURS = OF_THE_SOURCES + OF_THE_PAPER + MADE_HERE  # a recipe of yours is bound to nothing but the first tests
PLAIN = {"mean": [0.0], "std": [1.0]}
LENET5 = {
    "image_size": 32,
    "loss": "cross_entropy",
    "optimizer": "adam",
    "lr": 1e-3,
    "global_batch_size": 64,
    "epochs": 5,
}
OF_EVERY_SOURCE = {
    "image_size": 28,
    "mean": [0.1307],
    "std": [0.3081],
    "horizontal_flip": 0.0,
    "rotation": 0.0,
    "translation": 0.0,
    "scale": 0.0,
    "elastic": 0.0,
    "schedule": "constant",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "label_smoothing": 0.0,
    "ema": 0.0,
    "val_size": 0,
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_complete_configuration_under_its_own_name(name):
    config = RECIPES[name]()
    assert isinstance(config, TrainConfig)
    assert config.recipe == name
    assert RECIPES[name]() == config
    assert from_flat(to_flat(config)) == config


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_built(name):
    config = RECIPES[name]()
    model = build_network(config, INFO)
    assert build_optimizer(model.parameters(), config.optim).param_groups[0]["lr"] == config.optim.lr


def test_the_table_holds_the_sources_the_paper_and_our_own():
    assert set(RECIPES) >= set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_a_docstring_says_what_whence_how_it_differs_and_what_to_expect(name):
    summary, *details = [line.strip() for line in RECIPES[name].__doc__.strip().splitlines()]
    fields = dict(line.split(": ", 1) for line in details if line.startswith(("Source: ", "Differs: ", "Expect: ")))
    assert summary.endswith(".")
    assert set(fields) == {"Source", "Differs", "Expect"}
    assert all(text.strip() for text in fields.values())


@pytest.mark.parametrize("name", OURS)
def test_what_belongs_to_the_launcher_or_the_user_is_left_to_them(name):
    config = RECIPES[name]()
    assert config.runtime == RuntimeConfig(num_threads=1 if name == "smoke" else 0)
    assert config.data.data_dir == TrainConfig().data.data_dir
    assert (config.output.run_dir, config.output.resume) == (None, "auto")
    assert (config.loop.seed, config.loop.max_steps) == (LoopConfig().seed, LoopConfig().max_steps)
    assert config.loop.gradient_accumulation_steps == 0


@pytest.mark.parametrize("name", [name for name in OURS if name != "smoke"])
def test_recipes_train_on_mnist_unless_they_cannot_have_it(name):
    config = RECIPES[name]()
    assert config.data.dataset == "auto"
    assert config.output.wandb == "auto"


def test_the_smoke_recipe_needs_no_network_and_has_a_gate():
    config = RECIPES["smoke"]()
    assert (config.data.dataset, config.output.wandb, config.loop.min_accuracy) == ("digits", "disabled", 0.92)
    assert config.loop.epochs == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("convnet", {"loss": "nll", "optimizer": "adam", "lr": 1e-4, "global_batch_size": 512, "epochs": 20}),
        ("mycnn", {"loss": "cross_entropy", "optimizer": "adam", "global_batch_size": 128} | PLAIN),
        ("lenet5", LENET5),
        ("lenet5_original", LENET5 | {"model": "lenet5", "horizontal_flip": 0.5}),
        ("lenet5_classic", LENET5),
        ("mlp", {"loss": "mse_softmax", "optimizer": "adam", "lr": 1e-3, "global_batch_size": 512} | PLAIN),
        ("mlp_sigmoid", {"loss": "mse_sigmoid", "optimizer": "adam", "lr": 3e-4, "global_batch_size": 512} | PLAIN),
        ("yannet", {"loss": "nll", "optimizer": "sgd", "lr": 0.02, "global_batch_size": 64, "epochs": 3} | PLAIN),
    ],
)
def test_a_recipe_follows_its_source(name, expected):
    expected = OF_EVERY_SOURCE | {"model": name} | expected
    flat = to_flat(RECIPES[name]())
    assert {field: flat[field] for field in expected} == expected


def test_lenet5_1998_has_the_pixel_values_of_the_paper():
    image = RECIPES["lenet5_1998"]().image
    paper, ink = ((pixel - image.mean[0]) / image.std[0] for pixel in (0.0, 1.0))
    assert (paper, ink) == pytest.approx((-0.1, 1.175), abs=1e-3)


def test_the_fast_recipe_is_one_epoch():
    assert RECIPES["fast"]().loop.epochs == 1


def test_every_network_of_ours_has_a_recipe():
    assert {RECIPES[name]().optim.model for name in OURS} >= {
        *PARAMETERS,
        "fastnet",
        "vggnet",
        "vggnet_ensemble",
        "tinynet",
        "resnet",
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_runs_as_it_is_has_its_name_whatever_seed_and_machine(name: str) -> None:
    others = {"dataset": "digits", "mean": (0.3,), "seed": 7, "num_threads": 3, "run_dir": "x", "log_every": 1}
    config = evolve(RECIPES[name](), **others, eval_every=5)
    assert run_name(config) == name


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.5}, {"epochs": 2}, {"max_steps": 7}, {"val_size": 9}, {"model": "mycnn"}, {"target_accuracy": 0.5}],
)
def test_a_recipe_that_was_changed_is_called_fast_changed(change: dict[str, Any]) -> None:
    assert run_name(evolve(fast(), **change)) == "fast-changed"
    assert run_name(evolve(fast(), recipe="my-own", **change)) == "my-own"
