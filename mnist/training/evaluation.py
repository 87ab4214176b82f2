"""Evaluation: every image of a split scored once, by rank 0 or by all ranks, with the same counts.

In: the bare model and a split. Out: `Scores`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mnist.data.batches import Split
from mnist.training.metrics import METRICS, Scores, add_to_confusion
from mnist.training.step import sum_dtype

EVAL_CHUNK = 1000  # images; fixed, so that every mode and world size shows a kernel the same batches


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    *,
    num_classes: int,
    accelerator: Accelerator,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    transform: Callable[[Tensor], Tensor],
    sharded: bool = False,
    after_chunk: Callable[[], object] = lambda: None,
) -> Scores:
    """Scores `model` on every image of `split`, each exactly once. Every rank must call this; all get the result.

    Args:
        model: the bare module: a DDP wrapper would wait for other ranks in its forward pass (accelerate#3861).
        split: images uint8 (N, H, W) or (N, C, H, W), labels int64 (N,).
        num_classes: K, of the logits.
        accelerator: to reduce over ranks.
        loss_fn: (logits, labels) -> (B,).
        transform: pixels -> network input.
        sharded: every rank scores a share of the chunks; else rank 0 scores all, and the others wait.
        after_chunk: called after each chunk that this rank has scored.

    Returns:
        The same counts in both modes and on any number of ranks, and the same loss to the last bit: sums are kept per
        chunk, reduced once (adding zeros is exact), and added up in the order of the chunks.
    """
    num_chunks = math.ceil(len(split) / EVAL_CHUNK)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    mine = range(rank, num_chunks, world_size) if sharded else range(num_chunks if rank == 0 else 0)
    zeros = partial(torch.zeros, dtype=sum_dtype(split.images.device), device=split.images.device)
    totals, confusion = zeros(len(METRICS), num_chunks), zeros(num_classes**2)
    if sharded and world_size > 1:
        _broadcast_buffers(model)
    was_training = model.training
    model.eval()
    for chunk in mine:
        batch = split[chunk * EVAL_CHUNK : (chunk + 1) * EVAL_CHUNK]
        logits = model(transform(batch.images))
        loss_sum = loss_fn(logits, batch.labels).sum()
        for row, metric in zip(totals, METRICS.values(), strict=True):
            row[chunk] = metric(loss_sum, logits, batch.labels)
        add_to_confusion(confusion, logits, batch.labels)
        after_chunk()
    model.train(was_training)
    return _add_up(accelerator, totals, confusion, num_samples=len(split))


def _add_up(accelerator: Accelerator, totals: Tensor, confusion: Tensor, num_samples: int) -> Scores:
    """Adds up the sums (metrics, chunks) and counts (K * K,) of all ranks; a RuntimeError where images are missing."""
    sums = accelerator.reduce(torch.cat([totals.flatten(), confusion]), reduction="sum").cpu().double()
    rows, counts = sums.split([totals.numel(), confusion.numel()])
    sum_of = {name: math.fsum(row) for name, row in zip(METRICS, rows.view_as(totals).tolist(), strict=True)}
    num_classes = math.isqrt(confusion.numel())
    scores = Scores.from_sums(sum_of, counts.round().long().view(num_classes, num_classes))
    if scores.num_samples != num_samples:
        raise RuntimeError(f"scored {scores.num_samples} of {num_samples} samples")
    return scores


def _broadcast_buffers(model: nn.Module) -> None:
    """Gives every rank the buffers of rank 0: after the last step batch-norm statistics differ by one update."""
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, src=0)
