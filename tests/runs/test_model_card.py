from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from mnist.cli import parse_command_line
from mnist.config import TrainConfig, evolve, fields_on_resume, to_flat
from mnist.data.sources import DatasetInfo
from mnist.recipes import RECIPES
from mnist.runs.model_card import command, escape, render, write_card
from mnist.runs.records import read_config
from mnist.runs.result import load_result
from tests.processes import PYTHON, ROOT, finish

ENVIRONMENT = {
    "ranks": [{"rank": 0, "host": "secret-host", "pid": 4321, "device": "NVIDIA H100"}],
    "packages": {"torch": "2.13.0", "accelerate": "1.15.0"},
    "threads_per_process": 2,
    "platform": "Linux-secret",
    "git_commit": "abc123",
    "command": ["/home/secret/train_ddp.py"],
}


def info_of(*class_names: str, channels: int = 1) -> DatasetInfo:
    return DatasetInfo((channels, 28, 28), class_names)


def card_of(run: Path, *class_names: str, config: TrainConfig | None = None, channels: int = 1) -> str:
    result = load_result(run)
    if class_names:  # a test set of so many classes
        confusion = [[5 * (row == column) for column in range(len(class_names))] for row in range(len(class_names))]
        result = replace(result, record=replace(result.record, test_confusion=confusion))
    info = info_of(*(class_names or "0123456789"), channels=channels)
    return render(result, config or read_config(run / "config.json"), ENVIRONMENT, info, [])


def blocks_of_python(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def test_the_hub_reads_the_accuracy_and_its_conditions_from_the_card(smoke_run: Path) -> None:
    card = ModelCard.load(smoke_run / "export" / "best" / "README.md", ignore_metadata_errors=False)
    test = json.loads((smoke_run / "result.json").read_text())["test"]
    (score,) = card.data.eval_results
    assert (score.metric_type, score.dataset_type, score.dataset_split) == ("accuracy", "digits", "test")
    assert score.metric_value == pytest.approx(test["accuracy"], abs=1e-6)
    assert score.metric_name == "test accuracy on 360 images, fp32, seed 0"
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        *("mit", "pytorch", "image-classification"),
    )
    assert (card.data.datasets, card.data.metrics) == (["digits"], ["accuracy"])
    assert f"**{test['accuracy']:.2%}**: {test['num_correct']} of 360 test images" in card.text


def test_the_pictures_of_the_card_lie_beside_it(smoke_run: Path) -> None:
    folder = smoke_run / "export" / "best"
    shown = re.findall(r"!\[.+\]\((.+)\)", (folder / "README.md").read_text())
    assert shown == ["curves.png", "mistakes.png"]
    for name in shown:
        assert (folder / name).read_bytes() == (smoke_run / "pictures" / name).read_bytes()


