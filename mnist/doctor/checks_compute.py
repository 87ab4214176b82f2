"""The doctor's checks of what a machine or a cluster does: computing, alone and together.

In: a `Probe`. Out: `COMPUTE_CHECKS`. Every rank must call a `measure_*`, which returns plain values; a `judge_*` is a
pure function of the facts of all ranks.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mnist.data.batches import MicroBatch, Split
from mnist.data.transforms import BatchTransform
from mnist.doctor.checkup import Check, Fact, Judgement, Probe, Verdict, judge_equal, short_hash
from mnist.doctor.links import MIN_BYTES_PER_S, find_links, reason_for_slower_link, slowest_link
from mnist.models import build_model, seed_initial_weights
from mnist.runs.live_state import module_tensors
from mnist.training.build import build_train_step
from mnist.training.losses import build_loss
from mnist.training.step import wait_for_device
from mnist.training.threads import advise_on_threads

DETERMINISM_STEPS, DETERMINISM_BATCH = 20, 32
SPEED_TIME_S = 0.5
SLOW_RANK = 1.5  # times the median of the others
ALL_REDUCE_BYTES = tuple(1024 * 4**i for i in range(10))  # 1 KB .. 256 MB
CPU_SIZES = 8  # on a CPU only the first ones, up to 16 MB
MAX_LATENCY_S = 0.1  # of the smallest all-reduce
ADVICE = "(NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), and is it free?"


def measure_initial_weights(probe: Probe) -> dict[str, str]:
    """A hash of the weights that training would start from."""
    return {"initial weights": _hash_weights(_build_model(probe))}


def measure_precision(probe: Probe) -> dict[str, Any]:
    """The precision that is asked for, and those in which a forward and backward pass comes out finite."""
    device = probe.accelerator.device
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    candidates = {"bf16": torch.bfloat16} if has_bf16 else {}
    if device.type == "cuda":
        candidates["fp16"] = torch.float16
    works = ["no"]
    for name, dtype in candidates.items():
        model = _build_model(probe).to(device)
        images, labels = _sample(probe, DETERMINISM_BATCH)
        with torch.autocast(device.type, dtype=dtype):
            logits = model(BatchTransform(probe.config.image)(images))
        build_loss(probe.config.optim.loss)(logits.float(), labels).mean().backward()
        if all(bool(weight.grad.isfinite().all()) for weight in model.parameters() if weight.grad is not None):
            works.append(name)
    return {"asked": probe.accelerator.mixed_precision, "works": works}


def judge_precision(facts: Sequence[Fact]) -> Judgement:
    """What is asked for works everywhere."""
    for fact in facts:
        asked, works = fact.value["asked"], fact.value["works"]
        if asked not in works:
            return "fail", f"--mixed-precision {asked} does not work on {fact.where}; choose from {', '.join(works)}"
    first, *others = (fact.value["works"] for fact in facts)
    names = ", ".join({"no": "fp32"}.get(name, name) for name in first)
    return ("pass", names) if all(works == first for works in others) else ("warn", f"{names}; not on every rank")


def measure_determinism(probe: Probe) -> dict[str, str]:
    """Hashes of the weights after the same steps, taken twice."""
    hashes = []
    for _ in range(2):
        step, model = _build_step(probe, DETERMINISM_BATCH)
        for _ in range(DETERMINISM_STEPS):
            step()
        hashes.append(_hash_weights(model))
    return dict(zip(("first", "second"), hashes, strict=True))


def judge_determinism(facts: Sequence[Fact]) -> Judgement:
    """The same steps end in the same weights: on each rank, and on equal machines on all ranks."""
    for fact in facts:
        if fact.value["first"] != fact.value["second"]:
            return "fail", (
                f"{DETERMINISM_STEPS} steps, taken twice, end in different weights on {fact.where}: faulty memory or "
                "overclocking, or a library that is not deterministic"
            )
    others = [fact for fact in facts if fact.value != facts[0].value]
    if others:
        return "warn", (
            f"{others[0].where} computes other last bits than rank 0 (another CPU, GPU or thread count?): a resumed "
            "run is bit-exact only if ranks stay where they are"
        )
    return "pass", f"{DETERMINISM_STEPS} steps, taken twice: the same weights, bit for bit"


def measure_speed(probe: Probe) -> float:
    """Seconds of a training step of this rank's share of a batch, without communication, all ranks at the same time."""
    return _step_time_s(probe, SPEED_TIME_S)


