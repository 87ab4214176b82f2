from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mnist.config import TrainConfig, evolve, to_flat
from mnist.errors import MachineError
from mnist.runs.resumed_config import resumed_config

SAVED = evolve(TrainConfig(), epochs=7, inject=("nan@3",))


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path.parent


def test_a_run_directory_continues_in_its_place_without_its_faults(tmp_path: Path) -> None:
    folder = write(tmp_path / "a" / "config.json", to_flat(SAVED))
    assert resumed_config(str(folder), None) == evolve(SAVED, run_dir=str(folder), resume="auto", inject=())
    assert resumed_config(str(folder), f"{folder}/../a").output.run_dir == str(folder)


def test_a_checkpoint_begins_a_run_elsewhere(tmp_path: Path) -> None:
    folder = write(tmp_path / "step-00000003" / "manifest.json", {"config": to_flat(SAVED)})
    for run_dir in (None, "b"):
        found = resumed_config(str(folder), run_dir)
        assert (found.loop.epochs, found.output.resume, found.output.run_dir) == (7, str(folder), run_dir)


def test_last_is_the_run_whose_configuration_was_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, time_s in (("a", 20), ("b", 10)):
        write(tmp_path / "runs" / name / "config.json", to_flat(SAVED))
        os.utime(tmp_path / "runs" / name / "config.json", (time_s, time_s))
    assert resumed_config("last", None).output.run_dir == "runs/a"


def test_a_checkpoint_whose_configuration_is_a_list_is_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "manifest.json", {"config": []})
    with pytest.raises(MachineError, match="the configuration must be an object"):
        resumed_config(str(folder), None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({**to_flat(SAVED), "colour": 1}, r"its configuration cannot be used \(unknown configuration field: colour\)"),
        ({**to_flat(SAVED), "epochs": 0}, r"its configuration cannot be used \(--epochs 0: must lie in"),
        ([1], "holds no JSON object"),
        ({}, "no run there; give auto, never, last"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(tmp_path: Path, content: Any, words: str) -> None:
    folder = write(tmp_path / "config.json", content)
    with pytest.raises(MachineError, match=f"^--resume {folder}: .*{words}") as caught:
        resumed_config(str(folder), None)
    assert "\n" not in str(caught.value)
