from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist.runs.tracking.tensorboard import TensorBoardRun
from mnist.runs.tracking.tracker import Tracker
from tests.ranks import run_ranks
from tests.runs.test_run import SMALL, run


def test_tensorboard_shows_what_the_file_holds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(run, 1, tmp_path / "run", *SMALL, "--pictures", "--tensorboard") == [0]
    assert f"tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}" in capfd.readouterr().out
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for split in ("train", "test"):
        records = [record for record in lines if record["split"] == split]
        points = [(point.step, point.value) for point in events.Scalars(f"{split}/loss")]
        assert [step for step, _ in points] == [record["step"] for record in records]
        assert [value for _, value in points] == pytest.approx([record["loss"] for record in records])
    assert events.Scalars("perf/epoch_time_s")
    assert events.Scalars("perf/memory_mb")[0].value > 100
    assert {"pictures/samples", "pictures/mistakes"} <= set(events.Tags()["images"])
    (table,) = events.Tensors("test/confusion/text_summary")
    assert table.tensor_proto.string_val[0].startswith(b"|true|0|1|")


def test_tensorboard_hides_what_a_run_has_gone_back_behind(tmp_path: Path) -> None:
    """Five records; a resume from step 3 takes two of them back, a resume after a crash takes none."""
    for wanted, steps in (([1, 2, 3, 4, 5], range(1, 6)), ([1, 2, 3, 4], range(4, 5))):
        if wanted[-1] == 4:
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
            (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]))
        tracker = Tracker(tmp_path, "digits", pytest.fail)
        tracker.attach("TensorBoard", partial(TensorBoardRun, tmp_path, tracker.next_step))
        for step in steps:
            tracker.log("train", step, step / 5, loss=float(step), accuracy=0.5)
        tracker.finish("finished", {})
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [point.step for point in events.Scalars("train/loss")] == wanted
        time.sleep(1.1)  # event files are told apart and ordered by the second
