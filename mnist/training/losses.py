"""Losses: (logits (B, K) float, labels (B,) int64) -> the loss of each sample (B,).

Softmax and sigmoid live here, never in a network, so that every loss fits every network. The engine takes the mean to
train and the sum to evaluate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

LossFn = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-sum_k q_k log softmax(logits)_k with q = one-hot labels, mixed with `label_smoothing` parts of the uniform.

    With q written out: torch's own label smoothing takes twice as many operations, which counts on a GPU.
    """
    if not label_smoothing:
        return F.cross_entropy(logits, labels, reduction="none")
    share = label_smoothing / logits.shape[1]
    targets = torch.full_like(logits, share).scatter_(1, labels.unsqueeze(1), 1 - label_smoothing + share)
    return F.cross_entropy(logits, targets, reduction="none")


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of log-softmax outputs: the same number as cross-entropy, written as sources write it."""
    return F.nll_loss(F.log_softmax(logits, dim=1), labels, reduction="none")


def mse_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error between softmax(logits) and one-hot labels, mean over the classes."""
    return _squared_error(logits.softmax(dim=1), labels)


def mse_sigmoid(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error between sigmoid(logits) and one-hot labels, mean over the classes."""
    return _squared_error(logits.sigmoid(), labels)


def _squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    # Not F.one_hot, which reads the largest label on the host.
    targets = torch.zeros_like(outputs).scatter_(1, labels.unsqueeze(1), 1.0)
    return (outputs - targets).square().mean(dim=1)


LOSSES: dict[str, LossFn] = {
    "cross_entropy": cross_entropy,
    "nll": nll,
    "mse_softmax": mse_softmax,
    "mse_sigmoid": mse_sigmoid,
}


def build_loss(name: str, label_smoothing: float = 0.0) -> LossFn:
    """The per-sample loss called `name`; label smoothing belongs to cross-entropy alone (the config has checked it)."""
    if label_smoothing:
        return partial(cross_entropy, label_smoothing=label_smoothing)
    return LOSSES[name]
