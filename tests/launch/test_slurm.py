"""launch/slurm.sbatch on a real SLURM of two nodes, which tests/slurm starts and ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.test_launch import has_records, wait_until
from tests.processes import ROOT
from tests.ranks import run_ranks
from tests.runs.test_run import metrics, result, run, weights
from tests.slurm.cluster import ask, cluster, why_not

pytestmark = [
    pytest.mark.launch,
    pytest.mark.timeout(400),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

ARGUMENTS = [
    *("--recipe", "smoke", "--epochs", "3", "--log-every", "10", "--min-accuracy", "0.5"),
    *("--rotation", "10", "--num-threads", "1", "--cpu"),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
    try:
        with cluster(folder) as environment:
            yield environment
    finally:
        shutil.rmtree(folder)


def submit(slurm: dict[str, str], tmp_path: Path, *arguments: str) -> str:
    """One rank on each of two nodes; n1 and n2 are no names that a network knows, so the address is given."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **slurm, "PATH": path, "MASTER_ADDR": "127.0.0.1", "RUN_DIR": str(tmp_path / "run")}
    options = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={tmp_path / 'out'}"]
    command = ["sbatch", "--parsable", f"--chdir={ROOT}", *options, str(ROOT / "launch" / "slurm.sbatch"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def facts(slurm: dict[str, str], job: str) -> dict[str, str]:
    """What SLURM knows of a job: JobState, Restarts, ExitCode ..."""
    fields = ask(slurm, "scontrol", "show", "job", job, "--oneliner").split()
    return dict(field.partition("=")[::2] for field in fields)


def wait_for_end(slurm: dict[str, str], job: str) -> dict[str, str]:
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_until(lambda: facts(slurm, job).get("JobState") in ended, timeout=200)
    return facts(slurm, job)


def test_a_preempted_job_is_requeued_and_ends_as_if_nothing_had_happened(slurm: dict[str, str], tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, *ARGUMENTS, "--wandb", "offline")
    wait_until(lambda: has_records(tmp_path / "run"), timeout=120)
    ask(slurm, "scancel", "--signal=USR1", "--full", job)
    wait_until(lambda: result(tmp_path / "run")["status"] == "preempted", timeout=60)
    found = wait_for_end(slurm, job)
    output = (tmp_path / "out").read_text()
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("COMPLETED", "1", "0:0"), output
    assert (result(tmp_path / "run")["status"], result(tmp_path / "run")["world_size"]) == ("finished", 2)
    assert run_ranks(run, 2, tmp_path / "uninterrupted", *ARGUMENTS) == [0, 0]
    assert weights(tmp_path / "run") == weights(tmp_path / "uninterrupted")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "uninterrupted")
    segments = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(segments) == 2, output
    assert {name.rpartition("-")[2] for name in segments} == {(tmp_path / "run" / "wandb_id").read_text()}


def test_a_cancelled_job_is_saved_and_not_requeued(slurm: dict[str, str], tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, *ARGUMENTS)
    wait_until(lambda: has_records(tmp_path / "run"), timeout=120)
    ask(slurm, "scancel", job)
    found = wait_for_end(slurm, job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    assert result(tmp_path / "run")["status"] == "preempted"


def test_a_failed_job_is_not_requeued(slurm: dict[str, str], tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "--recipe", "lenet")
    found = wait_for_end(slurm, job)
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("FAILED", "0", "2:0")
    assert (tmp_path / "out").read_text().count("did you mean lenet5?") == 1
