"""The parts of a run, built before its first step.

In: the objects that `train_ddp.py` builds. Out: one object to pass on, so that signatures stay short.
"""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator

from mnist.config import TrainConfig
from mnist.data.datasets import Dataset
from mnist.runs.directory import RunDirectory
from mnist.training.loop import TrainState
from mnist.training.plan import Plan
from mnist.training.step import TrainStep


@dataclass(frozen=True)
class RunSetup:
    """The parts of a run; every rank has its own.

    Attributes:
        config: with the choices of the launcher and the data set filled in.
        plan: length, batches and cadences.
        dataset: its splits, on the device.
        directory: where the run writes.
        train_step: model, optimizer, schedule and, where there is one, the average of the weights.
        state: of the loop; the one part that changes.
    """

    config: TrainConfig
    plan: Plan
    dataset: Dataset
    directory: RunDirectory
    train_step: TrainStep
    state: TrainState

    @property
    def accelerator(self) -> Accelerator:
        """Of this rank."""
        return self.train_step.accelerator
