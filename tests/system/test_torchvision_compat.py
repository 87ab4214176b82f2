import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mnist.system.torchvision_compat import import_torchvision

ROOT = Path(__file__).parents[2]


def test_a_fresh_process_can_import_what_is_used():
    code = (
        "from mnist.system.torchvision_compat import import_torchvision\n"
        "print(import_torchvision('datasets').MNIST.__name__, import_torchvision('transforms').Resize.__name__)\n"
        "print(import_torchvision('utils').make_grid.__name__, import_torchvision().__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=True
    )
    assert (done.stdout.split(), done.stderr) == (["MNIST", "Resize", "make_grid", "torchvision"], "")


def test_a_healthy_installation_is_left_alone(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: name)
    monkeypatch.setattr(torch.library, "define", lambda *_: pytest.fail("declared"))
    assert import_torchvision("datasets") == "torchvision.datasets"


def test_another_error_is_passed_on(monkeypatch):
    def broken(name):
        raise RuntimeError(f"{name} is broken")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="torchvision is broken"):
        import_torchvision()


def test_importing_again_gives_the_same_module():
    assert import_torchvision("datasets") is import_torchvision("datasets")
    assert import_torchvision() is sys.modules["torchvision"]


def test_a_missing_torchvision_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="torchvision"):
        import_torchvision()
