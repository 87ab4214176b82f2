"""The accelerator: built from the `runtime` section and the launcher's environment, checked, and closed in order.

In: the `runtime` section and the launcher's environment. Out: an `Accelerator`.
"""

from __future__ import annotations

import atexit
import os
import socket
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch.optim import Optimizer

from mnist.config import RuntimeConfig
from mnist.errors import MachineError
from mnist.system.launcher import fill_in_runtime
from mnist.system.process import num_usable_cores
from mnist.system.watchdog import ended_after

_IMPORTED_IN = os.getpid()
CLOSE_S = 60.0  # for taking down the process group; then the process ends with its stacks


@contextmanager
def open_accelerator(config: RuntimeConfig, trackers: Sequence[str] = ()) -> Iterator[Accelerator]:
    """`build_accelerator`, and the end of the process group in order.

    After an error on NCCL the group is not destroyed, because that can wait for the other ranks for ever: Python prints
    the error, and the process exits at once. A gloo group is always destroyed: a process that exits without that
    sometimes aborts, and fails the whole job.
    """
    accelerator, is_first = None, not PartialState._shared_state  # a notebook may have its own
    try:
        accelerator = build_accelerator(config, trackers)
        yield accelerator
    except BaseException as error:
        if _backend() == "nccl":
            atexit.register(os._exit, 1)  # where the interpreter prints the traceback; `process.leave` has the code
            raise
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)  # their variables hold the model
            cause = cause.__cause__ or cause.__context__
        _close(accelerator, is_first)
        raise
    _close(accelerator, is_first)


def _close(accelerator: Accelerator | None, is_first: bool) -> None:
    """Frees the models, then destroys the process group.

    In the other order a process can hang: a DDP model that is freed last frees the group too, and waits for gloo's
    threads while it holds Python's global lock, for which one of them may be waiting.
    """
    with ended_after(CLOSE_S):
        has_group = _backend() is not None
        if accelerator is not None and (has_group or accelerator.device.type != "cpu"):
            accelerator.free_memory()  # it collects garbage, for 0.3 s: one process on a CPU does without
        if not is_first:  # they are the caller's
            return
        if has_group:
            torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)  # a later run in this process may have other settings
        GradientState._reset_state()


def _backend() -> str | None:
    """Of the process group; None where there is none."""
    has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_backend() if has_group else None


def set_step_timeouts(timeout_s: int) -> float:
    """Sets the time-out of collectives for the steps, after the warm-up; returns the watchdog's time-out in seconds.

    The watchdog is the shorter one: it names the rank that hangs, and does not count time in which processes were
    stopped. Communication has been set up by now: on NCCL a sixth of --timeout-s is enough, and NCCL's own watchdog
    follows 30 s later, in case Python does not run. Gloo notices by itself when another process ends.
    """
    if (backend := _backend()) is None:
        return timeout_s
    is_nccl = backend == "nccl"
    watchdog_s = min(timeout_s, max(60.0, timeout_s / 6)) if is_nccl else timeout_s
    group_timeout = timedelta(seconds=watchdog_s + 30) if is_nccl else timedelta(days=30)
    torch.distributed.distributed_c10d._set_pg_timeout(group_timeout)
    return watchdog_s


