import inspect
import re
from typing import get_args

import pytest
import torch
from torch import nn

from mnist.config import IMAGE_SIZES, Model
from mnist.errors import UserError
from mnist.models import (
    MODELS,
    Ensemble,
    ResidualBlock,
    ScaledTanh,
    TrainablePooling,
    build_model,
    count_parameters,
    seed_initial_weights,
)
from tests.networks import mnist_model

PARAMETERS = {
    "convnet": 1_007_590,
    "mycnn": 8_110,
    "lenet5": 61_706,
    "lenet5_classic": 61_706,
    "lenet5_1998": 60_850,
    "mlp": 640_842,
    "mlp_sigmoid": 575_050,
    "yannet": 30_306,
    "resnet": 78_010,
}
MILLION_MACS = {"convnet": 1.33, "mycnn": 0.35, "lenet5": 0.42, "lenet5_classic": 0.42, "yannet": 13.2, "resnet": 2.6}


def images(name, batch_size=2):
    side = IMAGE_SIZES.get(name, 28)
    return torch.randn(batch_size, 1, side, side, generator=torch.Generator().manual_seed(0))


def layer_outputs(name):
    model = mnist_model(name).eval()
    outputs = {}
    for layer_name, layer in model.named_modules():
        layer.register_forward_hook(lambda _, __, output, layer_name=layer_name: outputs.update({layer_name: output}))
    model(images(name))
    return model, outputs


def commented_shapes(name):
    lines = inspect.getsource(MODELS[name]).splitlines()
    found = (re.search(r"^\s+(\w+)=[\w.]+\(.*# .*-> ([\dx]+)$", line) for line in lines)
    return {match[1]: tuple(map(int, match[2].split("x"))) for match in found if match}


def multiply_accumulates(name):
    model, outputs = layer_outputs(name)
    layers = dict(model.named_modules())
    return sum(
        output[0].numel() * layers[name].weight[0].numel()
        for name, output in outputs.items()
        if isinstance(layers.get(name), (nn.Conv2d, nn.Linear))
    )


def test_the_configuration_lists_the_same_models():
    assert list(MODELS) == list(get_args(Model))


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_a_network_has_as_many_parameters_as_its_source(name, expected):
    assert count_parameters(mnist_model(name)) == expected


@pytest.mark.parametrize("name", [name for name in MODELS if "parameters" in (MODELS[name].__doc__ or "")])
def test_a_docstring_states_the_number_of_parameters(name):
    assert f"{count_parameters(mnist_model(name)):,} parameters" in MODELS[name].__doc__


@pytest.mark.parametrize(("name", "millions"), MILLION_MACS.items())
def test_a_network_costs_as_many_multiply_accumulates_as_its_source(name, millions):
    assert multiply_accumulates(name) / 1e6 == pytest.approx(millions, rel=0.015)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_raw_and_one_row_per_image(name):
    logits = mnist_model(name).eval()(images(name))
    assert logits.shape == (2, 10)
    assert logits.dtype == torch.float32
    assert not torch.allclose(logits.sum(dim=1), torch.ones(2)), "softmax belongs to the loss"
    assert not torch.allclose(logits.logsumexp(dim=1), torch.zeros(2)), "log-softmax belongs to the loss"


@pytest.mark.parametrize("name", MODELS)
def test_a_network_follows_the_channels_and_the_classes_of_the_data_set(name):
    size = IMAGE_SIZES.get(name, 40)
    model = build_model(name, 3, size, 47).eval()
    assert model(torch.randn(2, 3, size, size)).shape == (2, 47)


def is_large_enough(name, size):
    """Whether torch's own layers, before the first linear one, leave something of an image of that size."""
    layers = list(mnist_model(name).eval())
    convolutions = nn.Sequential(*layers[: [isinstance(layer, nn.Flatten) for layer in layers].index(True)])
    try:
        return convolutions(torch.randn(1, 1, size, size)).numel() > 0
    except RuntimeError:
        return False


