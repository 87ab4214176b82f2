"""The section on people's own pictures in docs/data.md does what it says, command by command."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, finish

SECTION = (ROOT / "docs" / "data.md").read_text().partition("## Your own pictures")[2]


@pytest.mark.timeout(600)
def test_from_mkdir_to_a_model_of_own_pictures_that_predicts(tmp_path: Path) -> None:
    for name in ("mnist", "train_ddp.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", SECTION, flags=re.DOTALL | re.MULTILINE)
    assert [language for language, _ in blocks] == ["bash", "python", "bash"]
    commands = [["bash", "-ec", line] for line in blocks[0][1].splitlines()]
    commands += [[sys.executable, "-c", blocks[1][1]]]
    commands += [["bash", "-ec", line] for line in blocks[2][1].splitlines()]
    outputs = {}
    for command in commands:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = finish(command, tmp_path, timeout=300, PATH=path, PYTHONPATH=str(ROOT))
        assert done.code == 0, (command, done.err)
        outputs[command[-1].split(" --run ")[0]] = done.out
    result = json.loads((tmp_path / "runs" / "shapes" / "result.json").read_text())
    assert result["test"]["num_correct"] >= 25  # of 30; the page says what seed 0 gives
    assert "exactly as in training" in outputs["python -m mnist.evaluate"]
    assert "circle" in outputs["python -m mnist.predict pictures/test/circle/0.png"].splitlines()[0]
    answers = json.loads(outputs["python -m mnist.predict pictures/test"])
    right = sum(answer["class"] == Path(answer["file"]).parent.name for answer in answers)
    assert right == result["test"]["num_correct"]
    assert (tmp_path / "runs" / "shapes" / "pictures" / "mistakes.png").exists()
    assert (tmp_path / "runs" / "shapes" / "export" / "best" / "model.pt2").exists()
