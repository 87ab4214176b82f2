"""Shapes and numbers of classes belong to the table of data sets, and to nothing else in mnist/data."""

import ast
from pathlib import Path

import pytest

from mnist.data import datasets

FILES = sorted(Path(datasets.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_28_and_no_10_outside_the_table_of_data_sets(path):
    tree = ast.parse(path.read_text())
    table = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Source"), None)
    inside = {id(node) for node in ast.walk(table)} if table else set()
    numbers = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in inside]
    assert [node.lineno for node in numbers if node.value in (28, 10)] == []
