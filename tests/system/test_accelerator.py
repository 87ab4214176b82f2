from __future__ import annotations

import gc
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState

from mnist.config import RuntimeConfig
from mnist.errors import RunError, UserError
from mnist.models import seed_initial_weights
from mnist.runs.report import hardware_warnings
from mnist.system import accelerator as accelerator_module
from mnist.system import ranks
from mnist.system.accelerator import build_accelerator, executed_precision, open_accelerator
from mnist.system.environment import describe_environment
from mnist.system.process import num_usable_cores
from tests.ranks import run_ranks


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="--mixed-precision fp16: needs a GPU"):
        build_accelerator(RuntimeConfig(cpu=True, mixed_precision="fp16"))


def test_synchronised_batch_norm_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="--sync-bn: needs GPUs"):
        build_accelerator(RuntimeConfig(cpu=True, sync_bn=True))


def test_fp16_from_the_launcher_is_refused_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16: needs a GPU"):
        build_accelerator(RuntimeConfig(cpu=True))


def test_an_unknown_dynamo_backend_is_named_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "foo")
    with pytest.raises(UserError, match=r"^ACCELERATE_DYNAMO_BACKEND=foo: Accelerate cannot start"):
        build_accelerator(RuntimeConfig(cpu=True))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes but 2 GPUs"):
        build_accelerator(RuntimeConfig())


def test_ranks_that_would_each_be_alone_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(accelerator_module, "Accelerator", lambda **_: type("Lonely", (), {"num_processes": 1})())
    with pytest.raises(UserError, match="announces 2 processes, but Accelerate sees 1"):
        build_accelerator(RuntimeConfig(cpu=True))


