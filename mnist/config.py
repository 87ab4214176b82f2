"""The configuration of a run: frozen dataclasses, one level of sections, checked when they are made.

In: values from a recipe, a file or the command line. Out: a `TrainConfig` that cannot be wrong in itself. The text
under a field is its help text on the command line. Standard library only, so that `--help` never waits for torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from mnist.errors import UserError

_FAULT = re.compile(r"(?:(nan|kill|hang|raise|exit)@(?:rank(\d+):)?([1-9]\d*)|slow@(?:rank(\d+):)?(\d+(?:\.\d+)?))")


@dataclass(frozen=True)
class Fault:
    """Something that shall go wrong on one rank.

    Attributes:
        kind: nan, kill, hang, raise, exit or slow.
        rank: where.
        step: when, counted from 1: just before this step is taken; 0 = before every step.
        seconds: what a slow rank loses before every step.
    """

    kind: str
    rank: int
    step: int = 0
    seconds: float = 0.0


def parse_fault(text: str) -> Fault:
    """`nan@30`, `kill@rank1:50`, `slow@rank1:0.05` -> `Fault`; without a rank, rank 0 is meant.

    Raises:
        ValueError: another form; says which forms there are.
    """
    match = _FAULT.fullmatch(text)
    if match is None:
        raise ValueError(
            "give KIND@STEP or KIND@rankN:STEP with nan, kill, hang, raise or exit and a step of 1 or more, or "
            "slow@rankN:SECONDS"
        )
    kind, rank, step, slow_rank, seconds = match.groups()
    if kind is None:
        return Fault("slow", int(slow_rank or 0), seconds=float(seconds))
    return Fault(kind, int(rank or 0), step=int(step))


RUNS = Path("runs")  # where runs are kept whose --run-dir is not given


DatasetName = Literal["auto", "mnist", "fashion_mnist", "kmnist", "digits"]


Model = Literal[
    "convnet", "mycnn", "lenet5", "lenet5_classic", "mlp", "mlp_sigmoid", "yannet", "fastnet", "deepnet", "tinynet"
]


IMAGE_SIZES = {"lenet5": 32, "lenet5_classic": 32}  # what a network takes, where it is not 28


Optimizer = Literal["sgd", "adam", "adamw", "adadelta"]


Schedule = Literal["constant", "step", "exponential", "cosine", "one_cycle"]


Loss = Literal["cross_entropy", "nll", "mse_softmax", "mse_sigmoid"]


Evaluation = Literal["rank0", "sharded"]


StepMode = Literal["auto", "eager", "captured"]


Precision = Literal["no", "bf16", "fp16"]


WandbMode = Literal["auto", "online", "offline", "disabled"]


_MEANT = {"fp32": "no"}  # Accelerate's word for it


def check_choice(flag: str, value: str, valid: Sequence[str]) -> None:
    """Raises a `UserError` that names the flag, the likely meant value and the valid ones, unless `value` is one."""
    if value not in valid:
        near = [_MEANT[value]] if value in _MEANT else difflib.get_close_matches(value.lower(), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{flag} {value}: unknown; {hint}choose from {', '.join(valid)}")


def choices_of(hint: Any) -> list[str]:
    """The words that a field of this type takes: those of a Literal, optional or not; none for other types."""
    return [choice for part in (hint, *get_args(hint)) for choice in get_args(part) if isinstance(choice, str)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


# The types of fields, apart from choices and what may also be None: whether a value is of it, and how people call it.
_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    float: (_is_number, "a finite number"),
    str: (lambda value: isinstance(value, str), "text"),
    tuple[str, ...]: (lambda value: isinstance(value, tuple) and all(isinstance(v, str) for v in value), "texts"),
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_types(section: Any) -> None:
    """Values are of their fields' types, choices valid and numbers finite, whoever has built the configuration."""
    for name, hint in get_type_hints(type(section)).items():
        value, is_optional = getattr(section, name), type(None) in get_args(hint)
        if value is not None or not is_optional:
            _check_type("--" + name.replace("_", "-"), value, get_args(hint)[0] if is_optional else hint)


