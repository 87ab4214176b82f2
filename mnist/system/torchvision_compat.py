"""Imports torchvision, also beside a CPU-only torch, whose torchvision wheel from the package index cannot load.

PyPI's torchvision is built against CUDA. Beside a CPU build of torch its compiled operators are missing, and the bare
import dies with "operator torchvision::nms does not exist". Data sets, transforms and utilities need none of those
operators: declaring their schemas lets the import pass. A healthy installation is left alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import torch

# The operators for which torchvision (0.26 to 0.28) registers Python code while it is imported.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # must outlive the import: schemas vanish with it


def import_torchvision(submodule: str = "") -> ModuleType:
    """`torchvision`, or `torchvision.<submodule>`; costs about a second, so call it only where it is used.

    Raises:
        ImportError: torchvision is not installed, or broken in another way.
    """
    _declare_missing_operators()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        return importlib.import_module(f"torchvision.{submodule}" if submodule else "torchvision")


def _declare_missing_operators() -> None:
    global _library
    if _library is not None or _extension_loads():
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            _library.define(schema)


def _extension_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # not installed: the import will say so
    for extension in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
        except (ImportError, OSError):
            return False
        return True
    return False