def judge_speed(facts: Sequence[Fact]) -> Judgement:
    """No rank is much slower than the others, which wait for it."""
    for fact in facts:
        others = [other.value for other in facts if other.rank != fact.rank]
        usual = statistics.median(others or [fact.value])
        if fact.value > SLOW_RANK * usual:
            return "warn", (
                f"{fact.where} needs {1e3 * fact.value:.1f} ms a step, the others {1e3 * usual:.1f} ms, and all wait "
                "for it: what else runs there? is it throttled?"
            )
    return "pass", f"{1e3 * max(fact.value for fact in facts):.1f} ms a step on the slowest rank"


def measure_one_thread(probe: Probe) -> str | None:
    """The advice that training would give: a line where one thread is faster than this rank's threads."""
    side, batch = probe.config.image.image_size, probe.config.loop.global_batch_size
    zeros = torch.zeros(math.ceil(batch / probe.accelerator.num_processes), 1, side, side)
    device = probe.accelerator.device
    return advise_on_threads(_build_model(probe).to(device), zeros.to(device))


def judge_one_thread(facts: Sequence[Fact]) -> Judgement:
    """One thread is not faster than several, as it is where other work has the cores or the network is small."""
    for fact in facts:
        if fact.value is not None:
            return "warn", f"{fact.where}: {fact.value}"
    return "pass", "one thread is not faster"


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


def _build_model(probe: Probe) -> nn.Module:
    seed_initial_weights(probe.config.loop.seed)
    return build_model(probe.config.optim.model)


def _sample(probe: Probe, batch: int) -> tuple[Tensor, Tensor]:
    """Noise and labels (B,), equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    return images.to(probe.accelerator.device), labels.to(probe.accelerator.device)


def _step_time_s(probe: Probe, duration_s: float) -> float:
    batch = math.ceil(probe.config.loop.global_batch_size / probe.accelerator.num_processes)
    step, _ = _build_step(probe, batch)
    for _ in range(3):
        step()
    wait_for_device(probe.accelerator.device)
    started, num_steps = time.perf_counter(), 0
    while num_steps < 3 or time.perf_counter() - started < duration_s:
        step()
        wait_for_device(probe.accelerator.device)
        num_steps += 1
    return (time.perf_counter() - started) / num_steps


def _build_step(probe: Probe, batch: int) -> tuple[Callable[[], None], nn.Module]:
    """A training step of the recipe on noise, in the precision asked for, without communication; and the network."""
    train_step = build_train_step(probe.config, probe.accelerator, num_steps=1, epoch_steps=1, communicates=False)
    images, labels = _sample(probe, batch)
    rows = torch.arange(batch, device=images.device)
    micro_batch = MicroBatch(Split(images, labels), rows, slice(0, batch), global_batch_size=batch, num_samples=batch)
    return partial(train_step, [micro_batch], 0), train_step.bare_model


def _all_reduce(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def _hash_weights(model: nn.Module) -> str:
    return short_hash(b"".join(tensor.numpy().tobytes() for tensor in module_tensors(model).values()))


def _bytes(number: int) -> str:
    return f"{number >> 20} MB" if number >= 1 << 20 else f"{number >> 10} KB"


COMPUTE_CHECKS = (
    Check("initial weights", measure_initial_weights, judge_equal("the models differ: same code, versions, recipe?")),
    Check("precision", measure_precision, judge_precision),
    Check("determinism", measure_determinism, judge_determinism),
    Check("speed", measure_speed, judge_speed),
    Check("one thread", measure_one_thread, judge_one_thread),
    Check("all-reduce", measure_all_reduce, judge_all_reduce),
    Check("bandwidth", measure_bandwidth, judge_bandwidth),
)
