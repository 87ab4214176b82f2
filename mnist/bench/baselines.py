"""The loops of `mnist.bench`: this project's, and the usual ones.

In: a `Job` (configuration and images). Out: a `Pass`: its index -> the sum of the losses of all images seen, and how
many they were. All train the same network from the same weights with the same update rule and batch size, at a
constant learning rate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from mnist.config import RuntimeConfig, TrainConfig
from mnist.data.batches import Split, TrainLoader
from mnist.data.sources import DatasetInfo
from mnist.data.transforms import BatchTransform
from mnist.errors import RunError
from mnist.models import seed_initial_weights
from mnist.system.accelerator import build_accelerator
from mnist.system.torchvision_compat import import_torchvision
from mnist.training.build import build_network, build_train_step
from mnist.training.cuda_graph import WARMUP_STEPS, choose_step_mode, record_cuda_graph
from mnist.training.loop import TrainState, train_one_epoch
from mnist.training.losses import build_loss
from mnist.training.optim import build_optimizer
from mnist.training.step import warm_up

Sums = tuple[float, int]  # sum of the losses of all images of a pass, and their number
Pass = Callable[[int], Sums]


@dataclass(frozen=True)
class Job:
    """What each loop trains on.

    Attributes:
        config: data set, threads and precision resolved; no augmentation, averaging, clipping or schedule.
        split: the N images of a pass, on the CPU.
        info: of the data set.
        num_workers: processes that load data; for loops with a DataLoader.
    """

    config: TrainConfig
    split: Split
    info: DatasetInfo
    num_workers: int = 0


class PILImages(Dataset[tuple[Any, int]]):
    """Images in memory, returned one by one as PIL images: what torchvision's MNIST class does with its own files."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor]) -> None:
        self.split = split
        self.transform = transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.split.images[index]
        if pixels.ndim == 3:
            pixels = pixels.permute(1, 2, 0).squeeze(2)  # (H, W), or (H, W, 3)
        return self.transform(Image.fromarray(pixels.numpy())), int(self.split.labels[index])


def usual_loader(job: Job) -> DataLoader[Any]:
    """One Python call per image and transform, shuffled; workers are kept."""
    transforms = import_torchvision("transforms")
    image = job.config.image
    size = (image.image_size, image.image_size)
    resize = [transforms.Resize(size)] if job.split.image_shape[1:] != size else []
    normalise = [transforms.Normalize(image.mean, image.std)] if (image.mean, image.std) != ((0,), (1,)) else []
    return DataLoader(
        PILImages(job.split, transforms.Compose([*resize, transforms.ToTensor(), *normalise])),
        batch_size=job.config.loop.global_batch_size,
        shuffle=True,
        num_workers=job.num_workers,
        persistent_workers=job.num_workers > 0,
        multiprocessing_context="fork" if job.num_workers else None,  # as usual on Linux; here it would be spawn
    )


def usual_loop(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    config: RuntimeConfig,
    *,
    is_prepared: bool,
) -> Callable[[], Sums]:
    """A pass of the loop of the tutorials, with `.item()` at each batch, or of Accelerate's examples.

    Args:
        model: images (B, C, S, S) -> logits (B, K).
        optimizer: of its parameters.
        batches: images and labels (B,) of a pass.
        loss_fn: logits, labels -> loss of each image, or their mean.
        config: precision and device.
        is_prepared: everything passes through `accelerator.prepare`, as in Accelerate's examples.
    """
    device = find_device(config)
    model.to(device)
    backward: Callable[[Tensor], Any] = Tensor.backward
    if is_prepared:
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=config.mixed_precision)
        torch.set_num_threads(config.num_threads)  # Accelerate has set its own
        model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
        backward = accelerator.backward

    def train_pass() -> Sums:
        model.train()
        loss_sum, num_images = 0.0, 0
        for images, labels in batches:
            with autocast(config, device):
                logits = model(images.to(device))
            loss = loss_fn(logits.float(), labels.to(device)).mean()
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            loss_sum += loss.item() * len(labels)
            num_images += len(labels)
        return loss_sum, num_images

    return train_pass


def pipeline(job: Job, *, is_prepared: bool = False) -> Pass:
    """The loop of the tutorials: PIL, transforms per image, a DataLoader, torch's default memory and optimizer."""
    model = fresh_model(job).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimizer = build_optimizer(model.parameters(), job.config.optim)
    for group in optimizer.param_groups:
        group["fused"] = None
    loss_fn = build_loss(job.config.optim.loss, job.config.optim.label_smoothing)
    train_pass = usual_loop(model, optimizer, usual_loader(job), loss_fn, job.config.runtime, is_prepared=is_prepared)
    return lambda _: train_pass()  # the loader shuffles by itself


