"""Where the time before the first training step goes: one start, stage by stage; `mnist.bench startup` runs it.

In: the command line of train_ddp.py. Out: JSON on standard output: the wall clock at the start, and seconds by stage.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise

BEGAN = time.time()
STAMPS = [("", time.perf_counter())]

from mnist.system import process

process.tune()  # as train_ddp.py does
import torch

STAMPS.append(("import torch", time.perf_counter()))

import accelerate  # noqa: F401 (its time is wanted)

STAMPS.append(("import accelerate", time.perf_counter()))

from mnist.bench.baselines import build_step
from mnist.cli import parse_command_line
from mnist.config import TrainConfig
from mnist.data import datasets
from mnist.data.batches import TrainLoader
from mnist.system.accelerator import open_accelerator
from mnist.training.step import warm_up

STAMPS.append(("import this project", time.perf_counter()))


def main(config: TrainConfig) -> int:
    """Starts as train_ddp.py does, up to the first optimizer step, and prints what took how long."""
    with open_accelerator(config.runtime) as accelerator:
        _stamp("open the accelerator")
        dataset = datasets.read(datasets.choose(config.data).name, config.data).to(accelerator.device)
        _stamp("read the data")
        train_step = build_step(accelerator, config)
        _stamp("build and prepare")
        batch, side = config.loop.global_batch_size, config.image.image_size
        warm_up(train_step.model, torch.zeros(batch, 1, side, side, device=accelerator.device))
        _stamp("warm up")
        (micro_batches,) = TrainLoader(dataset.train, global_batch_size=batch, seed=0).steps(0, 1)
        train_step(micro_batches, 0)
        float(train_step.sums[0])  # waits for the device
        _stamp("first step")
    stages = {name: after - before for (_, before), (name, after) in pairwise(STAMPS)}
    sys.stdout.write(json.dumps({"began": BEGAN, "stages": stages}) + "\n")
    return 0


def _stamp(stage: str) -> None:
    STAMPS.append((stage, time.perf_counter()))


if __name__ == "__main__":
    sys.exit(main(parse_command_line()))
