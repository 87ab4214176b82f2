"""The plan of a run, made before its first step: batches, length, and at which steps what happens.

In: the `loop` section, the size of the training set, the number of processes. Out: a `Plan`. Letters: N training
images, P processes, A accumulated micro-batches. A step is an optimizer step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mnist.config import TrainConfig, parse_fault
from mnist.errors import UserError


@dataclass(frozen=True)
class Plan:
    """What `build_plan` has computed.

    Attributes:
        global_batch_size: images per step, over all processes.
        accumulation_steps: A.
        world_size: P.
        epoch_steps: steps in one epoch, a pass over the training set; its last batch may be short.
        num_steps: length of the run.
        log_steps, eval_steps, checkpoint_steps: cadences, each 1 or more.
    """

    global_batch_size: int
    accumulation_steps: int
    world_size: int
    epoch_steps: int
    num_steps: int
    log_steps: int
    eval_steps: int
    checkpoint_steps: int

    def describe_length(self) -> str:
        """The length of the run in words."""
        epochs = self.num_steps / self.epoch_steps
        length = f"{epochs:.3g}" if epochs < 100 else f"{epochs:,.0f}"
        return f"{self.num_steps:,} steps, {length} {'epoch' if epochs == 1 else 'epochs'}"

    @property
    def micro_batch_size(self) -> int:
        """The largest batch that one forward pass of one process sees."""
        return math.ceil(self.global_batch_size / (self.world_size * self.accumulation_steps))

    def epochs_done(self, step: int) -> float:
        """Epochs done after `step` steps, fractions included."""
        return round(step / self.epoch_steps, 4)

    def next_epoch_end(self, step: int) -> int:
        """The step at which the epoch that follows `step` steps, or the run, is over."""
        return min(self.num_steps, (step // self.epoch_steps + 1) * self.epoch_steps)

    def epoch_ends_at(self, step: int) -> bool:
        """Whether an epoch, or the run, is over after `step` steps."""
        return step % self.epoch_steps == 0 or step == self.num_steps

    def evaluates_at(self, step: int) -> bool:
        """Whether the model is scored after `step` steps."""
        return self.epoch_ends_at(step) or step % self.eval_steps == 0

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` steps."""
        return step % self.checkpoint_steps == 0 or step == self.num_steps

    def pauses_at(self, step: int) -> bool:
        """Whether the loop has something to report or do after `step` steps; a record is written then."""
        return step % self.log_steps == 0 or self.evaluates_at(step) or self.saves_at(step)


def build_plan(config: TrainConfig, num_train: int, world_size: int) -> Plan:
    """The plan of a run.

    Args:
        config: the resolved configuration.
        num_train: N, after the validation split is taken off.
        world_size: P.

    Raises:
        UserError: a global batch that does not fit the data or the processes; an --inject that would never happen.
    """
    loop = config.loop
    batch, accumulation_steps = loop.global_batch_size, loop.gradient_accumulation_steps or 1
    if batch > num_train:
        raise UserError(
            f"--global-batch-size {batch}: larger than the training set of {num_train:,} images; "
            f"give {num_train} or less, and more --epochs"
        )
    if batch < world_size * accumulation_steps:
        raise UserError(
            f"--global-batch-size {batch}: too small for {world_size} processes x {accumulation_steps} "
            f"--gradient-accumulation-steps; give at least {world_size * accumulation_steps}"
        )
    epoch_steps = math.ceil(num_train / batch)
    num_steps = min(loop.epochs * epoch_steps, loop.max_steps or loop.epochs * epoch_steps)
    for text in config.output.inject:
        fault = parse_fault(text)
        if fault.rank >= world_size or fault.step > num_steps:
            raise UserError(
                f"--inject {text}: would never happen in {num_steps:,} steps of ranks 0 to {world_size - 1}"
            )
    return Plan(
        global_batch_size=batch,
        accumulation_steps=accumulation_steps,
        world_size=world_size,
        epoch_steps=epoch_steps,
        num_steps=num_steps,
        log_steps=loop.log_every or epoch_steps,
        eval_steps=loop.eval_every or epoch_steps,
        checkpoint_steps=config.output.checkpoint_every or epoch_steps,
    )
