"""The package is a layered graph of folders: a folder imports from lower ones only, and functions import nothing."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up. What stands on one line does not know its neighbours.
LAYERS = [
    {"errors", "seeding"},
    {"config"},
    {"recipes", "models"},
    {"system"},
    {"data"},
    {"training"},
    {"runs"},
    {"cli"},
    {"plots"},
    {"predict", "doctor", "bench", "evaluate", "export", "reproduce"},
    {"demo"},
    {"train_ddp"},
]
TRAINING_PATH = {"config", "errors", "seeding", "recipes", "models", "system", "data", "training", "runs"}
STANDARD_LIBRARY_ONLY = {"errors", "seeding", "config"} | {
    f"system.{name}" for name in ("fault_injection", "process", "signals", "watchdog")
}
FILES = [ROOT / "train_ddp.py", *sorted((ROOT / "mnist").rglob("*.py"))]


def name_of(path: Path) -> str:
    """training.step for mnist/training/step.py, plots for mnist/plots/__init__.py."""
    parts = path.relative_to(ROOT / "mnist" if path.is_relative_to(ROOT / "mnist") else ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in FILES}


def folder_of(module: str) -> str:
    return module.partition(".")[0]


def imported_modules(tree: ast.AST) -> set[str]:
    """Full names of all modules imported."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parent = node.module.removeprefix("mnist").removeprefix(".")
            names = {".".join(filter(None, (parent, alias.name))) for alias in node.names}
            submodules = {f"mnist.{name}" for name in names if node.module.startswith("mnist") and name in MODULES}
            found |= submodules or {node.module}
    return found


def imported_from_here(path: Path) -> set[str]:
    return {name[6:] for name in imported_modules(ast.parse(path.read_text())) if name.startswith("mnist.")}


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_a_folder_imports_from_lower_folders_only(module: str) -> None:
    level = {folder: number for number, layer in enumerate(LAYERS) for folder in layer}
    own = folder_of(module)
    others = {name for name in imported_from_here(MODULES[module]) if folder_of(name) != own}
    assert {name: level[folder_of(name)] for name in others if level[folder_of(name)] >= level[own]} == {}


def test_no_modules_import_one_another_in_a_circle() -> None:
    TopologicalSorter({name: imported_from_here(path) - {name} for name, path in MODULES.items()}).prepare()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_function_imports(path: Path) -> None:
    functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
    assert not [imported_modules(function) for function in functions if imported_modules(function)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_code_branches_on_the_name_of_a_recipe(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare | ast.Match):
            names = {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}
            assert "recipe" not in names, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("module", sorted(STANDARD_LIBRARY_ONLY))
def test_what_runs_before_torch_is_imported_needs_the_standard_library_only(module: str) -> None:
    imported = imported_modules(ast.parse(MODULES[module].read_text()))
    others = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert others <= {f"mnist.{name}" for name in STANDARD_LIBRARY_ONLY}


def test_every_module_says_what_goes_in_and_out() -> None:
    for name, path in MODULES.items():
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        is_told = "Out: " in text or " -> " in text
        assert is_told or path.stem == "__init__" or name in ("train_ddp", "system.torchvision_compat"), name


def test_the_entry_stays_a_table_of_contents() -> None:
    assert len((ROOT / "train_ddp.py").read_text().splitlines()) <= 110


def test_asserts_only_narrow_types_because_option_o_removes_them() -> None:
    for path in [ROOT / "train_ddp.py", *(ROOT / "mnist").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                assert ast.unparse(node.test).endswith(" is not None"), f"{path}:{node.lineno}"
                assert node.msg is None, f"{path}:{node.lineno}"