def prepared(job: Job) -> Pass:
    """The loop of Accelerate's examples, with the same pipeline."""
    return pipeline(job, is_prepared=True)


def bare(job: Job) -> Pass:
    """The least work that a step can be: images on the device, one index operation, no metrics, no checks.

    It has this project's memory format, fused optimizer and order of images, so that its losses are comparable too.
    Captured, it is one CUDA graph for batches of the full size.
    """
    config = job.config
    device = find_device(config.runtime)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # where work can be recorded; the project has one, too
    split, batch = job.split.to(device), config.loop.global_batch_size
    model = fresh_model(job).to(device)
    is_captured = config.runtime.step_mode == "captured"
    optimizer = build_optimizer(model.parameters(), config.optim, capturable=is_captured)
    loss_fn = build_loss(config.optim.loss, config.optim.label_smoothing)
    transform = BatchTransform(config.image)
    order_of = train_loader(job, split).order
    torch.backends.cuda.matmul.allow_tf32 = True  # as the project has it

    def train_batch(indices: Tensor) -> Tensor:
        images, labels = split.images.index_select(0, indices), split.labels.index_select(0, indices)
        with autocast(config.runtime, device):
            logits = model(transform(images))
        loss = loss_fn(logits.float(), labels).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    train_full_batch = _captured(train_batch, model, optimizer, batch) if is_captured else train_batch

    def train_pass(index: int) -> Sums:
        parts = order_of(index).to(device).split(batch)
        losses = [(train_full_batch if len(part) == batch else train_batch)(part) for part in parts]
        return sum(float(loss) * len(part) for loss, part in zip(losses, parts, strict=True)), len(split)

    return train_pass


def _captured(
    train_batch: Callable[[Tensor], Tensor], model: nn.Module, optimizer: Optimizer, batch: int
) -> Callable[[Tensor], Tensor]:
    """`train_batch` as a CUDA graph, for `batch` images. Recording trains; weights and moments are restored."""
    initial = copy.deepcopy(model.state_dict())
    device = next(model.parameters()).device
    indices, loss = torch.zeros(batch, dtype=torch.int64, device=device), torch.zeros((), device=device)

    def work() -> None:
        loss.copy_(train_batch(indices))

    for _ in range(WARMUP_STEPS):
        work()
    replay = record_cuda_graph(work)
    model.load_state_dict(initial)
    for value in (value for state in optimizer.state.values() for value in state.values()):
        value.zero_()  # in place, where the graph has it

    def train_full_batch(part: Tensor) -> Tensor:
        indices.copy_(part)
        replay()
        return loss.clone()

    return train_full_batch


def project(job: Job) -> Pass:
    """This project's loop, put together as in train_ddp.py, a record every `log_every` steps included."""
    accelerator = build_accelerator(job.config.runtime)
    loader = train_loader(job, job.split.to(accelerator.device))
    train_step = build_train_step(job.config, accelerator, job.info)
    side = job.config.image.image_size
    batch = min(len(job.split), job.config.loop.global_batch_size)
    warm_up(train_step.model, torch.zeros(batch, job.info.in_channels, side, side, device=accelerator.device))
    wanted = job.config.runtime.step_mode
    mode, remark = choose_step_mode(train_step, wanted, 1, loader)
    if wanted == "captured" and mode != wanted:
        raise RunError(f"--step-mode {wanted}: {remark}")
    state = TrainState()

    def pauses_at(step: int) -> bool:
        return step % job.config.loop.log_every == 0 or step % loader.epoch_steps == 0

    def train_pass(index: int) -> Sums:
        steps = loader.steps(index * loader.epoch_steps, (index + 1) * loader.epoch_steps)
        records = list(train_one_epoch(train_step, steps, state, pauses_at=pauses_at))
        return sum(r.sums.totals["loss"] for r in records), sum(r.sums.num_samples for r in records)

    return train_pass


LOOPS: dict[str, Callable[[Job], Pass]] = {loop.__name__: loop for loop in (pipeline, prepared, bare, project)}


def train_loader(job: Job, split: Split) -> TrainLoader:
    """The project's loader; the bare loop takes its order from it."""
    return TrainLoader(split, global_batch_size=job.config.loop.global_batch_size, seed=job.config.loop.seed)


def fresh_model(job: Job) -> nn.Module:
    """The recipe's network with the weights of its seed."""
    seed_initial_weights(job.config.loop.seed)
    return build_network(job.config, job.info)


def autocast(config: RuntimeConfig, device: torch.device) -> torch.autocast:
    """The context in which the network computes in the configured precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")


def find_device(config: RuntimeConfig) -> torch.device:
    """The device that Accelerate would choose."""
    if config.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
