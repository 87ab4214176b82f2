"""The machine: accelerator, threads, precision, warm-up, and work that ranks do for one another.

In: the `runtime` section and the launcher's environment. Out: a checked `Accelerator`; facts about the environment.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist.config import MachineError, RunError, RuntimeConfig, UserError
from mnist.console import count
from mnist.process import num_usable_cores
from mnist.seeding import derive_seed

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

T = TypeVar("T")


@contextmanager
def open_accelerator(config: RuntimeConfig, trackers: Sequence[str] = ()) -> Iterator[Accelerator]:
    """`build_accelerator`, and a tidy end of the process group, after errors too.

    A gloo process that exits inside its group sometimes aborts, and fails the whole job. And whoever holds a DDP model
    longer than the group can hang: freeing the model then frees the group as well, and waits for gloo's threads with
    Python's global lock held, for which one of them may be waiting. So the models go first.
    """
    accelerator = None
    try:
        accelerator = build_accelerator(config, trackers)
        yield accelerator
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # their variables hold the model
        raise
    finally:
        if accelerator is not None:
            accelerator.free_memory()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def build_accelerator(config: RuntimeConfig, trackers: Sequence[str] = ()) -> Accelerator:
    """Accelerate, set up so that what the launcher promised is what happens, or an error says why not.

    Every rank must call this once, first. The global batch is sliced by our own loader, so gradients accumulate by
    `no_sync` and explicit weights, and Accelerate's own accumulation is switched off.

    Raises:
        MachineError: fp16 on a CPU, more processes than GPUs, or ranks that would each believe they are alone.
    """
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cpu = config.cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not _has_accelerator()
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if cpu and precision == "fp16":
        raise MachineError("--mixed-precision fp16: needs a GPU; on a CPU choose bf16 or no")
    if not cpu and torch.cuda.is_available() and local_world_size > torch.cuda.device_count():
        raise MachineError(
            f"{local_world_size} processes but {torch.cuda.device_count()} GPUs on {socket.gethostname()}: start fewer "
            f"(--num_processes / --nproc-per-node), or train on the CPU with --cpu"
        )
    _restart_with_fresh_keys("gloo" if cpu else "nccl", config.timeout_s)
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=config.mixed_precision,
            log_with=list(trackers) or None,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout_s)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except ValueError as error:  # an unknown backend, an incomplete environment
        raise MachineError(f"Accelerate cannot start: {error}") from error
    # After Accelerate, which sets threads on CPUs, and TF32 with a dynamo backend.
    _set_determinism(config.deterministic)
    _set_threads(config.num_threads, local_world_size)
    promised = int(os.environ.get("WORLD_SIZE", "1"))
    if promised != accelerator.num_processes:
        raise MachineError(
            f"the launcher announces {promised} processes, but Accelerate sees {accelerator.num_processes}: "
            f"each would train alone; set LOCAL_RANK and MASTER_ADDR, or use accelerate launch or torchrun"
        )
    return accelerator


def _restart_with_fresh_keys(backend: str, timeout_s: int) -> None:
    """Opens the process group itself when an elastic launcher has restarted the ranks of one machine.

    torch 2.13 meets the keys that the ranks before left in the launcher's store, and can wait for them for ever; a
    prefix keeps attempts apart. (Machines need not agree on a restart count: on several of them the launcher needs
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.)
    """
    attempt, world_size = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("WORLD_SIZE", "1")
    if attempt == "0" or world_size == "1" or world_size != os.environ.get("LOCAL_WORLD_SIZE"):
        return
    timeout = timedelta(seconds=timeout_s)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_host = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = torch.distributed.TCPStore(address, port, is_master=is_host, timeout=timeout, multi_tenant=True)
    torch.distributed.init_process_group(
        backend,
        store=torch.distributed.PrefixStore(f"attempt-{attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(world_size),
        timeout=timeout,
    )


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _set_threads(num_threads: int, local_world_size: int) -> None:
    """Launchers set OMP_NUM_THREADS=1 unasked; a rank is better off with its share of the cores it may use."""
    torch.set_num_threads(num_threads or max(1, num_usable_cores() // local_world_size))


def _set_determinism(deterministic: bool) -> None:
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    torch.backends.cudnn.allow_tf32 = not deterministic


def accumulation_steps(requested: int) -> int:
    """--gradient-accumulation-steps, else the launcher's setting, else 1."""
    from_launcher = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if not requested and not (from_launcher.isdecimal() and int(from_launcher) > 0):
        raise UserError(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={from_launcher}: must be a number of 1 or more")
    return requested or int(from_launcher)


def seed_initial_weights(seed: int) -> None:
    """Fixes the weights that are drawn next, alike on every rank."""
    torch.manual_seed(derive_seed(seed, "weights"))


def prepare_optimizer(accelerator: Accelerator, optimizer: Optimizer) -> Optimizer:
    """The optimizer as the training step should have it: wrapped by Accelerate for the fp16 scaler only.

    The wrapper (accelerate 1.15) looks for an optional package on the disk twice per step, which costs 0.3 ms: 7 % of
    the time of LeNet-5 at batch 64 on a CPU. It must be on its device; every rank must call this.
    """
    wrapped: Optimizer = accelerator.prepare_optimizer(optimizer) if accelerator.scaler is not None else optimizer
    return wrapped


def warm_up(model: nn.Module, inputs: Tensor) -> None:
    """Two forward and backward passes on zeros that leave no trace. Every rank must call this before its first step.

    With three ranks or more DDP sorts its gradient buckets anew after the first backward pass, which changes the order
    of sums: without this a resumed run would differ from the uninterrupted one in the last bits. It also takes the
    one-off cost of choosing kernels out of the first step.

    Args:
        model: prepared.
        inputs: zeros in the shape of a micro-batch (B, 1, S, S).
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.train()
    for _ in range(2):
        (model(inputs).sum() * 0.0).backward()
    model.zero_grad()
    for buffer, saved in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(saved)


def together(accelerator: Accelerator, work: Callable[[], T], on: Literal["main", "local_main", "all"] = "main") -> T:
    """Does `work` on some ranks; every rank must call this, and all of them succeed, or raise the same error.

    Args:
        accelerator: knows the ranks.
        work: must not communicate with other ranks.
        on: "main" = rank 0, whose result every rank gets; "local_main" = one rank per node, likewise rank 0's result is
            everyone's; "all" = every rank, each keeps its own result.

    Raises:
        UserError, RunError: the error of the first rank that failed; an OSError becomes a RunError.
    """
    chosen = {"main": accelerator.is_main_process, "local_main": accelerator.is_local_main_process, "all": True}[on]
    result: T | None = None
    error: UserError | RunError | None = None
    try:
        result = work() if chosen else None
    except (UserError, RunError) as caught:
        error = caught
    except OSError as caught:  # a full disk, a folder that is gone
        error = RunError(f"{caught.filename or 'a file'}: {caught.strerror or caught}")
    if error is not None and accelerator.num_processes == 1:
        raise error
    if accelerator.num_processes > 1:
        for failure in gather_object([(isinstance(error, UserError), str(error)) if error else None]):
            if failure is not None:
                is_usage, message = failure
                raise (UserError if is_usage else RunError)(message) from error
        if on != "all":
            shared: list[Any] = [result]
            result = broadcast_object_list(shared)[0]
    return result  # type: ignore[return-value]  # None only where `work` returned it


def is_lost_contact(error: BaseException) -> bool:
    """Whether `error` is what a rank sees when another one has died or does not answer."""
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out waiting",
        "NCCL",
        "gloo",
    )
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, or a CPU, had no memory left for a tensor."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def require_agreement(accelerator: Accelerator, **facts: object) -> None:
    """Compares facts across ranks; every rank must call this.

    Raises:
        UserError: on all ranks, if any rank's fact differs from rank 0's. Names both.
    """
    if accelerator.num_processes == 1:
        return
    first, *others = gather_object([facts])
    for rank, other in enumerate(others, start=1):
        for name in facts:
            if other[name] != first[name]:
                raise UserError(f"ranks 0 and {rank} differ in {name.replace('_', ' ')}: {first[name]}, {other[name]}")


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
        "launcher": launcher(),
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


def launcher() -> str:
    """How this process was started."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return "accelerate launch"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "srun" if "SLURM_PROCID" in os.environ else "python"


def hardware_warnings(accelerator: Accelerator) -> list[str]:
    """What this node has and does not use, or has not and is asked for, a line each."""
    num_processes, num_threads = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.get_num_threads()
    if accelerator.device.type == "cuda":
        visible = torch.cuda.device_count()
        hint = f"{visible} GPUs visible, {num_processes} in use: add --num_processes {visible} to accelerate launch"
        return [hint] if visible > num_processes else []
    share = max(1, num_usable_cores() // num_processes)
    hint = f"--num-threads {num_threads}: a process has {count(share, 'core')} here, and more threads are slower"
    return [hint] if num_threads > share else []


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
