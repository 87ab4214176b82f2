"""The doctor's checks of what lies between the ranks: sums over ranks, and how fast they are.

In: a `Probe`. Out: `NETWORK_CHECKS`. Every rank must call a `measure_*`, which returns plain values; a `judge_*` is a
pure function of the facts of all ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mnist.doctor.checkup import Check, Fact, Judgement, Probe, Verdict
from mnist.doctor.interconnect import MIN_BYTES_PER_S, find_links, reason_for_slower_link, slowest_link
from mnist.training.step import wait_for_device

ALL_REDUCE_BYTES = tuple(1024 * 4**i for i in range(10))  # 1 KB .. 256 MB
CPU_SIZES = 8  # on a CPU only the first ones, up to 16 MB
MAX_LATENCY_S = 0.1  # of the smallest all-reduce
ADVICE = "(NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), and is it free?"


def measure_all_reduce(probe: Probe) -> dict[str, int]:
    """Wrong elements in sums over ranks of integers that each type holds exactly."""
    rank, world_size = probe.accelerator.process_index, probe.accelerator.num_processes
    types = [torch.float32, torch.int64] + ([] if probe.accelerator.device.type == "mps" else [torch.float64])
    wrong = {}
    for dtype in types:
        counts = torch.arange(100_000, device=probe.accelerator.device).to(dtype)
        total = _all_reduce(counts + rank)
        expected = counts * world_size + world_size * (world_size - 1) // 2
        wrong[str(dtype).removeprefix("torch.")] = int((total != expected).sum())
    return wrong


def judge_all_reduce(facts: Sequence[Fact]) -> Judgement:
    """Sums over ranks are exact, and everyone has them."""
    if len(facts) == 1:
        return "skip", "one process: nothing to add up"
    for fact in facts:
        for name, num_wrong in fact.value.items():
            if num_wrong:
                return "fail", (
                    f"{num_wrong:,} wrong sums in {name} on {fact.where}: a broken link, driver or NCCL; try "
                    "NCCL_P2P_DISABLE=1, NCCL_SHM_DISABLE=1 or NCCL_IB_DISABLE=1 one by one"
                )
    return "pass", f"exact in {', '.join(facts[0].value)}"


def measure_bandwidth(probe: Probe) -> dict[str, Any]:
    """Median seconds of an all-reduce by size, and the links that it takes."""
    device = probe.accelerator.device
    sizes = ALL_REDUCE_BYTES[:CPU_SIZES] if device.type == "cpu" else ALL_REDUCE_BYTES
    medians = []
    for num_bytes in sizes:
        values = torch.zeros(num_bytes // 4, device=device)
        seconds = []
        for _ in range(1 + (20 if num_bytes < 1 << 18 else 5)):
            wait_for_device(device)
            started = time.perf_counter()
            _all_reduce(values)
            wait_for_device(device)
            seconds.append(time.perf_counter() - started)
        medians.append(statistics.median(seconds[1:]))
    return {"seconds": medians, "links": find_links(probe.nccl_log)}


def judge_bandwidth(facts: Sequence[Fact]) -> Judgement:
    """Ranks use the fastest links that they have, and these are as fast as links of their kind are."""
    if len(facts) == 1:
        return "skip", "one process: nothing to send"
    for fact in facts:
        reason = reason_for_slower_link(fact.value["links"])
        if reason is not None:
            return "fail", f"{fact.where} {reason}"
    sizes = all_reduce_table(facts[0].value["seconds"], len(facts))
    latency, bandwidth = sizes[0][1], sizes[-1][2]
    link = slowest_link([fact.value["links"] for fact in facts])
    interface = f" ({facts[0].value['links'].interface})" if link in ("Ethernet", "loopback") else ""
    line = f"{1e3 * latency:.2f} ms for {_bytes(sizes[0][0])}, {bandwidth / 1e6:,.0f} MB/s for {_bytes(sizes[-1][0])}"
    line += f" over {link or 'unknown links'}{interface}"
    minimum = MIN_BYTES_PER_S[link or "loopback"]
    if bandwidth < minimum:
        verdict: Verdict = "warn" if link in (None, "Ethernet", "loopback") else "fail"
        return verdict, f"{line}: slow, {minimum / 1e6:,.0f} MB/s are the least; is the right network used " + ADVICE
    if latency > MAX_LATENCY_S:
        return "warn", f"{line}: slow answers; is the right network used " + ADVICE
    return "pass", line


def all_reduce_table(medians: Sequence[float], world_size: int) -> list[tuple[int, float, float]]:
    """(bytes, seconds, bytes per second that each rank sends: 2 (P - 1) / P of the size) for each size."""
    share = 2 * (world_size - 1) / world_size
    return [(size, t, share * size / t) for size, t in zip(ALL_REDUCE_BYTES, medians, strict=False)]


def _all_reduce(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def _bytes(number: int) -> str:
    return f"{number >> 20} MB" if number >= 1 << 20 else f"{number >> 10} KB"


NETWORK_CHECKS = (
    Check("all-reduce", measure_all_reduce, judge_all_reduce),
    Check("bandwidth", measure_bandwidth, judge_bandwidth),
)
