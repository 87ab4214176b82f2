"""Environment variables of launchers and schedulers: checked, and filled into the configuration.

In: the environment. Out: a one-line error, or a configuration with the choices of the launcher in it.
Standard library only, because mistakes are reported before torch is imported.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, get_args

from mnist.config import Precision, RuntimeConfig, TrainConfig, check_choice, check_wandb_words
from mnist.errors import UserError

# Every number that the project reads from a launcher -> its least valid value.
_MINIMUM = {
    "RANK": 0,
    "LOCAL_RANK": 0,
    "WORLD_SIZE": 1,
    "LOCAL_WORLD_SIZE": 1,
    "MASTER_PORT": 0,
    "TORCHELASTIC_RESTART_COUNT": 0,
    "SLURM_RESTART_COUNT": 0,
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": 1,
}
# What Accelerate can do and this project does not.
_OTHER_METHODS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
_OWN_FILE = "accelerate launch --config_file accelerate_config.yaml"


def check_variables() -> None:
    """Checks the numbers that launchers set. An empty variable counts as unset, and is removed for all who read it.

    Raises:
        UserError: names the variable.
    """
    for name, minimum in _MINIMUM.items():
        text = os.environ.get(name)
        if text == "":
            del os.environ[name]
        elif text is not None and not (text.isdecimal() and int(text) >= minimum):
            raise UserError(f"{name}={text}: must be a whole number of {minimum} or more; unset it")
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if size in os.environ and int(os.environ.get(rank, "0")) >= int(os.environ[size]):
            raise UserError(f"{rank}={os.environ[rank]}: must be below {size}={os.environ[size]}; unset both")


def fill_in(config: TrainConfig) -> TrainConfig:
    """The configuration with the launcher's choices in the place of defaults: precision, device, accumulation.

    Raises:
        UserError: names the variable that is wrong, or asks for what this project does not do.
    """
    check_variables()
    if "disabled" not in (config.output.wandb, os.environ.get("WANDB_MODE")):
        for name in ("WANDB_PROJECT", "WANDB_RUN_ID"):
            check_wandb_words(name, list(filter(None, [os.environ.get(name)])), "name")
        check_wandb_words("WANDB_TAGS", list(filter(None, os.environ.get("WANDB_TAGS", "").split(","))), "tag")
    steps = config.loop.gradient_accumulation_steps or os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    loop = replace(config.loop, gradient_accumulation_steps=int(steps))
    return replace(config, loop=loop, runtime=fill_in_runtime(config.runtime))


def fill_in_runtime(config: RuntimeConfig) -> RuntimeConfig:
    """Likewise for the `runtime` section alone."""
    for name, method in _OTHER_METHODS.items():
        if _is_true(name):
            raise UserError(f"{name}={os.environ[name]}: trains with DDP, not with {method}; start it with {_OWN_FILE}")
    precision: Any = config.mixed_precision
    if precision is None:
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() or "no"
        try:
            check_choice("ACCELERATE_MIXED_PRECISION", precision, get_args(Precision))
        except UserError as error:
            raise UserError(f"{error}; or start it with {_OWN_FILE}") from None
    return replace(config, mixed_precision=precision, cpu=config.cpu or _is_true("ACCELERATE_USE_CPU"))


def _is_true(name: str) -> bool:
    text = os.environ.get(name, "").lower()
    if text not in ("1", "true", "yes", "on", "y", "t", "", "0", "false", "no", "off", "n", "f"):
        raise UserError(f"{name}={text}: must be true or false")
    return text in ("1", "true", "yes", "on", "y", "t")