@pytest.mark.launch
def test_the_python_of_the_card_runs_with_the_folder_as_downloaded(smoke_run: Path, tmp_path: Path) -> None:
    shutil.copytree(smoke_run / "export" / "best", tmp_path / "model")
    (code,) = blocks_of_python((tmp_path / "model" / "README.md").read_text())
    assert len(code.splitlines()) <= 12
    done = finish([*PYTHON, "-c", code], tmp_path, PYTHONPATH=str(ROOT))
    assert done.code == 0, done.err
    assert re.match(r"tensor\(\[\d\]\) tensor\(\[0\.\d+\]", done.out)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs; keeps what was committed."""

    committed: ClassVar[dict[str, bytes]] = {}

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        body, here = self.rfile.read(int(self.headers["content-length"])), f"http://{self.headers['host']}/me/mine"
        if self.path.endswith("/create"):
            self.answer({"url": here})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{here}/commit/{'a' * 40}", "commitOid": "a" * 40, "success": True})
        else:
            self.answer({"errors": [], "warnings": []})  # validate-yaml

    def answer(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.mark.launch
def test_hf_upload_of_the_folder_publishes_every_file_of_it(smoke_run: Path, tmp_path: Path) -> None:
    folder = smoke_run / "export" / "best"
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command_line = [str(Path(sys.executable).with_name("hf")), "upload", "me/mine", str(folder)]
        here = f"http://127.0.0.1:{server.server_port}"
        settings = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        done = finish(command_line, tmp_path, HF_ENDPOINT=here, HF_TOKEN="hf_x", HF_HOME=str(tmp_path), **settings)
        server.shutdown()
    assert done.code == 0, done.err
    assert Hub.committed == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert Hub.committed.keys() == {"README.md", "config.json", "model.safetensors", "curves.png", "mistakes.png"}


def test_a_model_of_colour_pictures_is_shown_three_channels(smoke_run: Path) -> None:
    (code,) = blocks_of_python(card_of(smoke_run, channels=3))
    assert "torch.zeros(1, 3, 28, 28, dtype=torch.uint8)" in code


CHANGES: list[dict[str, Any]] = [
    {},
    {"seed": 3, "lr": 1e-5, "deterministic": True, "dataset": "digits"},
    {"val_size": 200, "patience": 2, "target_accuracy": 0.9, "step_mode": "captured"},
    {"mean": (0.1, 0.2, 0.3), "std": (0.5,)},
    {"mixed_precision": "bf16", "gradient_accumulation_steps": 2, "num_threads": 2, "run_dir": "/home/me/run"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("recipe", ["smoke", "fast", "accurate"])
def test_the_command_of_the_card_trains_with_the_same_configuration(recipe: str, changes: dict[str, Any]) -> None:
    config = evolve(RECIPES[recipe](), **changes)
    as_launched = {"mixed_precision": "no", "gradient_accumulation_steps": 1} | changes
    words = shlex.split(command(evolve(config, **as_launched), 1))
    assert words[:4] == ["python", "train_ddp.py", "--recipe", recipe]
    assert len(words) <= 4 + sum(2 if not isinstance(v, tuple) else 1 + len(v) for v in changes.values())
    again = to_flat(parse_command_line(words[2:]))
    free = fields_on_resume("free")
    assert {k: v for k, v in again.items() if k not in free} == {
        k: v for k, v in to_flat(config).items() if k not in free
    }


def test_the_command_of_a_recipe_made_in_python_names_all_that_differs_from_fast() -> None:
    config = evolve(RECIPES["yannet"](), recipe="mine", mixed_precision="no", gradient_accumulation_steps=1)
    words = shlex.split(command(config, 1))
    assert words[:6] == ["python", "train_ddp.py", "--recipe", "fast", "--mean", "0.0"]
    again = evolve(parse_command_line(words[2:]), recipe="mine", mixed_precision="no", gradient_accumulation_steps=1)
    assert again == config


def test_the_command_for_own_pictures_asks_for_their_folder() -> None:
    config = evolve(RECIPES["fast"](), dataset="folder", data_dir="/home/me/pictures", channels=1)
    line = command(config, 1)
    assert line == "python train_ddp.py --recipe fast --dataset folder --channels 1 --data-dir PICTURES"


def test_two_processes_are_started_by_the_command() -> None:
    line = command(RECIPES["fast"](), 2)
    assert line == "torchrun --local-addr localhost --nproc-per-node 2 train_ddp.py --recipe fast"


ODD_NAMES = [
    *("a|b", "<script>alert(1)</script>", "`code`", "*bold*", "two\nlines", "[link](http://x.org)", "---", "# 1"),
    *("back\\slash", "~~gone~~", "&lt;", "a\ud800b", "$x$", "{shape}", "\u202eleft"),
]


def test_odd_names_of_classes_are_shown_as_they_are(smoke_run: Path) -> None:
    text = card_of(smoke_run, *ODD_NAMES)
    text.encode()
    html = MarkdownIt("commonmark").enable("table").enable("strikethrough").render(text)
    (row,) = re.findall(r"<td>classes</td>\n<td>(.*?)</td>", html)
    expected = ", ".join(" ".join(name.replace("\ud800", " ").replace("\u202e", " ").split(" ")) for name in ODD_NAMES)
    shown = row.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert shown == expected.replace("\n", " ")
    assert set(re.findall(r"<(\w+)", row)) == set()


def test_a_plain_name_is_not_changed() -> None:
    assert escape("T-shirt 2.0 (new), 50%") == "T-shirt 2.0 (new), 50%"


def test_nothing_in_the_card_tells_of_paths_hosts_or_users(smoke_run: Path) -> None:
    config = read_config(smoke_run / "config.json")
    paths = {"data_dir": "/home/secret/data", "run_dir": "/home/secret/run", "init_from": "/home/secret/weights"}
    text = card_of(smoke_run, config=evolve(config, **paths, wandb_name="secret", wandb_notes="secret"))
    assert "secret" not in text
    assert "4321" not in text
    assert "--init-from WEIGHTS" in text


def test_a_card_that_cannot_be_written_is_a_warning(smoke_run: Path, tmp_path: Path) -> None:
    shutil.copytree(smoke_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "README.md"))
    (tmp_path / "run" / "environment.json").write_text("{}")
    warnings: list[str] = []
    write_card(load_result(tmp_path / "run"), RECIPES["smoke"](), info_of(*"0123456789"), warnings.append)
    assert len(warnings) == 1
    assert warnings[0].startswith("no model card: ")
    assert not (tmp_path / "run" / "export" / "best" / "README.md").exists()


@pytest.mark.parametrize(
    ("num_right", "words"), [(5, "none: all classes are right"), (4, "9 80.00%")], ids=["all right", "one mistake"]
)
def test_classes_without_test_images_have_no_accuracy(smoke_run: Path, num_right: int, words: str) -> None:
    result = load_result(smoke_run)
    confusion = [[0] * 10 for _ in range(9)] + [[5 - num_right, *[0] * 8, num_right]]
    result = replace(result, record=replace(result.record, test_confusion=confusion))
    text = render(result, read_config(smoke_run / "config.json"), ENVIRONMENT, info_of(*"0123456789"), [])
    assert f"| lowest accuracy | {words} |" in text
