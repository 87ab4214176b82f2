import ast
import dataclasses
import inspect
import json
import re
from itertools import pairwise
from typing import Any

import pytest

from mnist.config import (
    DataConfig,
    ImageConfig,
    LoopConfig,
    OptimConfig,
    OutputConfig,
    RuntimeConfig,
    TrainConfig,
    evolve,
    from_flat,
    sections,
    to_flat,
)
from mnist.errors import UserError

NAN, INF = float("nan"), float("inf")

OUT_OF_RANGE = [
    (DataConfig, "val_size", -1),
    (ImageConfig, "image_size", 7),
    (ImageConfig, "image_size", 257),
    (ImageConfig, "std", 0.0),
    (ImageConfig, "std", NAN),
    (ImageConfig, "horizontal_flip", -0.1),
    (ImageConfig, "horizontal_flip", 1.1),
    (ImageConfig, "rotation", -1.0),
    (ImageConfig, "rotation", 181.0),
    (ImageConfig, "translation", -0.1),
    (ImageConfig, "translation", 1.1),
    (ImageConfig, "scale", -0.1),
    (ImageConfig, "scale", 1.0),
    (ImageConfig, "shear", -1.0),
    (ImageConfig, "shear", 90.0),
    (ImageConfig, "elastic", -0.1),
    (ImageConfig, "elastic_sigma", 0.0),
    (OptimConfig, "lr", 0.0),
    (OptimConfig, "lr", -1e-3),
    (OptimConfig, "lr", NAN),
    (OptimConfig, "momentum", -0.1),
    (OptimConfig, "momentum", 1.0),
    (OptimConfig, "beta1", 1.0),
    (OptimConfig, "beta1", -0.1),
    (OptimConfig, "beta2", 1.0),
    (OptimConfig, "beta2", -0.1),
    (OptimConfig, "weight_decay", -0.1),
    (OptimConfig, "warmup", -0.1),
    (OptimConfig, "warmup", 1.0),
    (OptimConfig, "gamma", 0.0),
    (OptimConfig, "gamma", 1.1),
    (OptimConfig, "decay_epochs", 0.0),
    (OptimConfig, "label_smoothing", -0.1),
    (OptimConfig, "label_smoothing", 1.0),
    (OptimConfig, "grad_clip", -1.0),
    (OptimConfig, "ema", -0.1),
    (OptimConfig, "ema", 1.0),
    (LoopConfig, "epochs", 0),
    (LoopConfig, "max_steps", -1),
    (LoopConfig, "global_batch_size", 0),
    (LoopConfig, "gradient_accumulation_steps", -1),
    (LoopConfig, "seed", -1),
    (LoopConfig, "eval_every", -1),
    (LoopConfig, "log_every", -1),
    (LoopConfig, "patience", -1),
    (LoopConfig, "target_accuracy", 0.0),
    (LoopConfig, "target_accuracy", 99.0),
    (LoopConfig, "target_loss", 0.0),
    (LoopConfig, "min_accuracy", 0.0),
    (LoopConfig, "min_accuracy", 92.0),
    (RuntimeConfig, "num_threads", -1),
    (RuntimeConfig, "timeout_s", 0),
    (OutputConfig, "run_dir", ""),
    (OutputConfig, "resume", ""),
    (OutputConfig, "checkpoint_every", -1),
    (OutputConfig, "keep_last", 0),
    (OutputConfig, "keep_best", -1),
]

NOT_FINITE = [
    (ImageConfig, "mean", NAN),
    (ImageConfig, "mean", INF),
    (ImageConfig, "std", INF),
    (ImageConfig, "elastic", INF),
    (ImageConfig, "elastic_sigma", INF),
    (OptimConfig, "lr", INF),
    (OptimConfig, "weight_decay", INF),
]

UNKNOWN_CHOICES = [
    (DataConfig, "dataset", "minst"),
    (OptimConfig, "model", "resnet"),
    (OptimConfig, "optimizer", "Adam"),
    (OptimConfig, "schedule", "linear"),
    (OptimConfig, "loss", "mse"),
    (LoopConfig, "evaluation", "rank1"),
    (RuntimeConfig, "mixed_precision", "fp32"),
    (OutputConfig, "wandb", "on"),
]

IN_RANGE = [
    (ImageConfig, {"image_size": 8, "horizontal_flip": 1.0, "rotation": 180.0, "translation": 1.0, "scale": 0.99}),
    (OptimConfig, {"momentum": 0.9, "nesterov": True, "gamma": 1.0, "warmup": 0.0}),
    (LoopConfig, {"target_accuracy": 1.0, "min_accuracy": 1.0, "target_loss": 1e-9, "log_every": 0}),
    (RuntimeConfig, {"mixed_precision": None}),
]


def flag_of(name):
    return "--" + name.replace("_", "-")


