"""`train(config)` in a real Jupyter kernel: what a cell shows, an interrupt, two processes; and the tutorial."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.processes import ROOT
from tests.ranks import free_port

pytestmark = pytest.mark.launch

FIRST = """
import warnings; warnings.simplefilter("ignore")  # of tqdm, which wants ipywidgets
import signal
from pathlib import Path
from accelerate import notebook_launcher
from mnist.config import evolve
from mnist.recipes import smoke
from mnist.runs.result import load_result
from train_ddp import train
config = evolve(smoke(), min_accuracy=None, pictures=False, log_every=2)
"""


class Notebook:
    """A kernel that is asked one cell after the other."""

    def __init__(self, client: NotebookClient) -> None:
        self.client = client

    def run(self, code: str) -> list[nbformat.NotebookNode]:
        """The outputs of a cell; streams in one piece each."""
        cell = nbformat.v4.new_code_cell(code)
        self.client.nb.cells.append(cell)
        self.client.execute_cell(cell, len(self.client.nb.cells) - 1)
        return list(cell.outputs)

    def printed(self, code: str) -> str:
        return "".join(output["text"] for output in self.run(code) if output.get("name") == "stdout")


@pytest.fixture(scope="module")
def notebook() -> Iterator[Notebook]:
    client = NotebookClient(
        nbformat.v4.new_notebook(), timeout=200, coalesce_streams=True, resources={"metadata": {"path": str(ROOT)}}
    )
    with client.setup_kernel():
        found = Notebook(client)
        assert found.run(FIRST) == []
        yield found


def test_a_cell_shows_one_bar_that_is_replaced_a_row_per_evaluation_and_the_result(
    notebook: Notebook, tmp_path: Path
) -> None:
    outputs = notebook.run(f"""
result = train(evolve(config, run_dir={str(tmp_path / "a")!r}, max_steps=100))
(result.status, result.test.num_samples, result.history[0]["step"], result.load_model().model.training)
""")
    assert outputs[-1]["data"]["text/plain"] == "('finished', 360, 2, False)"
    (bar,) = [output["data"] for output in outputs if output["output_type"] == "display_data"]
    assert "epoch 1/1" in bar["text/plain"]
    assert " 100/100 " in bar["text/plain"]
    assert "100/100" in bar["text/html"]
    (printed,) = [output["text"] for output in outputs if output.get("name") == "stdout"]
    assert "\x1b" not in printed
    assert " best\n" in printed
    assert len(printed.splitlines()) < 30, "although there are 50 training records"
    assert outputs[-1]["output_type"] == "execute_result"
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_an_interrupt_of_the_kernel_saves_and_the_cell_ends_with_a_result_and_no_traceback(
    notebook: Notebook, tmp_path: Path
) -> None:
    def interrupt() -> None:
        deadline = time.monotonic() + 150
        while not (tmp_path / "a/metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        asyncio.run(notebook.client.km.interrupt_kernel())

    thread = threading.Thread(target=interrupt)
    thread.start()
    outputs = notebook.run(f"""
long = evolve(config, run_dir={str(tmp_path / "a")!r}, epochs=1000, schedule="constant")
result = train(long)
(result.status, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
""")
    thread.join()
    assert outputs[-1]["data"]["text/plain"] == "('preempted', True)"
    (step,) = [int(path.name.removeprefix("step-")) for path in (tmp_path / "a/checkpoints").iterdir()]
    more = f"train(evolve(long, epochs=1, max_steps={step + 1})).record.steps == {step + 1}"
    assert notebook.run(more)[-1]["data"]["text/plain"] == "True", "and it continues"


def test_a_mistake_in_a_cell_is_raised_and_leaves_no_bar(notebook: Notebook, tmp_path: Path) -> None:
    outputs = notebook.run(f"""
try:
    train(evolve(config, run_dir={str(tmp_path)!r}, val_size=5000))
except Exception as error:
    print(type(error).__name__, error)
""")
    assert [output["data"]["text/plain"] for output in outputs if "data" in output] == [""], "the bar has gone"
    assert outputs[-1]["text"].startswith("UserError --val-size 5000: must be below the 1,437 training images")


def test_notebook_launcher_trains_on_two_processes_and_the_result_is_read_from_the_run(
    notebook: Notebook, tmp_path: Path
) -> None:
    printed = notebook.printed(f"""
two = evolve(config, run_dir={str(tmp_path)!r}, max_steps=60)
notebook_launcher(train, (two,), num_processes=2, use_port="{free_port()}")
result = load_result({str(tmp_path)!r})
print(result.status, result.record.world_size)
""")
    assert printed.endswith("finished 2\n")
    assert printed.count("test loss") == 1
    assert len(printed.splitlines()) < 30
    assert json.loads((tmp_path / "result.json").read_text())["world_size"] == 2


TUTORIAL = ROOT / "docs" / "tutorial.ipynb"


@pytest.mark.timeout(900)
def test_the_tutorial_runs_from_top_to_bottom_on_the_embedded_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)
    shutil.copytree(ROOT / "mnist", tmp_path / "mnist", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_ddp.py", tmp_path)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "digit.png", tmp_path / "docs")
    notebook = nbformat.read(TUTORIAL, 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("num_processes=2)", f'num_processes=2, use_port="{free_port()}")')
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path / "docs")}}).execute()
    values = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "execute_result" and "image/png" not in output["data"]
    ]
    assert values[1:] == ["'preempted'", "'finished'", "True"]
    assert sorted(path.name.partition("-digits-")[0] for path in (tmp_path / "runs").iterdir()) == ["fast"] * 3


def test_the_outputs_of_the_tutorial_are_whole_small_and_of_no_machine() -> None:
    text = TUTORIAL.read_text()
    assert len(text) < 600_000
    assert re.findall(r"/(?:work|root|home|tmp|opt|usr|Users)/", text) == []
    cells = [cell for cell in nbformat.reads(text, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell.outputs]
    assert "error" not in kinds
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 7
