from __future__ import annotations

import pytest
import torch
from torch import nn

from mnist.config import IMAGE_SIZES
from mnist.data.batches import Split
from mnist.models import MODELS, count_parameters
from mnist.plots.architecture import as_table, layer_costs
from mnist.plots.features import activations, filters, find_mistakes, main_activations
from tests.networks import mnist_model

# By hand, layer by layer: outputs x weights per output.
MACS = {
    "convnet": 10 * 24 * 24 * 25 + 20 * 10 * 10 * 90 + 2000 * 500 + 500 * 10,
    "mycnn": 3 * 30 * 30 * 9 + 16 * 15 * 15 * 27 + 32 * 7 * 7 * 144 + 288 * 10,
    "lenet5": 6 * 28 * 28 * 25 + 16 * 10 * 10 * 150 + 400 * 120 + 120 * 84 + 84 * 10,
    "mlp": 784 * 512 + 512 * 256 + 256 * 256 + 256 * 128 + 128 * 64 + 64 * 10,
    "yannet": 32 * 28 * 28 * 25 + 64 * 26 * 26 * 288 + 64 * 11 * 11 * 9 + 8 * 11 * 11 * 64 + 968 * 10,
}
MILLIONS = {"convnet": 1.33, "mycnn": 0.35, "lenet5": 0.42, "yannet": 13.2}  # as stated for the sources


def side(name: str) -> int:
    return IMAGE_SIZES.get(name, 28)


def shape_of(name: str) -> tuple[int, int, int]:
    return 1, side(name), side(name)


def pixels(count: int, size: int = 28) -> torch.Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_walking_the_layers_gives_what_the_network_gives(name: str) -> None:
    model, images = mnist_model(name).train(), pixels(3, side(name))
    state, weights = torch.get_rng_state(), {key: value.clone() for key, value in model.state_dict().items()}
    outputs = activations(model, images)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert next(iter(outputs)) == "input"
    assert torch.equal(outputs["input"], images)
    torch.testing.assert_close(list(outputs.values())[-1], model.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lenet5", "mlp", "yannet"])
def test_every_layer_is_listed_in_the_order_of_the_network(name: str) -> None:
    model = mnist_model(name)
    assert list(activations(model, pixels(1, side(name)))) == ["input", *dict(model.named_children())]


def test_a_residual_network_shows_a_row_for_each_of_its_blocks() -> None:
    shown = main_activations(activations(mnist_model("resnet"), pixels(2)))
    assert list(shown) == [
        "input",
        "conv1 to relu1",
        "block1.conv1 to block1.relu2",
        "block2.conv1 to block2.relu2",
        "block3.conv1 to block3.relu2",
        "pool",
        "linear",
    ]


def test_a_layer_that_works_in_place_leaves_the_output_before_it_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True))
    images = pixels(1)
    before = images.clone()
    outputs = activations(model, images)
    assert torch.equal(images, before)
    assert float(outputs["0"].min()) < 0
    assert float(outputs["1"].min()) == 0


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_layers_adds_up(name: str) -> None:
    model = mnist_model(name)
    layers = layer_costs(model, shape_of(name))
    assert sum(layer.num_params for layer in layers) == count_parameters(model)
    assert layers[0].shape == shape_of(name)
    assert layers[-1].shape == (10,)
    assert model.training


@pytest.mark.parametrize(("name", "macs"), MACS.items())
def test_multiply_accumulates_are_those_counted_by_hand(name: str, macs: int) -> None:
    total = sum(layer.macs for layer in layer_costs(mnist_model(name), shape_of(name)))
    assert total == macs
    if name in MILLIONS:
        assert total / 1e6 == pytest.approx(MILLIONS[name], rel=0.015)


def test_the_table_as_text_has_a_head_and_totals() -> None:
    head, *rows, total = as_table(layer_costs(mnist_model("yannet"), (1, 28, 28)))
    assert head == ("layer", "what it is", "output", "neurons", "parameters", "connections", "MAC")
    conv = "Conv2d(1, 32, kernel_size=5, padding=2)"
    assert ("conv1", conv, "32x28x28", "25,088", "832", "652,288", "627,200") in rows
    assert ("norm2", "BatchNorm2d(64)", "64x26x26", "43,264", "128", "", "") in rows
    assert ("flatten", "Flatten()", "968 units", "968", "", "", "") in rows
    assert ("linear", "Linear(968, 10)", "10 units", "10", "9,690", "9,690", "9,680") in rows
    assert total == ("total", "", "", "", "30,306", "13,305,634", "13,228,560")


def test_the_first_layer_of_lenet5_has_4704_neurons_and_122304_connections() -> None:
    conv1 = layer_costs(mnist_model("lenet5"), (1, 32, 32))[1]
    assert (conv1.name, conv1.neurons, conv1.connections) == ("conv1", 4_704, 122_304)


