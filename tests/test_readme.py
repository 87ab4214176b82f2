"""The documents tell the truth: what they name exists, tables agree with results, links lead somewhere, code runs."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import shlex
import shutil
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from mnist.cli import _fields, _flag
from mnist.recipes import RECIPES
from mnist.reproduce import render
from tests.processes import PYTHON, ROOT, finish
from tests.test_layers import LAYERS

README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
]
PROGRAMS = ("python ", "python3 ", "torchrun ", "accelerate ", "launch/", "srun ", "sbatch ")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks_of(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a language, in order."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [content for name, content in blocks if name == language]


def commands_of(text: str) -> set[str]:
    """What a page tells people to type: lines of its bash blocks, and commands within its text and tables."""
    lines = {line.split(" #")[0].strip() for block in blocks_of(text, "bash") for line in block.splitlines()}
    spans = {span for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text) if span.startswith(PROGRAMS)}
    return {command for command in lines | spans if command}


COMMANDS = sorted({command for path in DOCUMENTS for command in commands_of(path.read_text())})
OURS = [
    command for command in COMMANDS if re.search(r"\bmnist\.[a-z]|train_ddp\.py|\blaunch/\w+\.(sh|sbatch)", command)
]


def flags_of(module: str) -> set[str]:
    """The flags that a command understands, from its options; of all of its subcommands."""
    if module == "train_ddp":
        fields = _fields()
        return {_flag(name) for name in fields} | {_flag(f"no_{name}") for name in fields if fields[name][0] is bool}
    names: set[str] = {"--help"}
    name = f"mnist.{module}" if (ROOT / "mnist" / f"{module}.py").exists() else f"mnist.{module}.__main__"
    waiting: list[Any] = [importlib.import_module(name).Options]
    while waiting:
        options = waiting.pop()
        if dataclasses.is_dataclass(options):
            hints = get_type_hints(options)
            names |= {"--" + field.name.replace("_", "-") for field in dataclasses.fields(options)}
            waiting += hints.values()
        else:
            waiting += [part for part in get_args(options) if isinstance(part, type) or get_args(part)]
    return names | ({"--run-dir"} if "--run" in names else set())


def ours(command: str) -> tuple[str, list[str]]:
    """Module and arguments of the part of a command line that is ours; launchers' own flags come before it.

    The scripts in launch/ hand their arguments on to the training command.
    """
    words = shlex.split(command.partition(" > ")[0])
    for i, word in enumerate(words):
        if word == "train_ddp.py" or word.startswith("mnist."):
            return word.removesuffix(".py").removeprefix("mnist."), words[i + 1 :]
        if word.startswith("launch/") and not word.endswith(".yaml"):
            assert (ROOT / word).exists(), word
            return "train_ddp", words[i + 1 :]
    raise AssertionError(command)


@pytest.mark.parametrize("command", OURS)
def test_a_command_that_is_shown_exists_with_its_flags(command: str) -> None:
    module, arguments = ours(command)
    flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    assert flags <= flags_of(module)
    recipes = [value for flag, value in pairwise(arguments) if flag == "--recipe"]
    assert set(recipes) <= set(RECIPES) | {"NAME", "mine"}  # mine: docs/adapt.md adds it


def test_the_commands_of_all_kinds_are_found() -> None:
    assert len(OURS) >= 50
    commands = {ours(command)[0] for command in OURS}
    assert commands >= {"train_ddp", "predict", "evaluate", "plots", "bench", "doctor", "reproduce"}
    assert "--seeds" in flags_of("reproduce")
    assert "--untrained" in flags_of("plots")


def anchors_of(path: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text()
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            wrong.append(link)
    named = re.findall(r"`((?:mnist|tests|docs|launch)/[\w/.]+\.\w+)`", text)
    assert wrong + [name for name in named if not (ROOT / name).exists()] == []


def test_functions_that_contributing_walks_through_are_where_it_says() -> None:
    pairs = re.findall(r"`(mnist/[\w/]+\.py)`, `(\w+)(?:\.(\w+))?`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(pairs) >= 9
    for file, *names in pairs:
        for name in filter(None, names):
            assert re.search(rf"^ *(def|class) {name}\b", (ROOT / file).read_text(), flags=re.MULTILINE), (file, name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_tests_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    files = {found.stem: found.read_text() for found in (ROOT / "tests").rglob("test_*.py")}
    modules = set(re.findall(r"`(test_\w+)(?:::\w+)?`", text)) | set(re.findall(r"tests/[\w/]*(test_\w+)\.py", text))
    assert sorted(modules - files.keys()) == []
    module = ""
    for name, test in re.findall(r"`(test_\w+)?(?:::(\w+))?`", text):
        module = name or module  # `::test_x` alone is of the file that was named last
        if test:
            assert re.search(rf"^def {test}\b", files[module], flags=re.MULTILINE), f"{module}::{test}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md"]
    assert [name for name in pages if f"({name})" not in index] == []


def test_the_readme_has_at_most_1000_words() -> None:
    text = re.sub(r"```.*?```|<!--.*?-->", "", README, flags=re.DOTALL)
    words = " ".join(line for line in text.splitlines() if not line.startswith("|")).split()
    assert len(words) <= 1000


PLACED = re.compile(r"At the end of `([\w/.]+)`(?:(?!\n\n).)*\n\n```python\n(.*?)```", re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{name_of(path)}-{number}")
    for path in DOCUMENTS
    if path.name != "data.md"  # tests/data/test_page.py runs it, with the commands before it
    for number, block in enumerate(blocks_of(path.read_text(), "python"))
    if not block.startswith(" ") and block not in {code for _, code in PLACED.findall(path.read_text())}
]


def test_the_blocks_of_python_that_run_are_found() -> None:
    assert {"README.md", "docs/use.md"} <= {str(block.id).rpartition("-")[0] for block in BLOCKS}


@pytest.mark.parametrize("code", BLOCKS)
def test_the_lines_of_python_run_as_they_stand(code: str, tmp_path: Path, smoke_run: Path) -> None:
    shutil.copytree(smoke_run / "export", tmp_path / "runs" / "my-run" / "export")
    done = finish([*PYTHON, "-c", code], tmp_path)
    assert done.code == 0, done.err
    assert done.out


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this repository with all that docs/adapt.md adds, and a data set of 47 classes."""
    copy = tmp_path_factory.mktemp("adapted")
    shutil.copytree(ROOT / "mnist", copy / "mnist", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_ddp.py", copy)
    page = (ROOT / "docs" / "adapt.md").read_text()
    for file, code in PLACED.findall(page):
        path = copy / file
        path.write_text(f"{path.read_text()}\n\n{code}")
    config = copy / "mnist/config.py"
    settings = config.read_text()
    for name, word in re.findall(r'`"(\w+)"`\s+in\s+`(\w+)`', page):
        settings, count = re.subn(rf"^({word} = Literal\[)", rf'\1"{name}", ', settings, flags=re.MULTILINE)
        assert count == 1, word
    config.write_text(settings)
    raw = copy / "data/Mine/raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 256), ("t10k", 94)):
        images = bytes(place % 251 for place in range(count * 28 * 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 0x803, count, 28, 28) + images)
        labels = bytes(place % 47 for place in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, count) + labels)
    return copy