@pytest.mark.parametrize(("section", "name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_its_flag(section, name, value):
    with pytest.raises(UserError) as caught:
        section(**{name: value})
    assert str(caught.value).startswith(flag_of(name))


@pytest.mark.parametrize(("section", "name", "value"), NOT_FINITE)
def test_a_number_that_no_run_can_use_is_refused_by_its_flag(section, name, value):
    with pytest.raises(UserError, match=f"^{flag_of(name)} "):
        section(**{name: value})


@pytest.mark.parametrize(("section", "name", "value"), UNKNOWN_CHOICES)
def test_an_unknown_choice_is_refused_with_the_valid_ones(section, name, value):
    with pytest.raises(UserError) as caught:
        section(**{name: value})
    assert str(caught.value).startswith(f"{flag_of(name)} {value}: ")
    default = getattr(section(), name)
    assert (default or "bf16") in str(caught.value).partition("choose from")[2]


@pytest.mark.parametrize(("section", "values"), IN_RANGE)
def test_the_ends_of_a_range_belong_to_it(section, values):
    assert dataclasses.asdict(section(**values)).items() >= values.items()


@pytest.mark.parametrize(
    ("build", "flag"),
    [
        (lambda: OptimConfig(nesterov=True), "--nesterov"),
        (lambda: OptimConfig(label_smoothing=0.1, loss="nll"), "--label-smoothing"),
        (lambda: TrainConfig(loop=LoopConfig(patience=3)), "--patience"),
    ],
)
def test_fields_that_need_one_another_are_checked_together(build, flag):
    with pytest.raises(UserError, match=f"^{flag}"):
        build()


def test_patience_is_fine_with_a_validation_split():
    config = TrainConfig(data=DataConfig(val_size=100), loop=LoopConfig(patience=3))
    assert config.loop.patience == 3


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().optim.lr = 1.0


def test_sections_are_one_level_deep():
    fields = [field.default for section in sections().values() for field in dataclasses.fields(section)]
    assert not any(dataclasses.is_dataclass(default) for default in fields)


def test_field_names_are_unique_across_sections():
    names = [field.name for section in sections().values() for field in dataclasses.fields(section)]
    assert len(names) == len(set(names))
    assert "recipe" not in names


@pytest.mark.parametrize("section", [TrainConfig, *sections().values()])
def test_every_field_has_a_help_text(section):
    """The string under a field is what the command line shows for it."""
    body = ast.parse(inspect.getsource(section)).body[0].body
    mute = [
        statement.target.id
        for statement, after in pairwise([*body, None])
        if isinstance(statement, ast.AnnAssign) and statement.target.id not in sections()
        if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value)
    ]
    assert mute == []


def test_evolve_replaces_fields_wherever_they_live():
    base = TrainConfig()
    changed = evolve(base, recipe="mine", lr=0.5, val_size=10, epochs=3, quiet=True)
    assert (changed.recipe, changed.optim.lr, changed.data.val_size) == ("mine", 0.5, 10)
    assert (changed.loop.epochs, changed.output.quiet) == (3, True)
    assert changed.image == base.image
    assert base == TrainConfig()


def test_evolve_checks_what_it_makes():
    with pytest.raises(UserError, match=r"^--lr"):
        evolve(TrainConfig(), lr=-1.0)


def test_evolve_refuses_a_field_that_does_not_exist():
    with pytest.raises(AssertionError, match="learning_rate"):
        evolve(TrainConfig(), learning_rate=1.0)


def test_a_configuration_survives_the_way_through_json():
    config = evolve(TrainConfig(), recipe="mine", lr=3e-4, wandb_tags=("a", "b"), target_loss=0.02, run_dir="x")
    assert from_flat(json.loads(json.dumps(to_flat(config)))) == config


def test_missing_fields_keep_their_defaults():
    assert from_flat({"lr": 0.5}) == evolve(TrainConfig(), lr=0.5)


def test_an_unknown_field_is_named():
    with pytest.raises(UserError, match="learning_rate"):
        from_flat({"learning_rate": 0.5, "lr": 0.1})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lr", "1e-3", "a finite number"),
        ("lr", None, "a finite number"),
        ("lr", 10**400, "a finite number"),
        ("lr", True, "a finite number"),
        ("recipe", 5, "text"),
        ("inject", (3,), "texts"),
        ("epochs", 1.5, "a whole number"),
        ("seed", True, "a whole number"),
        ("cpu", 1, "true or false"),
        ("run_dir", 3, "text"),
        ("wandb_tags", "a", "texts"),
        ("target_accuracy", [0.9], "a finite number"),
        ("model", ["lenet5"], "unknown; .*lenet5"),
    ],
)
def test_a_value_of_another_type_is_named(name: str, value: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} {re.escape(str(value))}: (must be )?{words}"):
        evolve(TrainConfig(), **{name: value})


def test_the_data_folder_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MNIST_DATA_DIR", "somewhere")
    assert DataConfig().data_dir == "somewhere"
    monkeypatch.delenv("MNIST_DATA_DIR")
    assert DataConfig().data_dir == "data"
