"""What a run ran on: versions, hosts, devices, launcher, memory.

In: the process. Out: plain facts for environment.json and for people.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mnist.system.process import started_by

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]


def describe_environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, hosts, devices, threads, commit, launcher, command line: what one needs to run it again.

    Every rank must call this. No environment variables: they may hold secrets.
    """
    own = {
        "rank": accelerator.process_index,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": device_name(accelerator.device),
    }
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in ("torch", "accelerate", "safetensors", "numpy")},
        "cuda": torch.version.cuda,
        "ranks": gather_object([own]),
        "threads_per_process": torch.get_num_threads(),
        "launcher": started_by(),
        "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        "git_commit": _git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_mb(device: torch.device) -> float:
    """The most memory that this process has held so far: on its GPU, or, without one, of the machine; in 10^6 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def code_sha256() -> str:
    """16 digits of the sha256 of the code that trains: the entry and what it imports, the commands' folders apart."""
    root = Path(__file__).parents[2]
    parts = [root / "train_ddp.py", *(root / "mnist").glob("*.py")]
    for folder in ("data", "training", "runs", "system"):
        parts += (root / "mnist" / folder).rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(parts):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _git_commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