@pytest.mark.parametrize("name", ["convnet", "mycnn", "yannet", "fastnet", "vggnet", "tinynet"])
def test_an_image_that_is_too_small_is_one_line(name):
    least = next(size for size in range(1, 29) if is_large_enough(name, size))
    assert build_model(name, 1, least, 10).eval()(torch.randn(2, 1, least, least)).shape == (2, 10)
    for size in range(1, least):
        with pytest.raises(UserError, match=f"^--image-size {size}: too small for this network"):
            build_model(name, 1, size, 10)


@pytest.mark.parametrize("name", [name for name in MODELS if commented_shapes(name)])
def test_the_shapes_in_the_comments_are_the_shapes(name):
    _, outputs = layer_outputs(name)
    expected = commented_shapes(name)
    assert {layer: tuple(outputs[layer].shape[1:]) for layer in expected} == expected


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("convnet", "pool1", (10, 12, 12)),
        ("convnet", "relu2", (20, 10, 10)),
        ("convnet", "flatten", (2000,)),
        ("mycnn", "pool1", (3, 15, 15)),
        ("mycnn", "pool2", (16, 7, 7)),
        ("mycnn", "pool3", (32, 3, 3)),
        ("mycnn", "flatten", (288,)),
        ("lenet5", "flatten", (400,)),
        ("lenet5_classic", "flatten", (400,)),
        ("yannet", "pool2", (64, 13, 13)),
        ("yannet", "relu3", (8, 11, 11)),
        ("yannet", "flatten", (968,)),
        ("vggnet", "pool4", (64, 6, 6)),
        ("vggnet", "relu6", (128, 4, 4)),
    ],
)
def test_feature_maps_have_the_shape_of_the_source(name, layer, shape):
    _, outputs = layer_outputs(name)
    assert tuple(outputs[layer].shape[1:]) == shape


@pytest.mark.parametrize(
    ("name", "widths"),
    [("mlp", [784, 512, 256, 256, 128, 64, 10]), ("mlp_sigmoid", [784, 512, 256, 128, 64, 10])],
)
def test_perceptrons_have_the_widths_of_the_source(name, widths):
    linear = [layer for layer in mnist_model(name) if isinstance(layer, nn.Linear)]
    assert [linear[0].in_features, *(layer.out_features for layer in linear)] == widths


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("lenet5", nn.ReLU, 3),
        ("lenet5", nn.MaxPool2d, 2),
        ("lenet5_classic", nn.Sigmoid, 4),
        ("lenet5_classic", nn.AvgPool2d, 2),
        ("mycnn", nn.LeakyReLU, 3),
        ("yannet", nn.Dropout, 1),
        ("mlp", nn.ReLU, 5),
    ],
)
def test_networks_differ_where_their_sources_do(name, kind, count):
    assert sum(isinstance(layer, kind) for layer in mnist_model(name)) == count


def test_layers_of_lenet5_1998_have_the_trainable_numbers_of_the_paper():
    model = mnist_model("lenet5_1998")
    sizes = {name: count_parameters(layer) for name, layer in model.named_children() if list(layer.parameters())}
    assert sizes == {"c1": 156, "s2": 12, "c3": 1516, "s4": 32, "c5": 48_120, "f6": 10_164, "output": 850}


def test_maps_of_c3_see_the_maps_of_table_1():
    rows = [
        "X...XXX..XXXX.XX",
        "XX...XXX..XXXX.X",
        "XXX...XXX..X.XXX",
        ".XXX..XXXX..X.XX",
        "..XXX..XXXX.XX.X",
        "...XXX..XXXX.XXX",
    ]
    c3 = mnist_model("lenet5_1998").c3
    maps = torch.randn(1, 6, 14, 14, generator=torch.Generator().manual_seed(0))
    before = c3(maps)
    for number, row in enumerate(rows):
        changed = maps.clone()
        changed[:, number] += 1
        differs = (c3(changed) != before).flatten(2).any(dim=2)[0]
        assert "".join("X" if d else "." for d in differs) == row, number


