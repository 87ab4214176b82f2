"""The package is a layered graph: a module imports from lower layers only, and functions import nothing."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_LAYERS = """
    faults files process seeding signals torchvision_compat
    config
    batches canvas console digit_image download features history idx losses metrics
        models optim plan recipes transforms wandb_run
    checkpoint curves data engine export pictures run_dir runtime tracking
    captured checkup cli gallery report resume scoreboard
    checks_compute checks_machine rivals run
    contest scaling
    bench doctor evaluate plots predict reproduce startup train_ddp
"""
LAYERS = [set(layer.split()) for layer in _LAYERS.replace("\n        ", " ").strip().splitlines()]
STANDARD_LIBRARY_ONLY = {"config", "faults", "files", "process", "seeding", "signals"}
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
# Modules go by their own name alone, whatever room they are in.
ROOMS = {"mnist", "mnist.benchmark", "mnist.drawing", "mnist.health"}
FILES = [ROOT / "train_ddp.py", *sorted((ROOT / "mnist").rglob("*.py"))]


def imported_modules(tree: ast.AST) -> set[str]:
    """Full names of all modules imported; our own as mnist.<module>, without their room."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ROOMS:
            found |= {f"mnist.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").rpartition(".")[0] in ROOMS:
            found.add(f"mnist.{(node.module or '').rpartition('.')[2]}")
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_module_imports_from_lower_layers_only(path: Path) -> None:
    if path.stem == "__init__":
        return
    own = LAYER_OF[path.stem]
    imported = {name[6:] for name in imported_modules(ast.parse(path.read_text())) if name.startswith("mnist.")}
    assert {name: LAYER_OF[name] for name in imported if LAYER_OF[name] >= own} == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_function_imports(path: Path) -> None:
    functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
    assert not [imported_modules(function) for function in functions if imported_modules(function)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_code_branches_on_the_name_of_a_recipe(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare | ast.Match):
            names = {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}
            assert "recipe" not in names, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("module", sorted(STANDARD_LIBRARY_ONLY))
def test_the_bottom_needs_the_standard_library_only(module: str) -> None:
    imported = imported_modules(ast.parse((ROOT / "mnist" / f"{module}.py").read_text()))
    others = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert others <= {f"mnist.{name}" for name in STANDARD_LIBRARY_ONLY}


def test_every_module_has_its_place_and_says_what_goes_in_and_out() -> None:
    for path in FILES:
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert path.stem == "__init__" or path.stem in LAYER_OF
        assert path.stem in ("__init__", "train_ddp", "torchvision_compat") or "Out: " in text or " -> " in text


def test_the_entry_stays_a_table_of_contents() -> None:
    assert len((ROOT / "train_ddp.py").read_text().splitlines()) <= 130
