"""The training step as one CUDA graph: the same numbers, and one launch for all its kernels.

In: a `TrainStep` before its first step. Out: the same `TrainStep`, which now replays a recording of its work on the
device: gathering images, augmentation, forward, loss, backward, gradient norm, optimizer, average. Indices, seeds,
learning rate and the average's weight are written to the device between replays, so a replayed step draws the same
random numbers as an eager one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from mnist.data.batches import MicroBatch, TrainLoader
from mnist.training.step import TrainStep

WARMUP_STEPS = 11  # what DDP asks for: its own timing of the first ten backward passes cannot be recorded

Replay = Callable[[], object]
Record = Callable[[Callable[[], object]], Replay]


def reason_not_capturable(accelerator: Accelerator, accumulation_steps: int) -> str | None:
    """Why the step of this run cannot be captured; None if it can."""
    if accelerator.device.type != "cuda":
        return "needs a CUDA GPU"
    if accumulation_steps > 1:
        return "is for one micro-batch a step"
    if accelerator.scaler is not None:
        return "cannot follow the gradient scaler of fp16, which decides on the host; choose bf16"
    if accelerator.state.dynamo_plugin.backend.value != "NO":
        return "is not combined with the launcher's dynamo backend"
    return None


def should_capture(accelerator: Accelerator, mode: str, accumulation_steps: int) -> bool:
    """Whether to capture the step of this run, which needs an optimizer built with `capturable`."""
    return mode != "eager" and reason_not_capturable(accelerator, accumulation_steps) is None


def choose_step_mode(
    train_step: TrainStep, mode: str, accumulation_steps: int, train_loader: TrainLoader
) -> tuple[str, str | None]:
    """Captures the step unless `mode` is eager or it cannot be captured. Every rank must call this.

    Args:
        train_step: gets a `replay`, or stays as it is.
        mode: auto, eager or captured.
        accumulation_steps: micro-batches per step.
        train_loader: of the run; its first pass has batches of all sizes.

    Returns:
        The mode used, eager or captured, and a warning or None.
    """
    if mode == "eager":
        return "eager", None
    reason = reason_not_capturable(train_step.accelerator, accumulation_steps)
    if reason is not None:
        return "eager", f"--step-mode captured {reason}: steps are eager" if mode == "captured" else None
    first_and_last = [next(train_loader.steps(step, step + 1))[0] for step in (0, train_loader.epoch_steps - 1)]
    try:
        train_step.replay = CapturedStep(train_step, first_and_last, record_cuda_graph)
    except RuntimeError as error:  # a kernel that cannot be captured; ending the capture may raise a second error
        cause = (str(error.__context__ or error) or type(error).__name__).splitlines()[0]
        return "eager", f"steps are eager, because capturing failed ({cause})"
    return "captured", None


class CapturedStep:
    """Replays the device work of a step: one recording for each size of the global batch.

    Args:
        train_step: is not changed, except that its optimizer has state afterwards.
        batches: this rank's micro-batch in global batches of each size; only shapes and rows matter.
        record: runs some work, records it, and returns what replays it; `record_cuda_graph`, except in tests.
    """

    def __init__(self, train_step: TrainStep, batches: Sequence[MicroBatch], record: Record) -> None:
        self._train_step = train_step
        with restored_afterwards(train_step):
            train_step.set_step(0, 0)
            self._recordings = {
                size: Recording(train_step, batch, record)
                for size, batch in {batch.global_batch_size: batch for batch in batches}.items()
            }

    def __call__(self, micro_batches: Sequence[MicroBatch], step: int) -> bool:
        """Takes the step and returns True; returns False where no global batch of this size was recorded."""
        recording = self._recordings.get(micro_batches[0].global_batch_size)
        if recording is None or len(micro_batches) != 1:
            return False
        self._train_step.set_step(step, 0)
        recording.replay(micro_batches[0])
        return True


class Recording:
    """The device work of a step on one micro-batch, for any images in it."""

    def __init__(self, train_step: TrainStep, batch: MicroBatch, record: Record) -> None:
        self._train_step = train_step
        self._indices = torch.zeros_like(batch.indices)
        batch = replace(batch, indices=self._indices)

        def work() -> None:
            train_step.forward_backward(batch)
            train_step.update(measure_grad_norm=True)

        self._replay = record(work)
        self._grad_norm = train_step.grad_norm  # the tensor that replays write to

    def replay(self, batch: MicroBatch) -> None:
        """Does the work again, on the images of `batch`."""
        self._indices.copy_(batch.indices)
        self._replay()
        self._train_step.grad_norm = self._grad_norm


def record_cuda_graph(work: Callable[[], object]) -> Replay:
    """Runs `work` a few times and records it. The current stream must not be the default one, as in all our processes.

    DDP must have been built on that stream, and keeps its tensors there.

    Raises:
        RuntimeError: some of it cannot be recorded. The generator works as before.
    """
    for _ in range(WARMUP_STEPS):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        graph.capture_begin(capture_error_mode="thread_local")  # NCCL's watchdog thread may call CUDA meanwhile
        try:
            work()
        finally:
            graph.capture_end()
    except BaseException:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())  # before 2.13 a failed capture leaves it in capture mode
        torch.cuda.synchronize()
        raise
    return graph.replay


@contextmanager
def restored_afterwards(train_step: TrainStep) -> Iterator[None]:
    """Restores weights, buffers, optimizer state, rates and sums in place at the end, also after an error.

    Optimizer state that did not exist before is set to zero, where all optimizers of this project start.
    """
    saved = {id(tensor): tensor.detach().clone() for tensor in _tensors(train_step)}
    try:
        yield
    finally:
        train_step.optimizer.zero_grad()
        with torch.no_grad():
            for tensor in _tensors(train_step):
                before = saved.get(id(tensor))
                tensor.zero_() if before is None else tensor.copy_(before)


def _tensors(train_step: TrainStep) -> list[Tensor]:
    """All tensors that a step changes, and learning rates on the device."""
    states = train_step.optimizer.state.values()
    moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    modules = [train_step.model, *([train_step.average.module] if train_step.average is not None else [])]
    weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    rates = [group["lr"] for group in train_step.optimizer.param_groups if isinstance(group["lr"], Tensor)]
    return [*weights, train_step.sums, *moments, *rates]