def build_accelerator(config: RuntimeConfig, trackers: Sequence[str] = ()) -> Accelerator:
    """An `Accelerator` with the processes, device and precision that the launcher announced, or an error.

    Every rank must call this once, first. The global batch is sliced by our own loader, so gradients accumulate by
    `no_sync` and explicit weights, and Accelerate's own accumulation is switched off.

    Raises:
        MachineError: fp16 or synchronised batch norm on a CPU, more processes than GPUs, or ranks that would each
            believe they are alone.
    """
    config = fill_in_runtime(config)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cpu = config.cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    _check_machine(config, cpu, local_world_size)
    # A forked process, such as one of `notebook_launcher`'s, lacks the OpenMP threads that its parent had, and would
    # wait for them for ever.
    num_threads = 1 if os.getpid() != _IMPORTED_IN and torch.get_num_threads() > 1 else config.num_threads
    accelerator = _start_accelerate(config, cpu, trackers)
    # After Accelerate, which sets threads on CPUs, and TF32 with a dynamo backend.
    _set_determinism(config.deterministic)
    # Launchers set OMP_NUM_THREADS=1 by themselves; a rank is faster with its share of the usable cores.
    torch.set_num_threads(num_threads or max(1, num_usable_cores() // local_world_size))
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if announced != accelerator.num_processes:
        raise MachineError(
            f"the launcher announces {announced} processes, but Accelerate sees {accelerator.num_processes}: "
            f"each would train alone; use accelerate launch or torchrun, or unset RANK and WORLD_SIZE"
        )
    if accelerator.device.type == "cuda":  # work on the default stream cannot be recorded, nor DDP that was built there
        torch.cuda.set_stream(_own_stream(torch.cuda.current_device()))
    return accelerator


@cache
def _own_stream(device_index: int) -> torch.cuda.Stream:
    """One for all runs of a process: cuBLAS keeps memory for each."""
    return torch.cuda.Stream(device_index)


def _start_accelerate(config: RuntimeConfig, cpu: bool, trackers: Sequence[str]) -> Accelerator:
    # NCCL's watchdog sleeps four times as long before it ends a process after an error: a minute by default.
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "500")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or Accelerate sets threads, and warns
    _restart_with_fresh_keys("gloo" if cpu else "nccl", config.timeout_s)
    # Weights of one input channel get their gradients in other strides from cuDNN; DDP copies gradients anyway. (It
    # would also say so of weights for which it does cost time, of which this project has none.)
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    try:
        return Accelerator(
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
        name = "ACCELERATE_DYNAMO_BACKEND"
        place = f"{name}={os.environ.get(name)}: " if "DynamoBackend" in str(error) else ""
        raise MachineError(f"{place}Accelerate cannot start: {error}") from error


def _check_machine(config: RuntimeConfig, cpu: bool, local_world_size: int) -> None:
    if cpu and config.mixed_precision == "fp16":
        raise MachineError("--mixed-precision fp16: needs a GPU; on a CPU choose bf16 or no")
    if cpu and config.sync_bn:
        raise MachineError("--sync-bn: needs GPUs, torch has no synchronised batch norm for CPUs; leave it out")
    if not cpu and torch.cuda.is_available() and local_world_size > torch.cuda.device_count():
        raise MachineError(
            f"{local_world_size} processes but {torch.cuda.device_count()} GPUs on {socket.gethostname()}: start fewer "
            f"(--num_processes / --nproc-per-node), or train on the CPU with --cpu"
        )


def _restart_with_fresh_keys(backend: str, timeout_s: int) -> None:
    """Opens the process group itself when an elastic launcher has restarted the ranks of one machine.

    torch 2.13 finds the keys that the earlier ranks have left in the launcher's store, and can wait for ever. Here each
    attempt has keys with a prefix of its own. (On several machines the numbers of restarts may differ: there the
    launcher needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.)
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


def _set_determinism(deterministic: bool) -> None:
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports torch.compile, a second
        torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it costs a fill per `empty`, and nothing here reads such memory
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = False  # trying all kernels took 5 s, and saved 0.7 s in 4,700 large steps
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    torch.backends.cudnn.allow_tf32 = not deterministic


def executed_precision(accelerator: Accelerator) -> str:
    """The arithmetic of matrix products: fp32, tf32 (fp32 with rounded factors, from Ampere GPUs on), bf16 or fp16."""
    if accelerator.mixed_precision != "no":
        return str(accelerator.mixed_precision)
    device = accelerator.device
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "tf32" if has_tf32 and torch.backends.cuda.matmul.allow_tf32 else "fp32"


def prepare_optimizer(accelerator: Accelerator, optimizer: Optimizer) -> Optimizer:
    """The optimizer as the training step should have it: wrapped by Accelerate for the fp16 scaler only.

    The wrapper (accelerate 1.15) looks for an optional package on the disk twice per step, which costs 0.3 ms: 7 % of
    the time of LeNet-5 at batch 64 on a CPU. It must be on its device; every rank must call this.
    """
    wrapped: Optimizer = accelerator.prepare_optimizer(optimizer) if accelerator.scaler is not None else optimizer
    return wrapped


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, or a CPU, had no memory left for a tensor."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