def test_lenet5_1998_has_the_connections_of_the_paper() -> None:
    rows = {row.name: row for row in layer_costs(mnist_model("lenet5_1998"), (1, 32, 32))}
    c3 = sum(row.connections for name, row in rows.items() if name.startswith("c3."))
    assert (rows["c1"].connections, c3, rows["c5"].connections, rows["f6"].connections) == (
        122_304,
        151_600,
        48_120,
        10_164,
    )
    assert rows["c3"].shape == (16, 10, 10)


def test_a_layer_that_is_called_output_has_its_own_costs() -> None:
    row = layer_costs(mnist_model("lenet5_1998"), (1, 32, 32))[-1]
    assert (row.name, row.description, row.macs) == ("output", "Linear(84, 10)", 840)


class Residual(nn.Module):
    """A skip connection, a layer used twice, and a function after the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.block = Block()
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(4 * 8 * 8, 7)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.block(self.relu(self.conv1(images))))
        return self.linear(x.flatten(1)).log_softmax(dim=1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


def test_a_network_with_a_skip_connection_is_shown_as_it_computes() -> None:
    model, images = Residual(), torch.randn(2, 3, 8, 8)
    outputs = activations(model, images)
    assert list(outputs) == ["input", "conv1", "relu", "block.conv", "block", "relu #2", "linear", "output"]
    assert torch.equal(outputs["output"], model(images))
    assert torch.equal(outputs["block"], outputs["relu"] + outputs["block.conv"])
    assert torch.equal(outputs["relu"], outputs["conv1"].relu())
    assert float(outputs["conv1"].min()) < 0, "the layer in place did not change it"
    layers = layer_costs(model, (3, 8, 8))
    assert sum(layer.num_params for layer in layers) == count_parameters(model)
    assert set(filters(model, (3, 8, 8))) == {"conv1", "block.conv"}
    assert not model.conv1._forward_hooks


def test_what_a_block_computes_after_its_last_layer_belongs_to_its_row() -> None:
    outputs = activations(Residual(), torch.randn(2, 3, 8, 8))
    assert list(main_activations(outputs)) == ["input", "conv1 to relu", "block.conv to relu #2", "linear to output"]


def test_fewer_rows_by_default_one_per_shape_and_no_copies() -> None:
    shown = main_activations(activations(mnist_model("yannet"), pixels(2)))
    assert list(shown) == [
        "input",
        "conv1 to relu1",
        "conv2 to relu2",
        "pool2",
        "depthwise",
        "pointwise to relu3",
        "linear",
    ]
    outputs = activations(mnist_model("mlp"), pixels(1))
    assert list(main_activations(outputs))[:2] == ["input", "linear1 to relu1"]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("convnet", {"conv1": (10, 1, 5, 5), "conv2": (20, 10, 3, 3)}),
        ("yannet", {"conv1": (32, 1, 5, 5), "depthwise": (64, 1, 3, 3)}),
        ("mlp", {"linear1": (512, 1, 28, 28)}),
    ],
)
def test_filters_are_those_that_can_be_looked_at(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    found = {layer: tuple(weight.shape) for layer, weight in filters(mnist_model(name), shape_of(name)).items()}
    assert {layer: found.get(layer) for layer in shapes} == shapes
    assert all(shape[1] * shape[0] <= 256 or layer in ("conv1", "linear1") for layer, shape in found.items())


class Brightness(nn.Module):
    """Takes an image for the class that its first pixel names, the surer the larger its second pixel is."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        named = images[:, 0, 0, 0].long()
        return nn.functional.one_hot(named, 10) * images[:, 0, 0, 1:2]


def test_the_worst_mistakes_come_first() -> None:
    images = torch.zeros(1500, 28, 28, dtype=torch.uint8)
    images[:, 0, 0] = torch.arange(1500).remainder(10)
    images[:, 0, 1] = 9
    labels = torch.arange(1500).remainder(10)
    for index, sureness in ((3, 4), (1203, 7), (44, 2)):
        images[index, 0, 1] = sureness
        labels[index] = 9
    split = Split(images, labels)
    wrong, predicted, confidences = find_mistakes(Brightness(), lambda batch: batch.unsqueeze(1).float(), split)
    assert wrong.tolist() == [1203, 3, 44]
    assert predicted[wrong].tolist() == [3, 3, 4]
    expected = [torch.tensor([float(sure), *[0.0] * 9]).softmax(0)[0].item() for sure in (7, 4, 2)]
    assert confidences[wrong].tolist() == pytest.approx(expected)


def test_a_model_without_mistakes_has_none() -> None:
    split = Split(torch.full((20, 28, 28), 5, dtype=torch.uint8), torch.full((20,), 5))
    wrong, predicted, _ = find_mistakes(Brightness(), lambda batch: batch.unsqueeze(1).float(), split)
    assert (len(wrong), predicted.tolist()) == (0, [5] * 20)
