from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from mnist.system import process
from tests.processes import PYTHON, finish

STEPS = """
import os, resource
from mnist.system import process
{first}
import torch
from mnist.models import build_model
torch.set_num_threads(1)
model, images = build_model("yannet", 1, 28, 10), torch.randn(64, 1, 28, 28)
for step in range(10):
    if step == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(images).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_memory_of_a_step_is_kept_for_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page faults of six steps: thousands each, or nearly none."""
    for name in [name for name in os.environ if name.startswith(("GOMP_", "OMP_WAIT", "MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    scripts = [STEPS.format(first=first) for first in ("process.tune()", "")]
    (kept, spins), (given_back, default) = (finish([*PYTHON, "-c", code], tmp_path).out.split() for code in scripts)
    assert 5 * int(kept) < int(given_back)
    assert (spins, default) == ("10000", "None")


def test_what_the_environment_says_of_waiting_stays(tmp_path: Path) -> None:
    code = "import os; from mnist.system import process; process.tune(); print(os.environ.get('GOMP_SPINCOUNT'))"
    assert finish([*PYTHON, "-c", code], tmp_path, OMP_WAIT_POLICY="active").out == "None\n"
    assert finish([*PYTHON, "-c", code], tmp_path, GOMP_SPINCOUNT="7").out == "7\n"


@pytest.mark.parametrize(
    ("content", "quota", "num_cores"),
    [("max 100000\n", None, 8), ("250000 100000\n", 2.5, 3), ("50000 100000\n", 0.5, 1), ("6400000 100000\n", 64, 8)]
    + [(odd, None, 8) for odd in ("", "max", "a b", "1 2 3", "100000 0", "0 100000", "\u00fc \u00fc")],
)
def test_a_containers_quota_counts_as_cores_do(
    content: str, quota: float | None, num_cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(content)
    monkeypatch.setattr(process, "_CGROUPS", tmp_path)
    monkeypatch.setattr(process, "usable_cores", lambda: list(range(8)))
    assert (process.cpu_quota(), process.num_usable_cores()) == (quota, num_cores)


@pytest.mark.parametrize(
    ("quota", "period", "expected"),
    [("250000", "100000", 2.5), ("-1", "100000", None), ("100000", "0", None), ("x", "1", None), ("50000", None, None)],
)
def test_a_quota_of_control_groups_version_1_counts_too(
    quota: str, period: str | None, expected: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
    if period is not None:
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text(period + "\n")
    monkeypatch.setattr(process, "_CGROUPS", tmp_path)
    assert process.cpu_quota() == expected


def test_without_control_groups_there_is_no_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_CGROUPS", tmp_path)
    assert process.cpu_quota() is None
    assert process.num_usable_cores() == len(process.usable_cores())


def test_leaving_keeps_the_exit_code_and_what_was_printed(tmp_path: Path) -> None:
    done = finish([*PYTHON, "-c", "from mnist.system import process; print('so'); process.leave(75)"], tmp_path)
    assert (done.code, done.out) == (75, "so\n")
