from __future__ import annotations

import json

import pytest

from mnist.config import RuntimeConfig
from mnist.system.accelerator import build_accelerator
from mnist.system.environment import describe_environment
from mnist.system.process import started_by


def test_the_description_of_a_run_holds_no_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    found = describe_environment(build_accelerator(RuntimeConfig(cpu=True, num_threads=1)))
    assert "a-secret" not in json.dumps(found)
    assert found["threads_per_process"] == 1
    assert [rank["device"] for rank in found["ranks"]] == ["cpu"]
    assert found["packages"].keys() >= {"torch", "accelerate"}


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ([], "python"),
        (["SLURM_PROCID"], "srun"),
        (["SLURM_PROCID", "TORCHELASTIC_RUN_ID"], "torchrun"),
        (["TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"], "accelerate launch"),
    ],
)
def test_the_innermost_launcher_is_named(monkeypatch: pytest.MonkeyPatch, variables: list[str], name: str) -> None:
    for variable in ("SLURM_PROCID", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(variable, raising=False)
    for variable in variables:
        monkeypatch.setenv(variable, "1")
    assert started_by() == name
