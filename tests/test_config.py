import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from mnist.config import (
    DataConfig,
    ImageConfig,
    LoopConfig,
    OnResume,
    OptimConfig,
    OutputConfig,
    RuntimeConfig,
    TrainConfig,
    evolve,
    fields_on_resume,
    from_flat,
    sections,
    setting,
    to_flat,
    user_path,
)
from mnist.errors import UserError

NAN, INF = float("nan"), float("inf")

NOT_FINITE = [
    (ImageConfig, "mean", (NAN,)),
    (ImageConfig, "mean", (INF,)),
    (ImageConfig, "std", (INF,)),
    (ImageConfig, "elastic", INF),
    (ImageConfig, "elastic_sigma", INF),
    (OptimConfig, "lr", INF),
    (OptimConfig, "weight_decay", INF),
]

UNKNOWN_CHOICES = [
    (DataConfig, "dataset", "minst"),
    (OptimConfig, "model", "lenet6"),
    (OptimConfig, "optimizer", "Adam"),
    (OptimConfig, "schedule", "linear"),
    (OptimConfig, "loss", "mse"),
    (LoopConfig, "evaluation", "rank1"),
    (RuntimeConfig, "mixed_precision", "fp32"),
    (OutputConfig, "wandb", "on"),
]

SETTINGS = [(section, f) for section in sections().values() for f in dataclasses.fields(section)]
NUMBERS = [
    (section, f)
    for section, f in SETTINGS
    if {int, float} & {get_type_hints(section)[f.name], *get_args(get_type_hints(section)[f.name])}
]


def flag_of(name):
    return "--" + name.replace("_", "-")


def is_list(section: type[Any], f: Any) -> bool:
    return get_origin(get_type_hints(section)[f.name]) is tuple


def ends_of(section: type[Any], f: Any) -> Iterator[tuple[float, bool, float]]:
    """Each end of a field's range: the limit, whether it is a valid value, and the next number outside."""
    is_whole = int in (get_type_hints(section)[f.name], *get_args(get_type_hints(section)[f.name]))
    limits = f.metadata["limits"]
    for text, bracket, outwards in zip(limits[1:-1].split(","), (limits[0], limits[-1]), (-1, 1), strict=True):
        limit = int(float(text)) if is_whole else float(text)
        yield limit, bracket in "[]", limit + outwards if is_whole else math.nextafter(limit, outwards * math.inf)


@pytest.mark.parametrize(("section", "f"), NUMBERS, ids=lambda value: getattr(value, "name", ""))
def test_both_ends_of_a_range_are_declared_and_checked(section: type[Any], f: Any) -> None:
    name, wrap = f.name, (lambda value: (value,)) if is_list(section, f) else (lambda value: value)
    assert re.fullmatch(r"[\[(]\S+, \S+[\])]", f.metadata["limits"])
    for limit, is_valid, outside in ends_of(section, f):
        refused = [outside] if is_valid else [outside, limit]
        for value in refused:
            with pytest.raises(UserError) as caught:
                section(**{name: wrap(value)})
            assert str(caught.value) == f"{flag_of(name)} {value}: must lie in {f.metadata['limits']}"
        if is_valid:
            needed = {"dataset": "folder"} if name == "channels" else {}
            assert getattr(section(**{name: wrap(limit)}, **needed), name) == wrap(limit)


@pytest.mark.parametrize(("section", "f"), SETTINGS, ids=lambda value: getattr(value, "name", ""))
def test_every_field_says_what_it_is_and_what_a_resume_does_with_it(section: type[Any], f: Any) -> None:
    assert f.metadata["on_resume"] in get_args(OnResume)
    assert re.fullmatch(r"[A-Z0-9a-z].*\.( In .*\.)?", f.metadata["help"])
    assert (f.metadata["limits"] != "") is ((section, f) in NUMBERS)


def test_a_field_without_a_word_on_resuming_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="on_resume"):
        setting(0, "A number.")  # type: ignore[call-arg]


def test_a_resume_treats_every_field_in_one_way() -> None:
    by_kind = [fields_on_resume(kind) for kind in get_args(OnResume)]
    assert sorted(itertools.chain(*by_kind)) == sorted(to_flat(TrainConfig()))
    assert fields_on_resume("course") == ("lr", "schedule", "warmup", "gamma", "decay_epochs")
    assert {"model", "seed", "global_batch_size", "dataset"} <= set(fields_on_resume("fixed"))
    assert {"run_dir", "wandb_tags", "num_threads"} <= set(fields_on_resume("free"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"elastic_sigma": 1e300}, "--elastic-sigma 1e+300: must lie in [0.1, 100]"),
        ({"decay_epochs": 1e-320}, "--decay-epochs 1e-320: must lie in [0.001, 1e6]"),
        ({"inject": ("slow@rank0:99999999999999999999",)}, "numbers have at most 9 digits"),
        ({"inject": ("kill@99999999999999999999",)}, "numbers have at most 9 digits"),
        ({"inject": ("slow@rank99999999999:1",)}, "numbers have at most 9 digits"),
        ({"wandb_tags": ("a", "b" * 65)}, f"--wandb-tags {'b' * 65}: W&B takes 1 to 64 characters"),
        ({"wandb_tags": ("",)}, "--wandb-tags : W&B takes"),
        ({"wandb_project": "a/b"}, "--wandb-project a/b: W&B takes 1 to 128 characters without /"),
        ({"wandb_project": "p" * 129}, "W&B takes 1 to 128 characters"),
        ({"run_dir": ""}, "--run-dir: must not be empty"),
        ({"resume": ""}, "--resume: must not be empty"),
        ({"data_dir": ""}, "--data-dir: must not be empty"),
        ({"mean": ()}, "--mean: needs at least one number"),
        ({"mean": (0.5, "x")}, "--mean x: must be a finite number"),
    ],
)
def test_absurd_values_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        evolve(TrainConfig(), **changes)


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


@pytest.mark.parametrize(
    ("build", "flag"),
    [
        (lambda: OptimConfig(nesterov=True), "--nesterov"),
        (lambda: OptimConfig(label_smoothing=0.1, loss="nll"), "--label-smoothing"),
        (lambda: TrainConfig(loop=LoopConfig(patience=3)), "--patience"),
        (
            lambda: TrainConfig(data=DataConfig(val_size=300), output=OutputConfig(keep_best=0)),
            "--keep-best 0: must be 1 or more with --val-size 300",
        ),
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
    with pytest.raises(TypeError, match="learning_rate"):
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
        ("inject", 3, "a list"),
        ("epochs", 1.5, "a whole number"),
        ("seed", True, "a whole number"),
        ("cpu", 1, "true or false"),
        ("run_dir", 3, "text"),
        ("wandb_tags", "a", "a list"),
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


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MNIST_DATA_DIR", "~/data")
    assert DataConfig().data_dir == "/home/me/data"
    assert [user_path(text) for text in ("~", "a/~/b", "x~", "~nobody-here/x")] == [
        *("/home/me", "a/~/b", "x~", "~nobody-here/x")
    ]
