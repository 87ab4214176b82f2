from __future__ import annotations

from pathlib import Path

import pytest

from mnist.config import RuntimeConfig, TrainConfig, evolve
from mnist.errors import UserError
from mnist.system.launcher import fill_in, fill_in_runtime
from tests.processes import finish, train
from tests.ranks import run_ranks
from tests.runs.test_run import SMALL, run


@pytest.mark.parametrize(
    ("variables", "changes"),
    [
        ({}, {"mixed_precision": "no", "gradient_accumulation_steps": 1}),
        ({"ACCELERATE_MIXED_PRECISION": ""}, {"mixed_precision": "no", "gradient_accumulation_steps": 1}),
        ({"ACCELERATE_MIXED_PRECISION": "BF16"}, {"mixed_precision": "bf16", "gradient_accumulation_steps": 1}),
        ({"ACCELERATE_MIXED_PRECISION": "FP16"}, {"mixed_precision": "fp16", "gradient_accumulation_steps": 1}),
        (
            {"ACCELERATE_USE_CPU": "True", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            {"cpu": True, "mixed_precision": "no", "gradient_accumulation_steps": 4},
        ),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ""}, {"mixed_precision": "no", "gradient_accumulation_steps": 1}),
        ({"ACCELERATE_USE_FSDP": "false"}, {"mixed_precision": "no", "gradient_accumulation_steps": 1}),
    ],
)
def test_the_launcher_s_choices_are_filled_in(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], changes: dict[str, object]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    filled = fill_in(TrainConfig())
    assert filled == evolve(TrainConfig(), **changes)
    assert fill_in(filled) == filled


def test_flags_win_over_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    config = evolve(TrainConfig(), mixed_precision="bf16", gradient_accumulation_steps=2)
    assert fill_in(config) == config


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp32"}, "ACCELERATE_MIXED_PRECISION fp32: unknown; did you mean no?"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION fp8: unknown"),
        ({"ACCELERATE_MIXED_PRECISION": "nonsense"}, "choose from no, bf16, fp16"),
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP=true: trains with DDP, not with FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "True"}, "ACCELERATE_USE_DEEPSPEED=True: trains with DDP, not with DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "1"}, "--config_file accelerate_config.yaml"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "not with a parallelism configuration"),
        ({"ACCELERATE_USE_CPU": "perhaps"}, "ACCELERATE_USE_CPU=perhaps: must be true or false"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        fill_in_runtime(RuntimeConfig())


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WANDB_TAGS": "a," + "b" * 65}, "WANDB_TAGS b{65}: W&B takes 1 to 64 characters"),
        ({"WANDB_PROJECT": "team/mnist"}, "WANDB_PROJECT team/mnist: W&B takes"),
        ({"WANDB_RUN_ID": "a:b"}, "WANDB_RUN_ID a:b: W&B takes"),
    ],
)
def test_what_wandb_would_refuse_later_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert fill_in(TrainConfig()), "WANDB_MODE is disabled in tests"
    monkeypatch.delenv("WANDB_MODE")
    assert fill_in(evolve(TrainConfig(), wandb="disabled"))
    with pytest.raises(UserError, match=f"^{words}"):
        fill_in(TrainConfig())


def test_a_wrong_precision_of_the_launcher_is_one_line_before_training(tmp_path: Path) -> None:
    done = finish(train("--recipe", "smoke"), tmp_path, ACCELERATE_MIXED_PRECISION="FP8")
    assert done.code == 2
    assert done.err.startswith("error: ACCELERATE_MIXED_PRECISION fp8: unknown;")
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_precision_in_capitals_is_trained_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "BF16")
    assert run_ranks(run, 1, tmp_path, *SMALL, "--max-steps", "4", "--min-accuracy", "0.01") == [0]
    assert '"mixed_precision": "bf16"' in (tmp_path / "export" / "last" / "config.json").read_text()
