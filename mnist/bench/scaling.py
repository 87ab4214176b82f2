"""The cost of communication: processes under DDP, and the same processes without communication.

In: an accelerator over several ranks and a configuration. Out: images/s of all ranks together, per way and round; the
ways take turns. Every rank must call the functions here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from mnist.bench.report import Row
from mnist.config import TrainConfig
from mnist.data.batches import TrainLoader
from mnist.data.datasets import Dataset
from mnist.training.build import build_train_step
from mnist.training.cuda_graph import choose_step_mode
from mnist.training.step import wait_for_device, warm_up

ALONE = "no communication"
LOCKSTEP = "one number a step"  # the cost of waiting for the slowest rank, without gradients
PROJECT = "this project"
WAYS = (ALONE, LOCKSTEP, PROJECT)


def measure_scaling(
    accelerator: Accelerator, config: TrainConfig, dataset: Dataset, num_steps: int, repeats: int
) -> dict[str, list[float]]:
    """Takes `num_steps` optimizer steps in every way, `repeats` + 1 times in turns; the first turn is not counted.

    Args:
        accelerator: over all ranks.
        config: the recipe; its global batch is what *each* rank takes per step.
        dataset: on the device; its training images are taken.
        num_steps: per measurement.
        repeats: measurements that count.

    Returns:
        By way, images/s per repeat; equal on every rank.
    """
    trains = {way: _build(accelerator, config, dataset, num_steps, way) for way in WAYS}
    for train in trains.values():
        train()
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats):
        first = repeat % len(WAYS)  # the order changes, so that each way follows each other one
        for way in WAYS[first:] + WAYS[:first]:
            accelerator.wait_for_everyone()
            started = time.perf_counter()
            num_images = trains[way]()
            speed = torch.tensor(num_images / (time.perf_counter() - started), device=accelerator.device)
            rates[way].append(accelerator.reduce(speed).item())
    return rates


def _build(
    accelerator: Accelerator, config: TrainConfig, dataset: Dataset, num_steps: int, way: str
) -> Callable[[], int]:
    """A function that trains `num_steps` steps in this way, and returns how many images this rank has taken."""
    train_step = build_train_step(config, accelerator, dataset.info, communicates=way == PROJECT)
    batch, side, channels = config.loop.global_batch_size, config.image.image_size, dataset.info.in_channels
    warm_up(train_step.model, torch.zeros(batch, channels, side, side, device=accelerator.device))
    ranks = accelerator.num_processes
    loader = TrainLoader(
        dataset.train, global_batch_size=batch * ranks, seed=0, rank=accelerator.process_index, world_size=ranks
    )
    choose_step_mode(train_step, config.runtime.step_mode, 1, loader)
    step = 0

    def train() -> int:
        nonlocal step
        num_images = 0
        for micro_batches in loader.steps(step, step + num_steps):
            train_step(micro_batches, step)
            if way == LOCKSTEP:
                torch.distributed.all_reduce(train_step.sums[-1:])
            step += 1
            num_images += sum(micro_batch.num_samples for micro_batch in micro_batches)
        wait_for_device(accelerator.device)
        return num_images

    return train


def compare_rates(rates: Sequence[float], alone: Sequence[float]) -> Row:
    """The speed, and the share of the speed without communication that is left."""
    ratios = [one / limit for one, limit in zip(rates, alone, strict=True)]
    return {
        "images/s": statistics.median(rates),
        "ratio": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
    }
