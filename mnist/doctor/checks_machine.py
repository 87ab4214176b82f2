"""The doctor's checks of what a machine or a cluster is: code, data, devices, threads, clocks, disks.

In: a `Probe`. Out: `MACHINE_CHECKS`. Every rank must call a `measure_*`, which returns plain values; a `judge_*` is a
pure function of the facts of all ranks.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from mnist.config import RUNS, to_flat
from mnist.data import datasets
from mnist.data.sources import SOURCES, is_present
from mnist.doctor.checkup import Check, Fact, Judgement, Probe, by_host, judge_equal, short_hash
from mnist.runs.console import count
from mnist.runs.tracking.wandb import choose_mode
from mnist.system import process, ranks
from mnist.system.environment import device_name
from mnist.system.files import write_and_flush
from mnist.system.launcher import fill_in

ROOT = Path(__file__).parents[2]
FIELDS_OF_A_NODE = {"data_dir", "run_dir"}  # of the configuration; may differ between ranks
MIN_HOST_GIB = 1.0  # per rank
MAX_CLOCK_SKEW_S = 1.0
DISK_PROBE_BYTES = 16 << 20
MIN_DISK_SPEED, MIN_DISK_FREE_GIB = 10e6, 1.0  # bytes per second, GiB


def measure_versions(_: Probe) -> dict[str, Any]:
    """Versions that numerics and communication depend on."""
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: metadata.version(name) for name in ("torch", "accelerate", "numpy", "safetensors")},
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
    }


def measure_code(_: Probe) -> dict[str, str]:
    """A hash of each source file."""
    files = [ROOT / "train_ddp.py", *sorted((ROOT / "mnist").rglob("*.py"))]
    return {str(path.relative_to(ROOT)): short_hash(path.read_bytes()) for path in files}


def measure_configuration(probe: Probe) -> dict[str, Any]:
    """The configuration that this rank would run."""
    flat = {name: value for name, value in to_flat(fill_in(probe.config)).items() if name not in FIELDS_OF_A_NODE}
    return {**flat, "mixed_precision": probe.accelerator.mixed_precision}


def measure_data(probe: Probe) -> dict[str, str]:
    """Hashes of the data files as this rank finds them; nothing where they are missing."""
    config = probe.config.data
    name = "mnist" if config.dataset == "auto" else config.dataset
    if not is_present(name, config.data_dir):
        return {}
    dataset = datasets.read(name, config)
    files = SOURCES[name].files or ("digits",)
    found = dict(zip(files, dataset.fingerprint.split(","), strict=True))
    return {**found, "warnings": "; ".join(dataset.warnings)}


def judge_data(facts: Sequence[Fact]) -> Judgement:
    """Equal files everywhere; without any, training downloads them, or falls back to digits."""
    here = [fact.rank for fact in facts if fact.value]
    missing = [fact for fact in facts if not fact.value]
    if not here:
        return "warn", "no MNIST in --data-dir: training will download it, or else fall back to the embedded digits"
    if missing:
        return "fail", f"the files are missing on {missing[0].where}, but not on rank {here[0]}: copy them there"
    verdict, message = judge_equal("copy rank 0's data to every node, or set the same MNIST_DATA_DIR")(facts)
    warnings = facts[0].value["warnings"]
    if verdict == "fail":
        return verdict, message
    return ("warn", warnings) if warnings else ("pass", "all files are whole" + f", {message}" * (verdict == "pass"))


def measure_processes(probe: Probe) -> dict[str, Any]:
    """How many processes the launcher has started, and how many this one knows of."""
    announced = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "announced": int(announced),
        "seen": probe.accelerator.num_processes,
        "launcher": process.started_by(),
        "backend": dist.get_backend() if dist.is_initialized() else None,
    }


def judge_processes(facts: Sequence[Fact]) -> Judgement:
    """Each rank knows of all others."""
    first = facts[0].value
    if first["announced"] != first["seen"]:
        return "fail", (
            f"{first['announced']} processes were started, but each sees {first['seen']}: under srun set "
            "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS MASTER_ADDR MASTER_PORT"
        )
    hosts = len({fact.host for fact in facts})
    backend = f", {first['backend']}" if first["backend"] else ""
    return "pass", f"{count(len(facts), 'process')} on {count(hosts, 'host')} ({first['launcher']}{backend})"


def measure_device(probe: Probe) -> dict[str, Any]:
    """Which device this rank has, and how many there are."""
    device = probe.accelerator.device
    is_cuda = device.type == "cuda"
    module = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\d+\.\d+(\.\d+)?", module.read_text()) if module.exists() else None
    return {
        "device": device_name(probe.accelerator.device),
        "uuid": str(torch.cuda.get_device_properties(device).uuid) if is_cuda else None,
        "driver": driver.group() if driver else None,
        "num_visible": torch.cuda.device_count() if is_cuda else 0,
    }


def judge_devices(facts: Sequence[Fact]) -> Judgement:
    """A GPU for each rank, a rank for each GPU."""
    holders: dict[str, Fact] = {}
    for fact in facts:
        uuid = fact.value["uuid"]
        if uuid in holders:
            return "fail", (
                f"{holders[uuid].where} and {fact.where} share GPU {uuid}: give each process of a "
                "host its own LOCAL_RANK"
            )
        if uuid is not None:
            holders[uuid] = fact
    for host, members in by_host(facts).items():
        visible = max(fact.value["num_visible"] for fact in members)
        if visible > len(members):
            return (
                "warn",
                f"{visible} GPUs are visible on {host}, {len(members)} in use: start {visible} processes there",
            )
    kinds = sorted({fact.value["device"] for fact in facts})
    return ("pass" if len(kinds) == 1 else "warn"), ", ".join(kinds)


def measure_threads(probe: Probe) -> dict[str, Any]:
    """CPU threads of this rank, the cores it may run on, and its share of them where a container has a quota."""
    return {
        "threads": torch.get_num_threads(),
        "as_asked": probe.config.runtime.num_threads > 0,
        "cores": process.usable_cores(),
        "quota": process.cpu_quota(),
    }


def judge_threads(facts: Sequence[Fact]) -> Judgement:
    """As many threads as cores on each host, or a little fewer."""
    lines = []
    for host, members in by_host(facts).items():
        cores = len(set().union(*(fact.value["cores"] for fact in members)))
        usable = min(cores, *(math.ceil(fact.value["quota"] or cores) for fact in members))
        threads = sum(fact.value["threads"] for fact in members)
        line = f"{count(threads, 'thread')} of {count(len(members), 'rank')} for {count(usable, 'core')} on {host}"
        if threads > usable:
            remedy = "set LOCAL_WORLD_SIZE, or --num-threads" if threads > len(members) else "start fewer processes"
            return "fail", f"{line}: each waits for the others; {remedy}"
        has_idle_cores = 2 * threads <= usable and any(fact.value["threads"] == 1 for fact in members)
        if has_idle_cores and not any(fact.value["as_asked"] for fact in members):
            return "fail", f"{line}: the rest is idle; set LOCAL_WORLD_SIZE to the processes of this host"
        lines.append(line)
    return "pass", "; ".join(lines[:3]) + (" ..." if len(lines) > 3 else "")


def measure_memory(probe: Probe) -> dict[str, Any]:
    """GiB available to this rank's host, and of its GPU."""
    free, total = torch.cuda.mem_get_info() if probe.accelerator.device.type == "cuda" else (None, None)
    return {
        "host_gib": _gib(psutil.virtual_memory().available),
        "device_gib": _gib(total),
        "device_free_gib": _gib(free),
    }


