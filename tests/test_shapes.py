"""Sides, channels and classes are properties of data sets and networks: no other code has their numbers."""

import ast

import pytest

from tests.processes import ROOT

# Data sets, networks and recipes; and the front, which has the networks of other people's MNIST scripts.
MAY = ("models.py", "recipes.py", "data/sources.py", "bench/front.py")
FILES = [path for path in sorted((ROOT / "mnist").rglob("*.py")) if str(path.relative_to(ROOT / "mnist")) not in MAY]
MAKERS = {"zeros", "ones", "empty", "full", "rand", "randn", "randint", "one_hot", "Linear", "Conv2d", "view"}


def has(node, *values):
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value in values


def is_about_classes(node):
    name = getattr(node, "arg", None) or getattr(node, "id", None) or getattr(node, "attr", None) or ""
    return "class" in name.lower() or "label" in name.lower()


def holds_number_of_mnist(node):
    """Whether this is 28 or 784; 10 as a number of classes; a fixed number of channels of a batch that is made."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
        parts = [part for argument in node.args for part in getattr(argument, "elts", [argument])]
        return name in MAKERS and (any(has(part, 10) for part in parts) or (len(parts) >= 4 and has(parts[1], 1, 3)))
    if isinstance(node, ast.keyword):
        return has(node.value, 10) and is_about_classes(node)
    if isinstance(node, ast.Assign):
        return has(node.value, 10) and is_about_classes(node.targets[0])
    if isinstance(node, ast.Compare):
        return has(node.comparators[0], 10) and is_about_classes(node.left)
    return has(node, 28, 784)


def numbers_of_mnist(tree):
    """Them all, but for those in constants with MNIST_ in their name, as source text."""
    constants = [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and "MNIST_" in ast.unparse(n.targets[0])]
    allowed = {id(part) for constant in constants for part in ast.walk(constant)}
    return [ast.unparse(node) for node in ast.walk(tree) if id(node) not in allowed and holds_number_of_mnist(node)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_side_no_channels_and_no_number_of_classes_of_mnist(path):
    assert numbers_of_mnist(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("size = 28", 1),
        ("images = torch.zeros(batch, 1, side, side)", 1),
        ("images = torch.randn((batch, 3, side, side))", 1),
        ("nn.Linear(units, 10)", 1),
        ("labels = torch.randint(0, 10, (batch,))", 1),
        ("NUM_CLASSES = 10", 1),
        ("f(num_classes=10)", 1),
        ("num_classes == 10", 1),
        ("MNIST_SIDE = 28", 0),
        ("timeout = 10", 0),
        ("images = torch.zeros(batch, channels, side, side)", 0),
        ("one = torch.zeros(1, 1)", 0),
    ],
)
def test_the_rule_finds_such_numbers_and_no_others(code, count):
    assert len(numbers_of_mnist(ast.parse(code))) == count
