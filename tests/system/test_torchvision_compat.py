import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mnist.system import torchvision_compat
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


def test_the_operators_are_declared_only_where_the_extension_cannot_load():
    import_torchvision()
    assert (torchvision_compat._library is None) == torchvision_compat._extension_loads()
    assert hasattr(torch.ops.torchvision, "nms")


def test_a_healthy_installation_is_left_alone(monkeypatch):
    monkeypatch.setattr(torchvision_compat, "_library", None)
    monkeypatch.setattr(torchvision_compat, "_extension_loads", lambda: True)
    import_torchvision("datasets")
    assert torchvision_compat._library is None


def test_operators_are_declared_once(monkeypatch):
    import_torchvision()
    library = torchvision_compat._library
    import_torchvision("transforms")
    assert torchvision_compat._library is library


def test_importing_again_gives_the_same_module():
    assert import_torchvision("datasets") is import_torchvision("datasets")
    assert import_torchvision() is sys.modules["torchvision"]


def test_a_missing_torchvision_is_an_import_error(monkeypatch):
    monkeypatch.setattr(torchvision_compat, "_library", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="torchvision"):
        import_torchvision()
    assert torchvision_compat._library is None
