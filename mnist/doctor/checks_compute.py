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
from torch import Tensor, nn

from mnist.config import evolve
from mnist.data.batches import MicroBatch, Split
from mnist.data.sources import DatasetInfo, info_of
from mnist.data.transforms import BatchTransform
from mnist.doctor.checkup import Check, Fact, Judgement, Probe, judge_equal, short_hash
from mnist.models import seed_initial_weights
from mnist.runs.state_tensors import module_tensors
from mnist.training.build import build_network, build_train_step
from mnist.training.losses import build_loss
from mnist.training.step import wait_for_device
from mnist.training.threads import advise_on_threads

DETERMINISM_STEPS, DETERMINISM_BATCH = 20, 32
SPEED_TIME_S = 0.5
SLOW_RANK = 1.5  # times the median of the others


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
    """Seconds of an eager step on this rank's share of a batch, without communication, on all ranks at once."""
    device = probe.accelerator.device
    step, _ = _build_step(probe, _share_of_batch(probe))
    for _ in range(3):
        step()
    wait_for_device(device)
    started, num_steps = time.perf_counter(), 0
    while num_steps < 3 or time.perf_counter() - started < SPEED_TIME_S:
        step()
        wait_for_device(device)
        num_steps += 1
    return (time.perf_counter() - started) / num_steps


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
    side, device = probe.config.image.image_size, probe.accelerator.device
    zeros = torch.zeros(_share_of_batch(probe), _info(probe).in_channels, side, side, device=device)
    return advise_on_threads(_build_model(probe).to(device), zeros)


def judge_one_thread(facts: Sequence[Fact]) -> Judgement:
    """One thread is not faster than several, as it is where other work has the cores or the network is small."""
    for fact in facts:
        if fact.value is not None:
            return "warn", f"{fact.where}: {fact.value}"
    return "pass", "one thread is not faster"


def _build_model(probe: Probe) -> nn.Module:
    seed_initial_weights(probe.config.loop.seed)
    return build_network(probe.config, _info(probe))


def _info(probe: Probe) -> DatasetInfo:
    return info_of(probe.config.data.dataset)


def _sample(probe: Probe, batch: int) -> tuple[Tensor, Tensor]:
    """Noise (B, C, H, W) and labels (B,), equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, *_info(probe).image_shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, _info(probe).num_classes, (batch,), generator=generator)
    return images.to(probe.accelerator.device), labels.to(probe.accelerator.device)


def _share_of_batch(probe: Probe) -> int:
    num_processes: int = probe.accelerator.num_processes
    return math.ceil(probe.config.loop.global_batch_size / num_processes)


def _build_step(probe: Probe, batch: int) -> tuple[Callable[[], None], nn.Module]:
    """A training step of the recipe on noise, in the precision asked for, without communication; and the network."""
    config = evolve(probe.config, step_mode="eager")
    train_step = build_train_step(config, probe.accelerator, _info(probe), communicates=False)
    images, labels = _sample(probe, batch)
    rows = torch.arange(batch, device=images.device)
    micro_batch = MicroBatch(Split(images, labels), rows, slice(0, batch), global_batch_size=batch, num_samples=batch)
    return partial(train_step, [micro_batch], 0), train_step.bare_model


def _hash_weights(model: nn.Module) -> str:
    return short_hash(b"".join(tensor.numpy().tobytes() for tensor in module_tensors(model).values()))


COMPUTE_CHECKS = (
    Check("initial weights", measure_initial_weights, judge_equal("the models differ: same code, versions, recipe?")),
    Check("precision", measure_precision, judge_precision),
    Check("determinism", measure_determinism, judge_determinism),
    Check("speed", measure_speed, judge_speed),
    Check("one thread", measure_one_thread, judge_one_thread),
)
