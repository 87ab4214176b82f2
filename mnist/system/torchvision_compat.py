"""Imports torchvision, also beside a CPU-only torch, whose torchvision wheel from the package index cannot load.

PyPI's torchvision is built against CUDA. Beside a CPU build of torch its compiled operators are missing, and the bare
import dies with "operator torchvision::nms does not exist". Data sets, transforms and utilities need none of those
operators: declaring them lets the import pass. A healthy installation is left alone.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch

# The operators for which torchvision (0.26 to 0.28) registers Python code while it is imported.
_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision(submodule: str = "") -> ModuleType:
    """`torchvision`, or `torchvision.<submodule>`; costs about a second, so call it only where it is used.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: it is broken in another way.
    """
    name = f"torchvision.{submodule}" if submodule else "torchvision"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
        for operator in _OPERATORS:
            torch.library.define(f"torchvision::{operator}", _SCHEMA)
        return importlib.import_module(name)
