from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from tests.processes import PYTHON, finish

STEPS = """
import os, resource
from mnist import process
{first}
import torch
from mnist.models import build_model
torch.set_num_threads(1)
model, images = build_model("yannet"), torch.randn(64, 1, 28, 28)
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
    code = "import os; from mnist import process; process.tune(); print(os.environ.get('GOMP_SPINCOUNT'))"
    assert finish([*PYTHON, "-c", code], tmp_path, OMP_WAIT_POLICY="active").out == "None\n"
    assert finish([*PYTHON, "-c", code], tmp_path, GOMP_SPINCOUNT="7").out == "7\n"


def test_leaving_keeps_the_exit_code_and_what_was_printed(tmp_path: Path) -> None:
    done = finish([*PYTHON, "-c", "from mnist import process; print('so'); process.leave(75)"], tmp_path)
    assert (done.code, done.out) == (75, "so\n")
