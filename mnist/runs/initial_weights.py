"""A new run that begins with the weights of another one (--init-from), which may be of another data set.

In: an exported model. Out: its weights in the network of the run, and where they are from. A resume takes its weights
from the checkpoint and does not come here.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from mnist.errors import UserError
from mnist.runs.export import find_export, load_model
from mnist.runs.setup import RunSetup
from mnist.system import ranks
from mnist.training.loop import InitialWeights

FLAG = "--init-from"


def begin_with_weights(setup: RunSetup) -> None:
    """Loads the weights that --init-from names, if it does. Every rank must call this; rank 0 reads for all.

    Raises:
        UserError: there are none, they are damaged, or they are of another network.
    """
    wanted = setup.config.optim.init_from
    if wanted is None:
        return
    step = setup.train_step
    origin, weights = ranks.together(
        setup.accelerator, lambda: _read(wanted, setup.config.optim.model, step.bare_model)
    )
    for module in (step.bare_model, step.eval_model):
        module.load_state_dict({**module.state_dict(), **weights})
    setup.state.initialised_from = origin


def _read(wanted: str, network: str, model: nn.Module) -> tuple[InitialWeights, dict[str, Tensor]]:
    trained = load_model(find_export(wanted, FLAG), FLAG)
    theirs = trained.config.optim.model
    if theirs != network:
        raise UserError(f"{FLAG} {wanted}: weights of the network {theirs}, not {network}; add --model {theirs}")
    weights = trained.model.state_dict()
    skipped = misfits(weights, model, f"{FLAG} {wanted}")
    fitting = {name: weight for name, weight in weights.items() if name not in skipped}
    return InitialWeights(str(trained.folder.resolve()), trained.sha256, skipped), fitting


def misfits(weights: dict[str, Tensor], model: nn.Module, place: str) -> list[str]:
    """Names of the tensors of the last layer of `model` if its number of classes is not that of `weights`; else none.

    (Of an ensemble, of the last layer of each member.)

    Raises:
        UserError: a tensor of another layer has another shape. The message begins with `place`.
    """
    own = model.state_dict()
    last_layer = _layer_of(list(own)[-1])
    found = [name for name, tensor in own.items() if weights[name].shape != tensor.shape]
    for name in found:
        same_inputs = weights[name].shape[1:] == own[name].shape[1:]
        if _layer_of(name) != last_layer or not same_inputs:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
            raise UserError(f"{place}: {name} has the shape {shapes}; only another number of classes is taken")
    return found


def _layer_of(name: str) -> str:
    """The layer of a tensor; one name for all members of an ensemble."""
    return re.sub(r"\.\d+\.", ".", name.rpartition(".")[0])
