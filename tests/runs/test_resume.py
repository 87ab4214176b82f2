"""What may continue a run, and what it says about it."""

from __future__ import annotations

from mnist.config import evolve, to_flat
from mnist.recipes import RECIPES
from mnist.runs.checkpoint_files import Checkpoint
from mnist.runs.resume import check_checkpoint
from mnist.training.loop import TrainState
from mnist.training.plan import build_plan

CONFIG = evolve(RECIPES["lenet5"](), mixed_precision="no", gradient_accumulation_steps=1)
FACTS = {"data_files": "abc", "code": "def", "threads": 1}
SAVED = Checkpoint(
    tensors={},
    loop=TrainState(step=5),
    scaler=None,
    config=to_flat(CONFIG),
    plan=build_plan(CONFIG, 60_000, 1),
    facts=FACTS,
)


def test_another_precision_accumulation_and_number_of_processes_are_noted_once_each() -> None:
    config = evolve(CONFIG, mixed_precision="bf16", gradient_accumulation_steps=2)
    assert check_checkpoint(SAVED, config, build_plan(config, 60_000, 4), FACTS) == [
        "from here on: --gradient-accumulation-steps was 1, now 2, --mixed-precision was no, now bf16",
        "from here on: processes 1 -> 4 (same global batches)",
    ]


def test_other_code_and_other_threads_are_noted() -> None:
    code, threads = check_checkpoint(SAVED, CONFIG, SAVED.plan, {**FACTS, "code": "ghi", "threads": 2})
    assert code.startswith("the code that trains has changed")
    assert threads == "from here on: threads 1 -> 2"


def test_the_same_start_again_needs_no_note() -> None:
    assert check_checkpoint(SAVED, CONFIG, SAVED.plan, FACTS) == []