def _check_type(flag: str, value: Any, kind: Any) -> None:
    if choices_of(kind):
        check_choice(flag, str(value), choices_of(kind))
        return
    is_of_kind, words = _KINDS[kind]
    _require(is_of_kind(value), f"{flag} {value}: must be {words}")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and from where."""

    dataset: DatasetName = "auto"
    """auto = MNIST where it is there or can be downloaded, else the embedded digits (with a warning)."""
    data_dir: str = field(default_factory=lambda: os.environ.get("MNIST_DATA_DIR") or "data")
    """Folder in torchvision's layout (<dir>/MNIST/raw/*-ubyte[.gz]); default $MNIST_DATA_DIR, else "data"."""
    val_size: int = 0
    """Images held out from the end of the training set to choose the best checkpoint; 0 = score test each epoch."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.val_size >= 0, f"--val-size {self.val_size}: must be 0 or more")


@dataclass(frozen=True)
class ImageConfig:
    """What happens to a batch of images before the network sees it."""

    image_size: int = 28
    """Side of the square that the network sees, in pixels; images are resized to it."""
    mean: float = 0.1307
    """Subtracted from pixels in [0, 1]."""
    std: float = 0.3081
    """Divides after the subtraction."""
    horizontal_flip: float = 0.0
    """Probability of mirroring a training image (it harms digits; one source does it)."""
    rotation: float = 0.0
    """Random rotation of training images, up to this many degrees either way."""
    translation: float = 0.0
    """Random shift, up to this fraction of the side either way."""
    scale: float = 0.0
    """Random zoom by a factor in [1 - scale, 1 + scale]."""
    shear: float = 0.0
    """Random horizontal shear, up to this many degrees either way."""
    elastic: float = 0.0
    """Strength of random elastic distortion; 1.0 is strong."""
    elastic_sigma: float = 4.0
    """Smoothness of the elastic distortion: the Gaussian's standard deviation in pixels."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(8 <= self.image_size <= 256, f"--image-size {self.image_size}: must lie in 8..256")
        _require(self.std > 0, f"--std {self.std}: must be above 0")
        _require(0 <= self.horizontal_flip <= 1, f"--horizontal-flip {self.horizontal_flip}: must lie in [0, 1]")
        _require(0 <= self.rotation <= 180, f"--rotation {self.rotation}: must lie in 0..180 degrees")
        _require(0 <= self.translation <= 1, f"--translation {self.translation}: must lie in [0, 1]")
        _require(0 <= self.scale < 1, f"--scale {self.scale}: must lie in [0, 1)")
        _require(0 <= self.shear < 90, f"--shear {self.shear}: must lie in [0, 90) degrees")
        _require(self.elastic >= 0, f"--elastic {self.elastic}: must be 0 or more")
        _require(self.elastic_sigma > 0, f"--elastic-sigma {self.elastic_sigma}: must be above 0")


