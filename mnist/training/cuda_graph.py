"""The training step as one CUDA graph: the same numbers, and one launch for all its kernels.

In: a `TrainStep` before its first step. Out: the same `TrainStep`, which now replays a recording of its work on the
device: gathering images, augmentation, forward, loss, backward, gradient norm, optimizer, average. Indices, seeds,
learning rate and the average's weight are written to the device between replays, so a replayed step draws the same
random numbers as an eager one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist.data.batches import MicroBatch, TrainLoader
from mnist.errors import RunError
from mnist.training.step import TrainStep

WARMUP_STEPS = 11  # what DDP asks for: its own timing of the first ten backward passes cannot be recorded
STARTS_AT_ZERO = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adadelta)

Replay = Callable[[], object]
Record = Callable[[Callable[[], object]], Replay]


class CaptureError(RuntimeError):
    """Some of the work cannot be recorded, or there is no memory for the recording."""


def reason_not_capturable(
    accelerator: Accelerator, model: nn.Module, optimizer: type[Optimizer], accumulation_steps: int
) -> str | None:
    """Why the step of this run cannot be captured; None if it can."""
    names = ", ".join(kind.__name__ for kind in STARTS_AT_ZERO)
    reasons = {
        "needs a CUDA GPU": accelerator.device.type != "cuda",
        "is for one micro-batch a step": accumulation_steps > 1,
        "cannot follow fp16's gradient scaler, which decides on the host; choose bf16": accelerator.scaler is not None,
        "is not combined with the launcher's dynamo backend": accelerator.state.dynamo_plugin.backend.value != "NO",
        "has not been tried with --sync-bn": any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()),
        f"is for optimizers whose state starts at zero ({names})": not issubclass(optimizer, STARTS_AT_ZERO),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def choose_step_mode(
    train_step: TrainStep, mode: str, accumulation_steps: int, train_loader: TrainLoader
) -> tuple[str, str | None]:
    """Captures the step unless `mode` is eager or it cannot be captured. Every rank must call this; all do the same.

    Args:
        train_step: gets a `replay`, or stays as it is.
        mode: auto, eager or captured.
        accumulation_steps: micro-batches per step.
        train_loader: of the run; its first pass has batches of all sizes.

    Returns:
        The mode used, eager or captured, and a warning or None.

    Raises:
        RunError: one of several ranks cannot record; DDP cannot go on after a backward pass that broke off.
    """
    if mode == "eager":
        return "eager", None
    accelerator, model = train_step.accelerator, train_step.bare_model
    reason = reason_not_capturable(accelerator, model, type(train_step.optimizer), accumulation_steps)
    if reason is not None:
        return "eager", f"--step-mode captured {reason}: steps are eager" if mode == "captured" else None
    first_and_last = [next(train_loader.steps(step, step + 1))[0] for step in (0, train_loader.epoch_steps - 1)]
    replay, failure = None, None
    try:
        replay = CapturedStep(train_step, first_and_last, record_cuda_graph)
    except CaptureError as error:
        failure = f"capturing the step failed on rank {train_step.rank} ({error})"
    failure = next((text for text in gather_object([failure]) if text is not None), None)
    if failure is not None and accelerator.num_processes > 1:
        raise RunError(f"{failure}; add --step-mode eager")
    if failure is not None:
        return "eager", f"{failure}: steps are eager"
    train_step.replay = replay
    return "captured", None


class CapturedStep:
    """Replays the device work of a step: one recording for each size of the global batch.

    Args:
        train_step: is not changed, except that its optimizer has state afterwards.
        batches: this rank's micro-batch in global batches of each size; only shapes and rows matter.
        record: records some work and returns what replays it; `record_cuda_graph`, except in tests.

    Raises:
        CaptureError: by `record`. Then, too, all ranks have taken as many steps to warm up.
    """

    def __init__(self, train_step: TrainStep, batches: Sequence[MicroBatch], record: Record) -> None:
        # The step holds this object. So that graphs are freed with it, nothing here holds the step.
        self._recordings: dict[int, _Recording] = {}
        by_size = {batch.global_batch_size: batch for batch in batches}
        batches = [replace(batch, indices=torch.zeros_like(batch.indices)) for batch in by_size.values()]
        with restored_afterwards(train_step):
            train_step.set_step(0, 0)
            for batch in batches:
                for _ in range(WARMUP_STEPS):
                    _take_step(train_step, batch)
            for batch in batches:  # only now: ranks communicate above, and a recording may fail on one
                replay = record(partial(_take_step, train_step, batch))
                self._recordings[batch.global_batch_size] = _Recording(batch.indices, replay, train_step.grad_norm)

    def __call__(self, train_step: TrainStep, micro_batches: Sequence[MicroBatch], step: int) -> bool:
        """Takes the step and returns True; returns False where no global batch of this size was recorded."""
        (batch,) = micro_batches
        recording = self._recordings.get(batch.global_batch_size)
        if recording is None:
            return False
        train_step.set_step(step, 0)
        recording.indices.copy_(batch.indices)
        recording.replay()
        train_step.grad_norm = recording.grad_norm
        return True


def _take_step(train_step: TrainStep, batch: MicroBatch) -> None:
    """What is recorded."""
    train_step.forward_backward(batch)
    train_step.update(measure_grad_norm=True)


@dataclass(frozen=True)
class _Recording:
    """A step that can be replayed.

    Attributes:
        indices: (B,), which images it trains on; written before each replay.
        replay: does the work on the device.
        grad_norm: the tensor that `replay` writes to.
    """

    indices: Tensor
    replay: Replay
    grad_norm: float | Tensor


def record_cuda_graph(work: Callable[[], object]) -> Replay:
    """Records `work`, which must have run before; the current stream must not be the default one.

    DDP must have been built on this stream too, because it keeps work of its own there.

    Raises:
        CaptureError: some of it cannot be recorded, or the memory is full. The generator works as before.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # no memory can be given back while recording
    graph = torch.cuda.CUDAGraph()
    try:
        graph.capture_begin(capture_error_mode="thread_local")  # NCCL's watchdog thread may call CUDA meanwhile
        try:
            work()
        finally:
            graph.capture_end()
    except RuntimeError as error:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())  # before 2.13 a failed capture leaves it in capture mode
        torch.cuda.synchronize()
        # Ending a failed recording may raise a second error. (A name for either would keep this frame and its memory.)
        message = (str(error.__context__ or error) or type(error).__name__).splitlines()[0]
        raise CaptureError(message) from error
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
