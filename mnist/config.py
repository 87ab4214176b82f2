"""The configuration of a run: frozen dataclasses, one level of sections, checked when they are made.

In: values from a recipe, a file or the command line. Out: a `TrainConfig` whose fields are valid, alone and together.
The text of a field is its help text on the command line. Standard library only, so that `--help` never waits for torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mnist.errors import UserError

_FAULT = re.compile(r"(nan|kill|hang|raise|exit|slow)@(?:rank(\d{1,9}):)?(\d{1,9}(?:\.\d+)?)")


@dataclass(frozen=True)
class Fault:
    """A fault to inject on one rank just before `step`, counted from 1; 0 = before every step."""

    kind: str
    rank: int
    step: int = 0
    seconds: float = 0.0  # that a slow rank waits


def parse_fault(text: str) -> Fault:
    """`nan@30`, `kill@rank1:50`, `slow@rank1:0.05` -> `Fault`; without a rank, rank 0 is meant.

    Raises:
        ValueError: another form; says which forms there are.
    """
    match = _FAULT.fullmatch(text)
    if match is not None:
        kind, rank, number = match.groups(default="0")
        if kind == "slow":
            return Fault(kind, int(rank), seconds=float(number))
        if number.isdecimal() and int(number) > 0:
            return Fault(kind, int(rank), step=int(number))
    raise ValueError(
        "give KIND@STEP or KIND@rankN:STEP with nan, kill, hang, raise or exit and a step of 1 or more, or "
        "slow@rankN:SECONDS; numbers have at most 9 digits"
    )


PROJECT = "mnist-ddp"  # of W&B, unless another one is named
RUNS = Path("runs")  # where runs are kept whose --run-dir is not given

DatasetName = Literal[
    "auto",
    "mnist",
    "fashion_mnist",
    "kmnist",
    "qmnist",
    "emnist_letters",
    "emnist_balanced",
    "emnist_digits",
    "digits",
    "folder",
]
Model = Literal[
    "convnet",
    "mycnn",
    "lenet5",
    "lenet5_classic",
    "lenet5_1998",
    "mlp",
    "mlp_sigmoid",
    "yannet",
    "fastnet",
    "poolnet",
    "poolnet_deep",
    "ensemble",
    "vggnet",
    "vggnet_ensemble",
    "tinynet",
    "resnet",
]

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081  # of the training pixels, in [0, 1]
MNIST_SIDE = 28  # pixels
IMAGE_SIZES = {"lenet5": 32, "lenet5_classic": 32, "lenet5_1998": 32}  # of networks that take one size only

Optimizer = Literal["sgd", "adam", "adamw", "adadelta"]
Schedule = Literal["constant", "step", "exponential", "cosine", "one_cycle"]
Loss = Literal["cross_entropy", "nll", "mse_softmax", "mse_sigmoid"]
Evaluation = Literal["rank0", "sharded"]
StepMode = Literal["auto", "eager", "captured"]
Precision = Literal["no", "bf16", "fp16"]
WandbMode = Literal["auto", "online", "offline", "disabled"]
OnResume = Literal["fixed", "course", "noted", "free"]


_MEANT = {"fp32": "no"}  # Accelerate's word for it


def check_choice(flag: str, value: str, valid: Sequence[str]) -> None:
    """Raises a `UserError` that names the flag, the likely meant value and the valid ones, unless `value` is one."""
    if value not in valid:
        near = [_MEANT[value]] if value in _MEANT else difflib.get_close_matches(value.lower(), valid, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{flag} {value}: unknown; {hint}choose from {', '.join(valid)}")


def choices_of(hint: Any) -> list[str]:
    """The words that a field of this type takes: those of a Literal, optional or not; none for other types."""
    return [choice for part in (hint, *get_args(hint)) for choice in get_args(part) if isinstance(choice, str)]


def option(default: Any, help_text: str, limits: str = "", *, is_path: bool = False, **metadata: Any) -> Any:
    """Declares a field of a command with its help text and its range.

    Args:
        default: a value, or a function that returns one.
        help_text: what --help says, before the limits.
        limits: of a number, as an interval: "[0, 1)" is from 0 to below 1.
        is_path: a file or a folder: not empty, and `~` in it is the home folder.
        metadata: more that the field carries.
    """
    shown = f"{help_text} In {limits}." if limits else help_text
    metadata |= {"help": shown, "limits": limits, "is_path": is_path}
    return field(**{"default_factory" if callable(default) else "default": default}, metadata=metadata)


def setting(default: Any, help_text: str, on_resume: OnResume, limits: str = "", *, is_path: bool = False) -> Any:
    """Declares an `option` of a training run.

    `on_resume` says what a resume makes of another value. "fixed": refused, because it would be another computation;
    "course": refused likewise (the learning rate's course), unless a new run starts from the checkpoint; "noted":
    allowed, with a note; "free": allowed.
    """
    return option(default, help_text, limits, is_path=is_path, on_resume=on_resume)


def is_within(value: float, limits: str) -> bool:
    """Whether a number lies in an interval such as "(0, 1e6]"; a round bracket excludes the limit beside it."""
    low, high = (float(limit) for limit in limits[1:-1].split(","))
    return low <= value <= high and not (value == low and "(" in limits) and not (value == high and ")" in limits)


# What an error message calls a value of each type.
_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def _is_of(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check_fields(section: Any) -> None:
    """Checks the type, choice and limits of each `option` of a dataclass.

    Raises:
        UserError: names the flag and what is valid.
    """
    hints = get_type_hints(type(section))
    for f in dataclasses.fields(section):
        if "limits" in f.metadata:
            _check_field("--" + f.name.replace("_", "-"), getattr(section, f.name), hints[f.name], f.metadata)


def _check_field(flag: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> None:
    if type(None) in get_args(hint):
        if value is None:
            return
        hint = get_args(hint)[0]
    if choices_of(hint):
        check_choice(flag, str(value), choices_of(hint))
        return
    is_list, limits = get_origin(hint) is tuple, metadata["limits"]
    kind = get_args(hint)[0] if is_list else hint
    _require(isinstance(value, tuple) or not is_list, f"{flag} {value}: must be a list")
    _require(value != () or not limits, f"{flag}: needs at least one number")
    for item in value if is_list else (value,):
        _require(_is_of(item, kind), f"{flag} {item}: must be {_WORDS[kind]}")
        _require(not limits or is_within(item, limits), f"{flag} {item}: must lie in {limits}")
    _require(not metadata["is_path"] or value != "", f"{flag}: must not be empty")


def check_wandb_words(place: str, words: Sequence[str], kind: Literal["name", "tag"]) -> None:
    """Checks what W&B would refuse only after the run has begun: project names and run ids, or tags."""
    pattern, limits = {
        "name": (r"[^/\\#?%:]{1,128}", "1 to 128 characters without / \\ # ? % :"),
        "tag": (r".{1,64}", "1 to 64 characters"),
    }[kind]
    for word in words:
        _require(re.fullmatch(pattern, word, re.DOTALL) is not None, f"{place} {word}: W&B takes {limits}")


def user_path(text: str) -> str:
    """A path as a person gives it, with `~` replaced by the home folder, which shells do not do in --flag=~/x."""
    return os.path.expanduser(text)  # noqa: PTH111 - which leaves ~nobody as it is


def _default_data_dir() -> str:
    return user_path(os.environ.get("MNIST_DATA_DIR") or "data")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and from where."""

    dataset: DatasetName = setting(
        "auto",
        "auto = MNIST if it is there or can be downloaded, else embedded digits; folder = your own pictures.",
        "fixed",
    )
    data_dir: str = setting(
        _default_data_dir,
        "Folder of MNIST/raw, or of train/<class>/ and test/<class>/ with pictures (--dataset folder); default "
        "$MNIST_DATA_DIR, else data.",
        "free",
        is_path=True,
    )
    channels: int | None = setting(None, "Of --dataset folder: 1 = grey, 3 = colour (the default).", "fixed", "[1, 3]")
    val_size: int = setting(
        0, "Training images held out to choose the best checkpoint; 0 = score test each epoch.", "fixed", "[0, 1e6]"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        _require(self.channels in (None, 1, 3), f"--channels {self.channels}: must be 1 or 3")
        is_folder = self.dataset == "folder"
        _require(self.channels is None or is_folder, f"--channels {self.channels}: needs --dataset folder")


@dataclass(frozen=True)
class ImageConfig:
    """What happens to a batch of images before the network sees it."""

    image_size: int = setting(MNIST_SIDE, "Images are resized to this many pixels a side.", "fixed", "[8, 256]")
    mean: tuple[float, ...] = setting(
        (MNIST_MEAN,),
        f"Subtracted from pixels in [0, 1], one number or one per channel; {MNIST_MEAN} with --std {MNIST_STD} is "
        "MNIST's: data sets without digits then have those of their own training images.",
        "fixed",
        "[-10, 10]",
    )
    std: tuple[float, ...] = setting((MNIST_STD,), "Divides after the subtraction; see --mean.", "fixed", "[0.001, 10]")
    horizontal_flip: float = setting(0.0, "Probability of mirroring a training image.", "fixed", "[0, 1]")
    rotation: float = setting(0.0, "Random rotation, up to this many degrees.", "fixed", "[0, 180]")
    translation: float = setting(0.0, "Random shift, up to this fraction of the side either way.", "fixed", "[0, 1]")
    scale: float = setting(0.0, "Random zoom by a factor in [1 - scale, 1 + scale].", "fixed", "[0, 1)")
    shear: float = setting(0.0, "Random horizontal shear, up to this many degrees either way.", "fixed", "[0, 90)")
    elastic: float = setting(0.0, "Strength of random elastic distortion; 1.0 is strong.", "fixed", "[0, 100]")
    elastic_sigma: float = setting(4.0, "Smoothness of elastic distortion, in pixels.", "fixed", "[0.1, 100]")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class OptimConfig:
    """The mathematics of a training run, apart from its data."""

    model: Model = setting("fastnet", "The network.", "fixed")
    init_from: str | None = setting(
        None, "A run, or an exported model, whose weights a new run begins with; None = random.", "fixed", is_path=True
    )
    optimizer: Optimizer = setting("adam", "The update rule.", "fixed")
    lr: float = setting(1e-3, "Learning rate; the peak where the schedule rises first.", "course", "(0, 1e38]")
    momentum: float = setting(0.0, "Momentum (SGD).", "fixed", "[0, 1)")
    nesterov: bool = setting(False, "Nesterov's form of momentum (SGD).", "fixed")
    beta1: float = setting(0.9, "Decay of the gradient's mean (Adam, AdamW).", "fixed", "[0, 1)")
    beta2: float = setting(0.999, "Decay of the squared gradient's mean (Adam, AdamW).", "fixed", "[0, 1)")
    weight_decay: float = setting(0.0, "Weight decay (AdamW: decoupled from the gradient).", "fixed", "[0, 1000]")
    schedule: Schedule = setting(
        "constant", "Learning rate over optimizer steps; step and exponential decay by --gamma.", "course"
    )
    warmup: float = setting(0.0, "Fraction of the run in which the rate rises.", "course", "[0, 1)")
    gamma: float = setting(
        0.7, "Factor of one decay: every --decay-epochs at once (step), or smoothly (exponential).", "course", "(0, 1]"
    )
    decay_epochs: float = setting(1.0, "Epochs per decay (step, exponential).", "course", "[0.001, 1e6]")
    loss: Loss = setting("cross_entropy", "The loss; takes raw logits.", "fixed")
    label_smoothing: float = setting(0.0, "Share of the target spread over all classes.", "fixed", "[0, 1)")
    grad_clip: float = setting(0.0, "Largest total norm of the gradient; 0 = no clipping.", "fixed", "[0, 1e6]")
    ema: float = setting(
        0.0, "Decay of the moving average of weights that is evaluated and exported; 0 = none.", "fixed", "[0, 1)"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        _require(not self.nesterov or self.momentum > 0, "--nesterov: needs --momentum above 0")
        _require(
            self.label_smoothing == 0 or self.loss == "cross_entropy",
            f"--label-smoothing {self.label_smoothing}: needs --loss cross_entropy, not {self.loss}",
        )


@dataclass(frozen=True)
class LoopConfig:
    """How long, in which batches, scored how."""

    epochs: int = setting(1, "Passes over the training set (each embedded digit: 42 times).", "noted", "[1, 1e6]")
    max_steps: int = setting(
        0, "Stop after so many optimizer steps; shortens the schedule too; 0 = no limit.", "noted", "[0, 1e9]"
    )
    global_batch_size: int = setting(256, "Images per optimizer step, over all processes.", "fixed", "[1, 1e6]")
    gradient_accumulation_steps: int = setting(
        0, "Micro-batches that a global batch is cut into; 0 = the launcher's setting, else 1.", "noted", "[0, 1e6]"
    )
    seed: int = setting(0, "Fixes initial weights, order, augmentation and dropout.", "fixed", "[0, 1e18]")
    evaluation: Evaluation = setting("rank0", "Rank 0 scores the whole split, or every rank a share.", "noted")
    eval_every: int = setting(0, "Also evaluate every so many steps; 0 = each epoch only.", "noted", "[0, 1e9]")
    log_every: int = setting(50, "Steps between training records; 0 = once an epoch.", "noted", "[0, 1e9]")
    target_accuracy: float | None = setting(
        None, "Stop early at this accuracy, a fraction (on validation, else on test).", "noted", "(0, 1]"
    )
    target_loss: float | None = setting(None, "Stop early at this loss (of two targets, both).", "noted", "(0, 1e6]")
    patience: int = setting(
        0, "Stop after so many evaluations without a better one (needs --val-size); 0 = never.", "noted", "[0, 1e9]"
    )
    min_accuracy: float | None = setting(
        None, "A gate: exit code 1 when the final test accuracy, a fraction, lies below.", "noted", "(0, 1]"
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine's side: precision, threads, device."""

    mixed_precision: Precision | None = setting(None, "Default: the launcher's choice, else no (fp32).", "noted")
    cpu: bool = setting(False, "Train on the CPU even where there is a GPU.", "noted")
    num_threads: int = setting(0, "CPU threads per process; 0 = its share of the cores.", "free", "[0, 1024]")
    step_mode: StepMode = setting("auto", "captured = a step as one CUDA graph; auto = so where it can be.", "noted")
    deterministic: bool = setting(
        False, "Deterministic kernels and no TF32: bit-identical results on GPUs too, but slower.", "noted"
    )
    sync_bn: bool = setting(
        False, "Batch norm over the images of all GPUs; without it, each process has its own mean.", "fixed"
    )
    max_time: float = setting(
        0.0, "Minutes after which this start saves and ends with exit code 75; 0 = no limit.", "free", "[0, 1e6]"
    )
    timeout_s: int = setting(1800, "Seconds that a rank waits for another one.", "free", "[1, 1e6]")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class OutputConfig:
    """What is kept: the run directory, checkpoints, tracking, console."""

    run_dir: str | None = setting(
        None, "Where the run is kept; default: a new directory in runs/.", "free", is_path=True
    )
    resume: str = setting(
        "auto",
        "last, a run directory or a checkpoint; auto = what is in --run-dir; never = nothing.",
        "free",
        is_path=True,
    )
    checkpoint_every: int = setting(0, "Steps between checkpoints; 0 = one an epoch.", "free", "[0, 1e9]")
    keep_last: int = setting(2, "Newest checkpoints kept.", "free", "[1, 1e6]")
    keep_best: int = setting(1, "Best checkpoints also kept (with --val-size).", "free", "[0, 1e6]")
    wandb: WandbMode = setting("auto", "auto = $WANDB_MODE, else online with a key, else offline.", "free")
    wandb_project: str | None = setting(None, "Default: $WANDB_PROJECT, else mnist-ddp.", "free")
    wandb_name: str | None = setting(None, "Default: $WANDB_NAME, else the run directory's name.", "free")
    wandb_group: str | None = setting(None, "Default: $WANDB_RUN_GROUP, else <recipe>-<dataset>.", "free")
    wandb_tags: tuple[str, ...] = setting((), "Tags besides the automatic ones.", "free")
    wandb_notes: str | None = setting(None, "A remark kept with the run.", "free")
    tensorboard: bool = setting(False, "Also write TensorBoard's files (pip install tensorboard).", "free")
    pictures: bool = setting(True, "Draw pictures into <run>/pictures at the end.", "free")
    profile: int = setting(
        0, "Steps of which a trace is written into <run>/profile, a file per rank; 0 = none.", "free", "[0, 1000]"
    )
    quiet: bool = setting(False, "Print warnings, errors and the closing lines only.", "free")
    debug: bool = setting(False, "Show the whole traceback of an error that is otherwise one line.", "free")
    inject: tuple[str, ...] = setting(
        (), "A drill: nan@30, kill@rank1:50 (hang, raise, exit), slow@rank1:0.05 (s per step).", "free"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_wandb_words("--wandb-project", [self.wandb_project or PROJECT], "name")
        check_wandb_words("--wandb-tags", self.wandb_tags, "tag")
        for text in self.inject:
            try:
                parse_fault(text)
            except ValueError as error:
                raise UserError(f"--inject {text}: {error}") from error


@dataclass(frozen=True)
class TrainConfig:
    """All that defines a training run. Recipes return one; the command line overrides single fields."""

    recipe: str = setting("fast", "The recipe to start from (--list-recipes shows them).", "noted")
    data: DataConfig = field(default_factory=DataConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        size = IMAGE_SIZES.get(self.optim.model, self.image.image_size)
        _require(
            self.image.image_size == size,
            f"--model {self.optim.model}: needs --image-size {size}, not {self.image.image_size}",
        )
        _require(
            self.loop.patience == 0 or self.data.val_size > 0,
            f"--patience {self.loop.patience}: needs --val-size above 0, or the test set would choose the model",
        )
        _require(
            self.output.keep_best > 0 or self.data.val_size == 0,
            f"--keep-best 0: must be 1 or more with --val-size {self.data.val_size}: the best weights are scored",
        )


def sections() -> dict[str, type[Any]]:
    """The sections of `TrainConfig` by name, in order."""
    hints = get_type_hints(TrainConfig)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


def fields_on_resume(kind: OnResume) -> tuple[str, ...]:
    """Names of the fields with this `on_resume` (see `setting`), in order."""
    owners: list[type[Any]] = [TrainConfig, *sections().values()]
    return tuple(f.name for o in owners for f in dataclasses.fields(o) if f.metadata.get("on_resume") == kind)


def evolve(config: TrainConfig, **changes: Any) -> TrainConfig:
    """A copy of `config` with fields replaced, whatever section they live in (field names are unique)."""
    top = {"recipe": changes.pop("recipe")} if "recipe" in changes else {}
    parts = {}
    for name, section in sections().items():
        own = {f.name: changes.pop(f.name) for f in dataclasses.fields(section) if f.name in changes}
        parts[name] = dataclasses.replace(getattr(config, name), **own)
    if changes:
        raise TypeError(f"no such field: {', '.join(changes)}")
    return dataclasses.replace(config, **top, **parts)


def to_flat(config: TrainConfig) -> dict[str, Any]:
    """Every field by its unique name, in order, as JSON knows it (tuples become lists)."""
    flat: dict[str, Any] = {"recipe": config.recipe}
    for name in sections():
        flat |= dataclasses.asdict(getattr(config, name))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def from_flat(flat: Any) -> TrainConfig:
    """The inverse of `to_flat`. Fields that are missing keep their defaults.

    Raises:
        UserError: no dictionary, an unknown field, or a value of another type or out of its range.
    """
    _require(isinstance(flat, dict), "the configuration must be an object with a value for each field")
    known = to_flat(TrainConfig())
    unknown = sorted(set(flat) - set(known))
    _require(not unknown, f"unknown configuration field: {', '.join(unknown)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in flat.items()}
    for name in {"mean", "std"} & values.keys():  # older versions knew one number for all channels
        values[name] = (values[name],) if isinstance(values[name], float) else values[name]
    return evolve(TrainConfig(), **values)
