"""Fifty kills in a row. Not part of the default suite: python -m pytest -m soak -s"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.processes import TORCHRUN, finish, members, started, train
from tests.runs.test_run import metrics, weights

pytestmark = [pytest.mark.soak, pytest.mark.launch, pytest.mark.timeout(7200)]

NUM_KILLS = 50
ARGUMENTS = [
    *("--recipe", "smoke", "--global-batch-size", "64", "--schedule", "constant", "--lr", "1e-3"),
    *("--epochs", "22", "--max-steps", "20000"),
    *("--rotation", "10", "--translation", "0.1", "--ema", "0.99", "--gradient-accumulation-steps", "2"),
    *("--checkpoint-every", "150", "--log-every", "100", "--eval-every", "1000", "--num-threads", "1"),
    *("--min-accuracy", "0.5", "--quiet"),
]
LAUNCHER = [*TORCHRUN, "--nproc-per-node", "2"]


def step_of(folder: Path) -> int:
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def kill_once(tmp_path: Path, chance: random.Random) -> None:
    """Starts the run, waits until it has got somewhere, and ends it in one of three ways."""
    folder = tmp_path / "b"
    before = step_of(folder)
    with started(train(*ARGUMENTS, "--run-dir", "b", launcher=LAUNCHER), tmp_path) as process:
        deadline = time.monotonic() + 300
        while step_of(folder) <= before and process.poll() is None:
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.05)
        time.sleep(chance.random() * 0.7)
        way = chance.choice(["terminate the launcher", "kill rank 0", "kill rank 1", "kill the launcher"])
        ranks = json.loads((folder / "environment.json").read_text())["ranks"]
        pid = ranks[int(way[-1])]["pid"] if way.startswith("kill rank") else process.pid
        os.kill(pid, signal.SIGTERM if way.startswith("terminate") else signal.SIGKILL)
        process.wait(timeout=300)
        while members(process):
            assert time.monotonic() < deadline + 300, "a rank has outlived its launcher"
            time.sleep(0.05)


def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(NUM_KILLS):
        kill_once(tmp_path, chance)
    finish(train(*ARGUMENTS, "--run-dir", "b", launcher=LAUNCHER), tmp_path, timeout=3000)
    finish(train(*ARGUMENTS, "--run-dir", "a", launcher=LAUNCHER), tmp_path, timeout=3000)
    assert step_of(tmp_path / "b") == 20_000
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert not list((tmp_path / "b").rglob(".tmp-*")), "the last start removes what killed ones left"
