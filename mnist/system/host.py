"""The process that a run is called in: afterwards it is as it was, whether it is a notebook, a server or a test.

In: the state of a process. Out: the same state, restored.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mnist.system import signals

# What a run sets: attributes that must be put back one by one.
_SETTINGS: tuple[tuple[Any, str], ...] = (
    (torch.utils.deterministic, "fill_uninitialized_memory"),
    (torch.backends.cudnn, "deterministic"),
    (torch.backends.cudnn, "benchmark"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_tf32"),
    (logging, "raiseExceptions"),  # the last four are W&B's doing
    (threading, "excepthook"),
    (sys, "excepthook"),
    (sys, "exit"),
)


@contextmanager
def restored_afterwards() -> Iterator[None]:
    """Afterwards the caller has its threads, random state, settings, hooks, filters of warnings, environment, CUDA
    stream and signal handlers back.

    In the block new tensors are float32, whatever the caller's default is, and `signals.interrupts_noted` holds.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with contextlib.ExitStack() as stack:
        stack.callback(_restore_environment, dict(os.environ))
        stack.callback(_restore_stream, torch.cuda.current_stream() if torch.cuda.is_initialized() else None)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        is_warning = torch.is_deterministic_algorithms_warn_only_enabled()
        stack.callback(_restore_determinism, torch.are_deterministic_algorithms_enabled(), is_warning)
        for owner, name in _SETTINGS:
            stack.callback(setattr, owner, name, getattr(owner, name))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002 - the caller's code may draw from it
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(signals.interrupts_noted())
        torch.set_default_dtype(torch.float32)
        yield


def _restore_determinism(is_enabled: bool, is_warning: bool) -> None:
    if is_enabled != torch.are_deterministic_algorithms_enabled():  # the call imports torch.compile, a second
        torch.use_deterministic_algorithms(is_enabled, warn_only=is_warning)


def _restore_stream(before: torch.cuda.Stream | None) -> None:
    if torch.cuda.is_initialized():
        torch.cuda.set_stream(before or torch.cuda.default_stream())


def _restore_environment(before: Mapping[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
