"""The training step as one CUDA graph: the same numbers, and one launch for all its kernels.

In: a `TrainStep` whose model and optimizer are where training begins. Out: the same `TrainStep`, which from now on
replays a recording of its work on the device: gathering images, augmentation, transform, forward, loss, backward,
clipping, optimizer, average. Indices, seeds, learning rate and the average's weight are written between replays, so
that a step draws the random numbers that it draws without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor

from mnist.data.batches import MicroBatch
from mnist.training.step import TrainStep

WARMUP_STEPS = 3
CHECK_STEPS, CHECK_REPEATS = 2, 2
# Where eager outcomes differ from one another, a captured one may be off by DRIFT times as much, or by FLOOR.
DRIFT = 10
FLOOR = 1e-5  # in parts of a tensor's norm

Replay = Callable[[], object]
Record = Callable[[Callable[[], object], Sequence[torch.Generator]], Replay]


def why_not(accelerator: Accelerator, accumulation_steps: int) -> str | None:
    """Why the step of this run cannot be captured; None if it can."""
    if accelerator.device.type != "cuda":
        return "needs a CUDA GPU"
    if accelerator.num_processes > 1:
        return "is for one process: recorded exchanges between ranks have not been tried"
    if accumulation_steps > 1:
        return "is for one micro-batch a step"
    if accelerator.scaler is not None:
        return "cannot follow the gradient scaler of fp16, which decides on the host; choose bf16"
    if accelerator.state.dynamo_plugin.backend.value != "NO":
        return "is not combined with the launcher's dynamo backend"
    return None


def settle_step_mode(
    train_step: TrainStep, mode: str, accumulation_steps: int, steps: Callable[[], Iterable[Sequence[MicroBatch]]]
) -> tuple[str, str | None]:
    """Captures the step if it is asked for, or may be and gives the same weights.

    Args:
        train_step: gets a `captured`, or stays as it is.
        mode: auto, eager or captured.
        accumulation_steps: micro-batches per step.
        steps: the run's next steps, at least one, anew at each call.

    Returns:
        eager or captured, and a remark where that is not what was asked for.
    """
    reason = why_not(train_step.accelerator, accumulation_steps)
    if mode == "eager" or reason is not None:
        return "eager", f"--step-mode captured {reason}: steps are eager" if mode == "captured" else None
    first = list(islice(steps(), CHECK_STEPS))
    largest = max((micro_batches[0] for micro_batches in first), key=lambda batch: batch.num_samples)
    try:
        captured = CapturedStep(train_step, largest, record_cuda_graph)
        is_same = agrees(train_step, captured, first)
    except RuntimeError as error:  # a kernel that cannot be recorded; what ends the recording then covers the cause
        cause = (str(error.__context__ or error) or type(error).__name__).splitlines()[0]
        return "eager", f"steps are eager, because capturing failed ({cause})"
    if not is_same and mode == "auto":
        return "eager", "steps are eager: captured ones give other weights here (--step-mode captured takes them)"
    train_step.captured = captured
    return "captured", None if is_same else "captured steps give other weights than eager ones here"


class CapturedStep:
    """Replays the device work of a step on batches of one size.

    Args:
        train_step: is left as it was, except that its optimizer's state exists now.
        batch: of the full size (the last one of a pass may be smaller); only its shape matters.
        record: makes a recording of some work; `record_cuda_graph`, unless a test has something else in mind.
    """

    def __init__(self, train_step: TrainStep, batch: MicroBatch, record: Record) -> None:
        self._batch = replace(batch, indices=torch.zeros_like(batch.indices))

        def work(measure_grad_norm: bool) -> None:
            train_step.forward_backward(self._batch)
            train_step.update(measure_grad_norm)

        self._replays: dict[bool, Replay] = {}
        for measures in (False, True):
            with _left_as_it_was(train_step):
                train_step.set_step(0, 0)
                self._replays[measures] = record(partial(work, measures), [train_step.augment.generator])
        self._grad_norm = train_step.grad_norm  # the tensor that the second of them writes to
        self._train_step = train_step

    def fits(self, micro_batches: Sequence[MicroBatch]) -> bool:
        """Whether these are one micro-batch of the recorded size: the last batch of a pass may be smaller."""
        return len(micro_batches) == 1 and micro_batches[0].num_samples == self._batch.num_samples

    def __call__(self, batch: MicroBatch, measure_grad_norm: bool) -> None:
        """Does the work on `batch`; the device knows the step."""
        self._batch.indices.copy_(batch.indices)
        self._replays[measure_grad_norm]()
        if measure_grad_norm:
            self._train_step.grad_norm = self._grad_norm


def record_cuda_graph(work: Callable[[], object], generators: Sequence[torch.Generator]) -> Replay:
    """Runs `work` a few times on a stream of its own, where kernels are chosen and memory is found, and records it.

    Raises:
        RuntimeError: some of it cannot be recorded. Stream and generators are fit for eager work all the same.
    """
    usual, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(usual)
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_STEPS):
            work()
    usual.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)  # the default one is known to it
    try:  # "thread_local": NCCL's watchdog may be at work beside it
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    except BaseException:
        torch.cuda.set_stream(usual)  # torch stays on the other one when a recording breaks off,
        for generator in (torch.cuda.default_generators[usual.device_index], *generators):
            generator.graphsafe_set_state(generator.clone_state())  # and, before 2.13, its generators in the recording
        torch.cuda.synchronize()
        raise
    return graph.replay


def agrees(train_step: TrainStep, captured: CapturedStep, steps: Sequence[Sequence[MicroBatch]]) -> bool:
    """Whether `steps` give the same weights captured and not; leaves no trace.

    The same to the last bit, unless eager steps do not repeat themselves to the last bit either (some GPU kernels add
    up in any order): then each tensor may be `DRIFT` times as far from its eager value as eager values are apart.
    """

    def outcome(replay: CapturedStep | None) -> list[Tensor]:
        with _left_as_it_was(train_step):
            for step, micro_batches in enumerate(steps):
                measures = (len(steps) - step) % 2 == 1  # the last one, and by turns: both recordings are tried
                if replay is not None and replay.fits(micro_batches):
                    train_step.set_step(step, 0)
                    replay(micro_batches[0], measures)
                else:
                    train_step.compute(micro_batches, step, measures)
                for rate in _learning_rates(train_step):
                    rate.mul_(0.5)  # it must be read anew at each step
            tensors = [*_tensors(train_step), torch.as_tensor(train_step.grad_norm)]
            return [tensor.detach().to(torch.float64, copy=True) for tensor in tensors]

    def distances(others: list[Tensor]) -> Tensor:
        """Of each tensor from its eager value, in parts of the norm of that."""
        pairs = zip(others, eager, strict=True)
        return torch.stack([(other - own).norm() / own.norm().clamp(min=1e-30) for other, own in pairs])

    eager, replayed = outcome(None), outcome(captured)
    noise = torch.stack([distances(outcome(None)) for _ in range(CHECK_REPEATS)]).amax(dim=0)
    floor = FLOOR if bool(noise.any()) else 0.0
    return bool((distances(replayed) <= (DRIFT * noise).clamp(min=floor)).all())


@contextmanager
def _left_as_it_was(train_step: TrainStep) -> Iterator[None]:
    """Puts weights, buffers, optimizer state, rates and sums back afterwards, in place, also after an error.

    State that an optimizer makes in its first step is zero before it (sgd, adam, adamw, adadelta).
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
    states = train_step.optimizer.state.values()
    moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    modules = [train_step.model, *([train_step.average.module] if train_step.average is not None else [])]
    weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return [*weights, train_step.sums, *moments, *_learning_rates(train_step)]


def _learning_rates(train_step: TrainStep) -> list[Tensor]:
    """Those that live on the device."""
    return [group["lr"] for group in train_step.optimizer.param_groups if isinstance(group["lr"], Tensor)]