def judge_memory(facts: Sequence[Fact]) -> Judgement:
    """A gigabyte of the host per rank, and most of the GPU."""
    for fact in facts:
        free, total = fact.value["device_free_gib"], fact.value["device_gib"]
        if total is not None and free < total / 2:
            return "warn", f"{free} of {total} GiB of GPU memory are free on {fact.where}: who uses the rest?"
    for host, members in by_host(facts).items():
        available = members[0].value["host_gib"]
        if available < MIN_HOST_GIB * len(members):
            return "warn", f"{available} GiB are available to {count(len(members), 'rank')} on {host}: start fewer"
    return "pass", f"at least {min(fact.value['host_gib'] for fact in facts)} GiB available"


def measure_clock(probe: Probe) -> dict[str, Any]:
    """Seconds since 1970, on all ranks at about the same moment."""
    probe.accelerator.wait_for_everyone()
    now = time.time()
    return {"time_s": now, "utc": datetime.fromtimestamp(now, UTC).strftime("%H:%M:%S.%f")[:-3]}


def judge_clock(facts: Sequence[Fact]) -> Judgement:
    """Times in logs can be compared."""
    if len(facts) == 1:
        return "skip", "one process: nothing to compare"
    skews = [fact.value["time_s"] - facts[0].value["time_s"] for fact in facts]
    worst = max(skews, key=abs)
    if abs(worst) > MAX_CLOCK_SKEW_S:
        return "warn", f"{facts[skews.index(worst)].where} is {worst:+.1f} s away from rank 0: set the clocks by NTP"
    return "pass", f"{1e3 * abs(worst):.0f} ms apart at most"