@dataclass(frozen=True)
class OptimConfig:
    """The mathematics of a training run, apart from its data."""

    model: Model = "fastnet"
    """The network."""
    optimizer: Optimizer = "adam"
    """The update rule."""
    lr: float = 1e-3
    """Learning rate; the peak where the schedule rises first."""
    momentum: float = 0.0
    """Momentum (SGD)."""
    nesterov: bool = False
    """Nesterov's form of momentum (SGD)."""
    beta1: float = 0.9
    """Decay of the gradient's mean (Adam, AdamW)."""
    beta2: float = 0.999
    """Decay of the squared gradient's mean (Adam, AdamW)."""
    weight_decay: float = 0.0
    """Weight decay: added to the gradient (SGD, Adam, Adadelta) or decoupled from it (AdamW)."""
    schedule: Schedule = "constant"
    """Learning rate over optimizer steps; step and exponential decay by --gamma."""
    warmup: float = 0.0
    """Fraction of the run in which the learning rate rises (cosine, one_cycle)."""
    gamma: float = 0.7
    """Factor of one decay: every --decay-epochs at once (step), or smoothly (exponential)."""
    decay_epochs: float = 1.0
    """Epochs per decay (step, exponential)."""
    loss: Loss = "cross_entropy"
    """The loss. Networks return raw logits; softmax or sigmoid belongs to the loss."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes (cross_entropy)."""
    grad_clip: float = 0.0
    """Largest total norm of the gradient; 0 = no clipping."""
    ema: float = 0.0
    """Decay of the moving average of weights that is evaluated and exported; 0 = the weights themselves."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.lr > 0, f"--lr {self.lr}: must be above 0")
        _require(0 <= self.momentum < 1, f"--momentum {self.momentum}: must lie in [0, 1)")
        _require(not self.nesterov or self.momentum > 0, "--nesterov: needs --momentum above 0")
        _require(0 <= self.beta1 < 1, f"--beta1 {self.beta1}: must lie in [0, 1)")
        _require(0 <= self.beta2 < 1, f"--beta2 {self.beta2}: must lie in [0, 1)")
        _require(self.weight_decay >= 0, f"--weight-decay {self.weight_decay}: must be 0 or more")
        _require(0 <= self.warmup < 1, f"--warmup {self.warmup}: must lie in [0, 1)")
        _require(0 < self.gamma <= 1, f"--gamma {self.gamma}: must lie in (0, 1]")
        _require(self.decay_epochs > 0, f"--decay-epochs {self.decay_epochs}: must be above 0")
        _require(0 <= self.label_smoothing < 1, f"--label-smoothing {self.label_smoothing}: must lie in [0, 1)")
        _require(
            self.label_smoothing == 0 or self.loss == "cross_entropy",
            f"--label-smoothing {self.label_smoothing}: needs --loss cross_entropy, not {self.loss}",
        )
        _require(self.grad_clip >= 0, f"--grad-clip {self.grad_clip}: must be 0 (off) or more")
        _require(0 <= self.ema < 1, f"--ema {self.ema}: must lie in [0, 1)")


@dataclass(frozen=True)
class LoopConfig:
    """How long, in which batches, scored how."""

    epochs: int = 1
    """Passes over the training set."""
    stretch_epochs: bool = True
    """On a smaller data set, take as many optimizer steps as on MNIST's 60,000 images (--epochs turns it off)."""
    max_steps: int = 0
    """Optimizer steps of the whole run at most, and the length of the schedule then; 0 = no limit."""
    global_batch_size: int = 256
    """Images per optimizer step, over all processes and accumulated micro-batches together."""
    gradient_accumulation_steps: int = 0
    """Micro-batches per optimizer step; 0 = the launcher's setting, else 1. The global batch stays what it is."""
    seed: int = 0
    """Fixes initial weights, order, augmentation and dropout."""
    evaluation: Evaluation = "rank0"
    """Rank 0 scores the whole split while the others wait, or every rank a share. Same counts either way."""
    eval_every: int = 0
    """Also evaluate every so many optimizer steps; 0 = at the end of each epoch only."""
    log_every: int = 50
    """Optimizer steps between training records; 0 = once an epoch."""
    target_accuracy: float | None = None
    """Stop early at this accuracy, a fraction (on validation where there is one, else on test)."""
    target_loss: float | None = None
    """Stop early at this loss (both targets given: both must be reached)."""
    patience: int = 0
    """Stop after so many evaluations without a better validation accuracy; needs --val-size; 0 = never."""
    min_accuracy: float | None = None
    """A gate: exit code 1 when the final test accuracy, a fraction, lies below."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("epochs", "global_batch_size"):
            value = getattr(self, name)
            _require(value > 0, f"--{name.replace('_', '-')} {value}: must be 1 or more")
        for name in ("max_steps", "gradient_accumulation_steps", "seed", "eval_every", "log_every", "patience"):
            value = getattr(self, name)
            _require(value >= 0, f"--{name.replace('_', '-')} {value}: must be 0 or more")
        for name in ("target_accuracy", "min_accuracy"):
            value = getattr(self, name)
            _require(
                value is None or 0 < value <= 1,
                f"--{name.replace('_', '-')} {value}: must be a fraction in (0, 1], such as 0.99",
            )
        _require(self.target_loss is None or self.target_loss > 0, f"--target-loss {self.target_loss}: must be above 0")


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine's side: precision, threads, device."""

    mixed_precision: Precision | None = None
    """Default: the launcher's choice, else no (fp32)."""
    cpu: bool = False
    """Train on the CPU even where there is a GPU."""
    num_threads: int = 0
    """CPU threads per process; 0 = the cores that this node's processes may use, shared equally."""
    step_mode: StepMode = "auto"
    """A step kernel by kernel, or captured as one CUDA graph; auto = captured where that gives the same weights."""
    deterministic: bool = False
    """Only deterministic kernels and no TF32: bit-identical results on GPUs too, a little slower."""
    timeout_s: int = 1800
    """Seconds that a rank waits for another one before the job is given up."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(0 <= self.num_threads <= 1024, f"--num-threads {self.num_threads}: must lie in 0 (automatic)..1024")
        _require(0 < self.timeout_s <= 1_000_000, f"--timeout-s {self.timeout_s}: must lie in 1..1000000")


@dataclass(frozen=True)
class OutputConfig:
    """What is kept: the run directory, checkpoints, tracking, console."""

    run_dir: str | None = None
    """Default: runs/<recipe>-<dataset>-<date>-<time>, or the unfinished run of the same configuration."""
    resume: str = "auto"
    """auto = the newest valid checkpoint of the run directory; never; or the path of a checkpoint."""
    checkpoint_every: int = 0
    """Optimizer steps between checkpoints; 0 = one at the end of each epoch."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Best checkpoints kept besides (by validation accuracy; needs --val-size)."""
    wandb: WandbMode = "auto"
    """auto = $WANDB_MODE, else online where a key is configured, else offline."""
    wandb_project: str | None = None
    """Default: $WANDB_PROJECT, else mnist-ddp."""
    wandb_name: str | None = None
    """Default: $WANDB_NAME, else the run directory's name."""
    wandb_group: str | None = None
    """Default: $WANDB_RUN_GROUP, else <recipe>-<dataset>."""
    wandb_tags: tuple[str, ...] = ()
    """Tags besides data set, model, precision and world size."""
    wandb_notes: str | None = None
    """A remark kept with the run."""
    tensorboard: bool = False
    """Also write TensorBoard's event files, to <run>/tensorboard (pip install tensorboard)."""
    pictures: bool = True
    """At the end, draw pictures of data, curves, features and mistakes into <run>/pictures."""
    quiet: bool = False
    """Print warnings, errors and the closing lines only."""
    debug: bool = False
    """Show the whole traceback of an error that is otherwise one line."""
    inject: tuple[str, ...] = ()
    """A drill: nan@30, kill@rank1:50 (or hang, raise, exit; before that step), slow@rank1:0.05 (seconds per step)."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(bool(self.resume), "--resume: give auto, never or the path of a checkpoint")
        _require(self.run_dir is None or bool(self.run_dir), "--run-dir: must not be empty")
        _require(self.checkpoint_every >= 0, f"--checkpoint-every {self.checkpoint_every}: must be 0 or more")
        _require(self.keep_last >= 1, f"--keep-last {self.keep_last}: must be 1 or more")
        _require(self.keep_best >= 0, f"--keep-best {self.keep_best}: must be 0 or more")
        for text in self.inject:
            try:
                parse_fault(text)
            except ValueError as error:
                raise UserError(f"--inject {text}: {error}") from error


@dataclass(frozen=True)
class TrainConfig:
    """All that defines a training run. Recipes return one; the command line overrides single fields."""

    recipe: str = "fast"
    """The recipe to start from (--list-recipes shows them)."""
    data: DataConfig = field(default_factory=DataConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        _check_type("--recipe", self.recipe, str)
        size = IMAGE_SIZES.get(self.optim.model, 28)
        _require(
            self.image.image_size == size,
            f"--model {self.optim.model}: needs --image-size {size}, not {self.image.image_size}",
        )
        _require(
            self.loop.patience == 0 or self.data.val_size > 0,
            f"--patience {self.loop.patience}: needs --val-size above 0, or the test set would choose the model",
        )


def sections() -> dict[str, type[Any]]:
    """The sections of `TrainConfig` by name, in order."""
    hints = get_type_hints(TrainConfig)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


def evolve(config: TrainConfig, **changes: Any) -> TrainConfig:
    """A copy of `config` with fields replaced, whatever section they live in (field names are unique)."""
    top = {"recipe": changes.pop("recipe")} if "recipe" in changes else {}
    parts = {}
    for name, section in sections().items():
        own = {f.name: changes.pop(f.name) for f in dataclasses.fields(section) if f.name in changes}
        parts[name] = dataclasses.replace(getattr(config, name), **own)
    assert not changes, f"no such field: {', '.join(changes)}"
    return dataclasses.replace(config, **top, **parts)


def to_flat(config: TrainConfig) -> dict[str, Any]:
    """Every field by its unique name, in order, as JSON knows it (tuples become lists)."""
    flat: dict[str, Any] = {"recipe": config.recipe}
    for name in sections():
        flat |= dataclasses.asdict(getattr(config, name))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def from_flat(flat: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_flat`. Fields that are missing keep their defaults.

    Raises:
        UserError: an unknown field, or a value of another type or out of its range.
    """
    known = to_flat(TrainConfig())
    unknown = sorted(set(flat) - set(known))
    _require(not unknown, f"unknown configuration field: {', '.join(unknown)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in flat.items()}
    return evolve(TrainConfig(), **values)
