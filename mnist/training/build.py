"""The training step of a configuration: for training, benchmarks and the doctor alike.

In: a configuration, an accelerator and the plan of the run. Out: a `TrainStep`.
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from mnist.config import TrainConfig
from mnist.data.batches import Split, TrainLoader
from mnist.data.sources import DatasetInfo
from mnist.data.transforms import Augmentation, BatchTransform
from mnist.models import build_model, seed_initial_weights
from mnist.system.accelerator import prepare_optimizer
from mnist.training.cuda_graph import reason_not_capturable
from mnist.training.losses import build_loss
from mnist.training.optim import OPTIMIZERS, LearningRate, WeightAverage, build_optimizer
from mnist.training.plan import Plan
from mnist.training.step import TrainStep


def build_train_loader(config: TrainConfig, plan: Plan, split: Split, accelerator: Accelerator) -> TrainLoader:
    """This rank's share of every global batch of `split`."""
    return TrainLoader(
        split,
        global_batch_size=plan.global_batch_size,
        seed=config.loop.seed,
        rank=accelerator.process_index,
        world_size=plan.world_size,
        accumulation_steps=plan.accumulation_steps,
    )


def build_network(config: TrainConfig, info: DatasetInfo) -> nn.Module:
    """The network of a configuration for such images, with fresh weights from torch's global random state."""
    return build_model(config.optim.model, info.in_channels, config.image.image_size, info.num_classes)


def build_train_step(
    config: TrainConfig,
    accelerator: Accelerator,
    info: DatasetInfo,
    plan: Plan | None = None,
    *,
    communicates: bool = True,
) -> TrainStep:
    """The recipe's network with its initial weights, optimizer, schedule and average. Every rank must call this.

    Args:
        config: the recipe.
        accelerator: prepares model and optimizer.
        info: of the data set.
        plan: length of the run and of its epochs, for the schedule. None = a single step, to be timed or tested.
        communicates: false = no DDP around the model: each rank trains a model of its own.
    """
    num_steps, epoch_steps, accumulation_steps = (
        (plan.num_steps, plan.epoch_steps, plan.accumulation_steps) if plan is not None else (1, 1, 1)
    )
    seed_initial_weights(config.loop.seed)
    bare_model = build_network(config, info)
    if config.runtime.sync_bn and communicates and accelerator.num_processes > 1:
        bare_model = nn.SyncBatchNorm.convert_sync_batchnorm(bare_model)  # its state has the same names
    bare_model = bare_model.to(accelerator.device)
    optimizer_class, _ = OPTIMIZERS[config.optim.optimizer]
    reason = reason_not_capturable(accelerator, bare_model, optimizer_class, accumulation_steps)
    capturable = reason is None and config.runtime.step_mode != "eager"
    optimizer = build_optimizer(bare_model.parameters(), config.optim, capturable=capturable)
    optimizer = prepare_optimizer(accelerator, optimizer)
    # Wraps the model, and gives it, in place, the precision of the run. `evaluation_mode` means: without DDP. The model
    # is on its device; to place it, Accelerate would first import distributed tensors and sympy, for 0.4 s.
    model = accelerator.prepare_model(bare_model, device_placement=False, evaluation_mode=not communicates)
    return TrainStep(
        accelerator=accelerator,
        model=model,
        bare_model=bare_model,
        optimizer=optimizer,
        learning_rate=LearningRate(optimizer, config.optim, num_steps, epoch_steps),
        loss_fn=build_loss(config.optim.loss, config.optim.label_smoothing),
        transform=BatchTransform(config.image),
        augment=Augmentation(config.image, config.loop.seed, accelerator.device),
        grad_clip=config.optim.grad_clip,
        average=WeightAverage(bare_model, config.optim.ema) if config.optim.ema else None,
        seed=config.loop.seed,
    )