@pytest.mark.parametrize(("requested", "expected"), [(1, 1), (3, 3), (0, None)])
def test_threads_are_what_was_asked_for_or_the_share_of_a_process(
    monkeypatch: pytest.MonkeyPatch, requested: int, expected: int | None
) -> None:
    """Accelerate sets them too, where OMP_NUM_THREADS is unset."""
    monkeypatch.delenv("OMP_NUM_THREADS")

    def count() -> int:
        build_accelerator(RuntimeConfig(cpu=True, num_threads=requested))
        return torch.get_num_threads()

    assert run_ranks(count, 2) == [expected or max(1, num_usable_cores() // 2)] * 2


@pytest.mark.parametrize(("more", "num_warnings"), [(0, 0), (1, 1)])
def test_more_threads_than_cores_are_warned_of(more: int, num_warnings: int) -> None:
    share = max(1, num_usable_cores() // 2)

    def warnings() -> list[str]:
        return hardware_warnings(build_accelerator(RuntimeConfig(cpu=True, num_threads=share + more)))

    for found in run_ranks(warnings, 2):
        assert len(found) == num_warnings
        assert all(line.startswith(f"--num-threads {share + more}: a process has {share} core") for line in found)


def test_two_runs_in_one_process_may_have_different_precisions() -> None:
    for precision in ("no", "bf16", "no"):
        with open_accelerator(RuntimeConfig(cpu=True, num_threads=1, mixed_precision=precision)) as accelerator:
            assert accelerator.mixed_precision == precision
    assert not PartialState._shared_state


def test_one_process_on_a_cpu_closes_without_a_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 0.3 s; it is for models under DDP, and for memory of a GPU."""
    collections: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gc, "collect", lambda *generation: collections.append(generation))
    with open_accelerator(RuntimeConfig(cpu=True, num_threads=1)):
        pass
    assert collections == []


def test_the_accelerate_state_of_a_host_program_stays() -> None:
    own = Accelerator(cpu=True, mixed_precision="no")
    with open_accelerator(RuntimeConfig(cpu=True, num_threads=1)):
        pass
    assert PartialState._shared_state
    assert own.mixed_precision == "no"


@pytest.mark.parametrize("deterministic", [True, False])
def test_determinism_costs_no_fills_and_no_run_tries_all_kernels(deterministic: bool) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch's default
    torch.backends.cudnn.benchmark = True
    build_accelerator(RuntimeConfig(cpu=True, num_threads=1, deterministic=deterministic))
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cuda.matmul.allow_tf32 is not deterministic
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("mixed_precision", "capability", "deterministic", "expected"),
    [
        ("no", None, False, "fp32"),
        ("no", (8, 0), False, "tf32"),
        ("no", (9, 0), True, "fp32"),
        ("no", (7, 5), False, "fp32"),
        ("bf16", (8, 0), False, "bf16"),
        ("fp16", (8, 0), False, "fp16"),
    ],
)
def test_the_executed_precision_names_tf32(
    monkeypatch: pytest.MonkeyPatch,
    mixed_precision: str,
    capability: tuple[int, int] | None,
    deterministic: bool,
    expected: str,
) -> None:
    build_accelerator(RuntimeConfig(cpu=True, num_threads=1, deterministic=deterministic))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device = torch.device("cuda" if capability else "cpu")
    fake: Any = SimpleNamespace(mixed_precision=mixed_precision, device=device)
    assert executed_precision(fake) == expected
    torch.use_deterministic_algorithms(False)


def work_together(on: str) -> object:
    accelerator = build_accelerator(RuntimeConfig(cpu=True, num_threads=1))
    return ranks.together(accelerator, lambda: accelerator.process_index, on=on)  # type: ignore[arg-type]


@pytest.mark.parametrize(("on", "results"), [("main", [0, 0]), ("local_main", [0, 0]), ("all", [0, 1])])
def test_together_gives_every_rank_its_result(on: str, results: list[int]) -> None:
    assert run_ranks(work_together, 2, on) == results


@pytest.mark.parametrize("kind", [UserError, RunError])
@pytest.mark.parametrize(("on", "failing_rank"), [("main", 0), ("all", 1)])
def test_an_error_on_one_rank_is_raised_on_all(kind: type[Exception], on: str, failing_rank: int) -> None:
    def fail_together() -> str:
        accelerator = build_accelerator(RuntimeConfig(cpu=True, num_threads=1))

        def work() -> None:
            if accelerator.process_index == failing_rank:
                raise kind("no space")

        with pytest.raises(kind, match="no space") as caught:
            ranks.together(accelerator, work, on=on)  # type: ignore[arg-type]
        return type(caught.value).__name__

    assert run_ranks(fail_together, 2) == [kind.__name__] * 2


def test_deterministic_means_no_tf32_whatever_accelerate_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """It switches TF32 on where a dynamo backend meets a GPU in fp32."""

    def accelerator(**arguments: Any) -> Accelerator:
        torch.backends.cuda.matmul.allow_tf32 = True
        return Accelerator(**arguments)

    monkeypatch.setattr(accelerator_module, "Accelerator", accelerator)
    build_accelerator(RuntimeConfig(cpu=True, num_threads=1, deterministic=True))
    assert not torch.backends.cuda.matmul.allow_tf32


def test_ranks_with_other_data_are_stopped() -> None:
    def compare() -> str:
        accelerator = build_accelerator(RuntimeConfig(cpu=True, num_threads=1))
        ranks.require_agreement(accelerator, "seed", 0)
        with pytest.raises(UserError) as caught:
            ranks.require_agreement(accelerator, "data files", f"sha-{accelerator.process_index // 2}")
        return str(caught.value)

    assert run_ranks(compare, 3) == ["ranks 0 and 2 differ in data files: sha-0, sha-1"] * 3


def test_the_environment_report_knows_every_rank_and_keeps_secrets() -> None:
    def report() -> dict[str, object]:
        os.environ["WANDB_API_KEY"] = "very-secret"
        return describe_environment(build_accelerator(RuntimeConfig(cpu=True, num_threads=1)))

    first, second = run_ranks(report, 2)
    assert [rank["rank"] for rank in first["ranks"]] == [0, 1]
    assert first["ranks"] == second["ranks"]
    assert first["packages"]["torch"] == torch.__version__
    assert "very-secret" not in str(first)


def test_weights_drawn_after_seeding_are_the_same_everywhere() -> None:
    def draw(seed: int) -> float:
        seed_initial_weights(seed)
        return float(torch.rand(1))

    assert draw(3) == draw(3) != draw(4)