def test_the_page_on_adapting_touches_at_most_2_files_each_and_says_how_many_lines() -> None:
    page = (ROOT / "docs" / "adapt.md").read_text()
    placed = dict(PLACED.findall(page))
    rows = re.findall(r"^\| (?:a|an|your) [\w', ]+ \| (.*?) \| (\d+) \|$", page, flags=re.MULTILINE)
    stated = {re.findall(r"`([\w/.]+)`", files)[0]: int(count) for files, count in rows if "`" in files}
    assert len(rows) == 8
    assert all(len(files.split(", ")) <= 2 for files, _ in rows)
    needs_word = {file for files, _ in rows for file in re.findall(r"`([\w/.]+)`, `mnist/config.py`", files)}
    counts = {file: len([line for line in code.splitlines() if line]) for file, code in placed.items()}
    assert {file: count + (file in needs_word) for file, count in counts.items()} == stated


def test_what_the_page_on_adapting_adds_is_trained_with(adapted: Path) -> None:
    command = [*PYTHON, "train_ddp.py", "--recipe", "mine", "--dataset", "mine", "--max-steps", "4"]
    store = {"MLFLOW_TRACKING_URI": (adapted / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    places = {"PYTHONPATH": str(adapted), "MNIST_DATA_DIR": "data", **store}
    done = finish([*command, "--global-batch-size", "64", "--run-dir", "run"], adapted, **places)
    assert (done.code, "did not start" in done.err) == (0, False), done.err
    records = [json.loads(line) for line in (adapted / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {record["split"] for record in records if "top3" in record} == {"train", "test"}
    result = json.loads((adapted / "run" / "result.json").read_text())
    assert result["test"]["accuracy"] <= result["test"]["top3"] <= 1
    assert len(result["test_confusion"]) == 47
    saved = json.loads((adapted / "run" / "config.json").read_text())
    assert (saved["model"], saved["loss"], saved["optimizer"]) == ("small", "focal", "lion")
    names = {"confusion", "curves", "features", "filters", "mistakes", "samples"}
    assert {path.stem for path in (adapted / "run" / "pictures").glob("*.png")} == names
    (points,) = (adapted / "mlruns").rglob("metrics/test/top3")
    assert float(points.read_text().split()[1]) == pytest.approx(result["test"]["top3"])
    assert len(list((adapted / "mlruns").rglob("model.safetensors"))) >= 1
    refused = finish([*command, "--data-dir", "none"], adapted, **places)
    assert (refused.code, "--dataset mine: not in none/Mine/raw" in refused.err) == (2, True), refused.err


def test_the_table_is_what_the_results_say() -> None:
    table = re.search(r"<!-- results -->\n(.*?)<!-- /results -->", README, flags=re.DOTALL)
    results = json.loads((ROOT / "docs" / "results.json").read_text())
    assert table is not None
    assert table[1] == render(results)


def tree() -> str:
    """The picture of the folders in the README."""
    return next(block for block in blocks_of(README, "") if "mnist/\n" in block)


def test_every_module_and_folder_is_in_the_tree() -> None:
    modules = [path.name for path in (ROOT / "mnist").glob("*.py") if path.stem != "__init__"]
    folders = [f"{path.name}/" for path in (ROOT / "mnist").iterdir() if (path / "__init__.py").exists()]
    assert [name for name in [*modules, *folders] if name not in tree()] == []


def test_files_that_the_tree_names_exist() -> None:
    files = {path.name for path in [*(ROOT / "mnist").rglob("*.py"), *ROOT.glob("*.*")]}
    named = set(re.findall(r"\b\w+\.(?:py|yaml)\b", tree()))
    assert len(named) >= 25
    assert sorted(named - files) == []


def test_the_map_of_layers_is_the_one_that_is_tested() -> None:
    (picture,) = blocks_of((ROOT / "CONTRIBUTING.md").read_text(), "")
    rows = [re.split(r" {3,}", line)[0].split() for line in picture.splitlines() if line and not line.startswith(" ")]
    assert [set(row) for row in rows] == LAYERS[::-1]


OTHERS_SAY = (
    "IPv6 network addresses",
    "DeepSpeed is not",
    "torch_xla",
    "torchvision::nms",
    "were not passed",
    "already in use",
)
MESSAGES = [
    message
    for row in re.findall(r"^\| (.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)
    for message in re.findall(r"`([^`]+)`", row)
    if not message.startswith(PROGRAMS) and not any(words in message for words in OTHERS_SAY)
]
VALUES = r"\.\.\.|\d[\d.,]*(?: s\b)?|\([^)]*\)|\S*[/=.]\S*|\b[A-Z]{4,}\b|node7|mnist|where|labels|images|pid|offline"
VALUES += "|the loss is"  # or: weights are


def texts_of(path: Path) -> str:
    """All texts in a module, with a gap where an f-string has a value."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return "\n".join(texts)


def test_messages_that_are_explained_are_messages_of_this_code() -> None:
    texts = "\n".join(texts_of(path) for path in (ROOT / "mnist").rglob("*.py"))
    assert len(MESSAGES) >= 30
    wrong = []
    for message in MESSAGES:
        parts = re.split(VALUES, message)  # what is said in every case; the longest piece of it is looked for
        longest = max((part.strip(" :;") for part in parts), key=len)
        if len(longest) < 3 or longest not in texts:
            wrong.append((message, longest))
    assert wrong == []
