"""The documents tell the truth: what they name exists, tables agree with results, code runs as typed."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from mnist.cli import _fields, _flag
from mnist.recipes import RECIPES
from mnist.reproduce import render
from tests.processes import PYTHON, ROOT, finish

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch" / "README.md", *(ROOT / "docs").glob("*.md")]
COMMANDS = [
    line.split("  #")[0].strip()
    for path in DOCUMENTS
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
OURS = [command for command in COMMANDS if "mnist." in command or "train_ddp.py" in command]


def flags_of(module: str) -> set[str]:
    """The flags that a command understands, from its options; of all of its subcommands."""
    if module == "train_ddp":
        return {_flag(name) for name in _fields()}
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
    """Module and arguments of the part of a command line that is ours; launchers' own flags come before it."""
    words = shlex.split(command.partition(" > ")[0])
    start = next(i for i, word in enumerate(words) if word == "train_ddp.py" or word.startswith("mnist."))
    return words[start].removesuffix(".py").removeprefix("mnist."), words[start + 1 :]


@pytest.mark.parametrize("command", OURS)
def test_a_command_that_is_shown_exists_with_its_flags(command: str) -> None:
    module, arguments = ours(command)
    flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    assert flags <= flags_of(module)
    recipes = [value for flag, value in pairwise(arguments) if flag == "--recipe"]
    assert set(recipes) <= set(RECIPES)


def test_the_commands_are_found() -> None:
    assert len(OURS) >= 17
    assert {ours(command)[0] for command in OURS} >= {"train_ddp", "predict", "evaluate", "plots", "bench", "doctor"}
    assert "--seeds" in flags_of("reproduce")
    assert "--untrained" in flags_of("plots")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if not link.startswith("http")]
    named = re.findall(r"`((?:mnist|tests|docs|launch)/[\w/.]+\.\w+)`", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    assert missing + [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", ["reliability.md", "promises.md"])
def test_tests_that_are_named_exist(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    modules = set(re.findall(r"`(test_\w+)(?:::\w+)?`", text))
    files = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    assert sorted(modules - files.keys()) == []
    for module, test in re.findall(r"`(test_\w+)::(\w+)`", text):
        assert re.search(rf"^def {test}\b", files[module].read_text(), flags=re.MULTILINE), test


def test_the_lines_of_python_run_as_they_stand(tmp_path: Path, smoke_run: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    shutil.copytree(smoke_run / "export", tmp_path / "runs" / "my-run" / "export")
    done = finish([*PYTHON, "-c", code], tmp_path)
    assert done.code == 0, done.err
    assert done.out.startswith("tensor([[")


def test_the_table_is_what_the_results_say_and_every_recipe_has_a_row() -> None:
    table = re.search(r"<!-- results -->\n(.*?)<!-- /results -->", README, flags=re.DOTALL)
    results = json.loads((ROOT / "docs" / "results.json").read_text())
    assert table is not None
    assert table[1] == render(results, RECIPES)
    assert {row["recipe"] for row in results["rows"]} == set(RECIPES)


def test_every_module_and_folder_is_in_the_tree() -> None:
    modules = [path.name for path in (ROOT / "mnist").glob("*.py") if path.stem != "__init__"]
    folders = [f"{path.name}/" for path in (ROOT / "mnist").iterdir() if (path / "__init__.py").exists()]
    assert [name for name in [*modules, *folders] if name not in README] == []