def test_trainable_pooling_begins_as_the_mean_of_four_pixels():
    pooling = TrainablePooling(6)
    maps = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(pooling(maps), nn.functional.avg_pool2d(maps, 2))
    with torch.no_grad():
        pooling.weight[3], pooling.bias[3] = 2.0, 0.5
    assert torch.allclose(pooling(maps)[:, 3], 8 * nn.functional.avg_pool2d(maps, 2)[:, 3] + 0.5, atol=1e-5)


def test_the_squashing_function_of_1998_keeps_one_and_minus_one():
    assert torch.allclose(ScaledTanh()(torch.tensor([-1.0, 0.0, 1.0])), torch.tensor([-1.0, 0.0, 1.0]), atol=1e-4)


def test_a_residual_block_adds_its_input_to_what_it_computes():
    block = ResidualBlock(4, 4, stride=1).eval()
    maps = torch.randn(2, 4, 7, 7)
    with torch.no_grad():
        block.norm2.weight.zero_()
    assert torch.equal(block(maps), maps.relu())


@pytest.mark.parametrize(("channels", "stride"), [(4, 2), (8, 1), (8, 2)])
def test_the_shortcut_of_a_residual_block_follows_its_shape(channels, stride):
    block = ResidualBlock(4, channels, stride).eval()
    maps = torch.randn(2, 4, 7, 7)
    with torch.no_grad():
        block.norm2.weight.zero_()
    expected = nn.functional.conv2d(maps, block.shortcut.conv.weight, stride=stride).relu()
    torch.testing.assert_close(block(maps), expected, rtol=1e-4, atol=1e-5)


def test_slopes_and_dropout_are_those_of_the_source():
    slopes = {layer.negative_slope for layer in mnist_model("mycnn") if isinstance(layer, nn.LeakyReLU)}
    rates = [layer.p for layer in mnist_model("yannet") if isinstance(layer, nn.Dropout)]
    assert (slopes, rates) == ({0.2}, [0.2])


@pytest.mark.parametrize("name", MODELS)
def test_initial_weights_follow_from_the_seed(name):
    seed_initial_weights(1)
    first = mnist_model(name).state_dict()
    seed_initial_weights(1)
    again = mnist_model(name).state_dict()
    seed_initial_weights(2)
    other = mnist_model(name).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_takes_part(name):
    model = mnist_model(name)
    model(images(name)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_convolutions_lie_in_memory_with_channels_last(name):
    weights = [layer.weight for layer in mnist_model(name).modules() if isinstance(layer, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def small_ensemble():
    torch.manual_seed(0)
    return Ensemble(nn.Sequential(nn.Flatten(), nn.Linear(9, 4)) for _ in range(3))


def test_a_ensemble_predicts_the_mean_of_its_members_logits():
    ensemble = small_ensemble().eval()
    batch = torch.randn(7, 1, 3, 3)
    expected = sum(member(batch) for member in ensemble.members) / 3
    torch.testing.assert_close(ensemble(batch), expected)


def test_each_member_of_a_ensemble_learns_from_its_own_share_of_a_batch():
    ensemble, alone = small_ensemble(), small_ensemble()
    batch, labels = torch.randn(8, 1, 3, 3), torch.arange(8) % 4
    nn.functional.cross_entropy(ensemble(batch), labels, reduction="sum").backward()
    for member, twin, share in zip(ensemble.members, alone.members, ([0, 1, 2], [3, 4, 5], [6, 7]), strict=True):
        nn.functional.cross_entropy(twin(batch[share]), labels[share], reduction="sum").backward()
        torch.testing.assert_close(member[1].weight.grad, twin[1].weight.grad)


def test_a_batch_smaller_than_a_ensemble_goes_to_every_member():
    ensemble = small_ensemble()
    ensemble(torch.randn(2, 1, 3, 3)).sum().backward()
    assert all(member[1].weight.grad.abs().sum() > 0 for member in ensemble.members)
