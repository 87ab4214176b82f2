from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from mnist.config import evolve
from mnist.recipes import RECIPES
from mnist.training.build import build_train_step
from tests.networks import INFO, mnist_model


def bare_model(num_processes: int, *, sync_bn: bool, communicates: bool = True) -> nn.Module:
    """The network of `fast` as it is built for so many processes, on a stand-in for an accelerator."""
    stand_in = SimpleNamespace(
        num_processes=num_processes,
        process_index=0,
        device=torch.device("cpu"),
        scaler=None,
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO)),
        prepare_model=lambda model, **_: model,
    )
    config = evolve(RECIPES["fast"](), sync_bn=sync_bn)
    accelerator = cast("Accelerator", stand_in)
    return build_train_step(config, accelerator, INFO, communicates=communicates).bare_model


@pytest.mark.parametrize(
    ("num_processes", "options", "expected"),
    [
        (2, {"sync_bn": True}, 3),
        (2, {"sync_bn": False}, 0),
        (1, {"sync_bn": True}, 0),
        (2, {"sync_bn": True, "communicates": False}, 0),
    ],
)
def test_batch_norm_is_synchronised_where_it_is_asked_for_and_there_are_several_processes(
    num_processes: int, options: dict[str, bool], expected: int
) -> None:
    model = bare_model(num_processes, **options)
    assert sum(isinstance(layer, nn.SyncBatchNorm) for layer in model) == expected  # type: ignore[attr-defined]
    assert sum(isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm) for layer in model) == 3  # type: ignore[attr-defined]


def test_synchronised_batch_norm_changes_neither_first_weights_nor_names_nor_evaluation() -> None:
    plain, synchronised = bare_model(2, sync_bn=False), bare_model(2, sync_bn=True)
    theirs, ours = plain.state_dict(), synchronised.state_dict()
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    exported = mnist_model("fastnet")
    exported.load_state_dict(ours)
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exported.eval()(images), synchronised.eval()(images))