def measure_run_dir(probe: Probe) -> dict[str, Any]:
    """Rank 0 writes a file as large as a checkpoint: how fast, how much room is left, and whether this rank sees it."""
    wanted = Path(probe.config.output.run_dir or RUNS)
    folder = next(path for path in (wanted, *wanted.parents, Path.cwd()) if path.exists())
    with ExitStack() as stack:

        def write() -> tuple[str, dict[str, Any]]:
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder))
            content = os.urandom(1 << 20) * (DISK_PROBE_BYTES >> 20)
            started = time.perf_counter()
            write_and_flush(Path(temporary, "checkpoint"), content)
            speed = DISK_PROBE_BYTES / (time.perf_counter() - started)
            return temporary, {"bytes_per_s": speed, "free_gib": _gib(shutil.disk_usage(folder).free)}

        temporary, disk = ranks.together(probe.accelerator, write)
        is_seen = Path(temporary).exists()
        probe.accelerator.wait_for_everyone()
    return {"folder": str(folder), "is_seen": is_seen, **disk}


def judge_run_dir(facts: Sequence[Fact]) -> Judgement:
    """Checkpoints have room and do not take long. Rank 0 writes them; the others need not see them."""
    disk = facts[0].value
    folder, speed, free = Path(disk["folder"]).resolve(), disk["bytes_per_s"], disk["free_gib"]
    line = f"{folder} of {facts[0].where}: {speed / 1e6:,.0f} MB/s, {free:,} GiB free"
    warnings = []
    if free < MIN_DISK_FREE_GIB:
        warnings.append("too little room for many checkpoints; make room, or choose another --run-dir")
    if speed < MIN_DISK_SPEED:
        warnings.append("checkpoints will be slow; choose a local disk with --run-dir")
    blind = [fact.where for fact in facts if not fact.value["is_seen"]]
    if blind:
        warnings.append(f"{blind[0]} does not see it, rank 0 alone writes there; to resume, start rank 0 on this host")
    return ("warn", f"{line}: {'; '.join(warnings)}") if warnings else ("pass", line)


def measure_wandb(probe: Probe) -> dict[str, Any] | None:
    """On rank 0, which alone tracks: what W&B would do, and whether its server answers."""
    if not probe.accelerator.is_main_process:
        return None
    mode, reason = choose_mode(probe.config.output)
    return {"mode": mode, "reason": reason}


def judge_wandb(facts: Sequence[Fact]) -> Judgement:
    """Tracking does what its user expects."""
    mode, reason = facts[0].value["mode"], facts[0].value["reason"]
    return ("pass", mode) if reason is None else ("warn", f"runs will be tracked {mode} on {facts[0].where}: {reason}")


def _gib(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else round(num_bytes / (1 << 30), 1)


MACHINE_CHECKS = (
    Check("processes", measure_processes, judge_processes),
    Check("devices", measure_device, judge_devices),
    Check("versions", measure_versions, judge_equal("install the same requirements.txt everywhere")),
    Check("code", measure_code, judge_equal("bring every node to the same commit")),
    Check("configuration", measure_configuration, judge_equal("give every rank the same command and environment")),
    Check("data", measure_data, judge_data),
    Check("threads", measure_threads, judge_threads),
    Check("memory", measure_memory, judge_memory),
    Check("clock", measure_clock, judge_clock),
    Check("run directory", measure_run_dir, judge_run_dir),
    Check("W&B", measure_wandb, judge_wandb),
)
