"""The networks: float images (B, C, S, S) -> raw logits (B, K), of C channels, S pixels a side and K classes.

Most are an `nn.Sequential` with named layers, which reads like the table in a paper; any `nn.Module` will do. Shapes in
the comments, and numbers of parameters, are those of MNIST: one image, channels x height x width, ten classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from mnist.errors import UserError
from mnist.seeding import derive_seed

Builder = Callable[[int, int, int], nn.Module]  # from in_channels, image_size and num_classes


def _sequential(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _flat_size(image_size: int, channels: int, side: int) -> int:
    """Numbers in `channels` maps of `side` pixels a side, which an image of `image_size` becomes.

    Raises:
        UserError: the image is so small that nothing is left of the maps.
    """
    if side < 1:
        raise UserError(f"--image-size {image_size}: too small for this network, nothing is left of its last maps")
    return channels * side**2


def convnet(in_channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """Two convolutions and a wide linear layer; 1,007,590 parameters, 1.33 M multiply-accumulates per image.

    Source: dwgan/MNIST-PyTorch.
    """
    flat_size = _flat_size(image_size, 20, (image_size - 4) // 2 - 2)
    return _sequential(
        conv1=nn.Conv2d(in_channels, 10, kernel_size=5),  # 1x28x28 -> 10x24x24
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),  # -> 10x12x12
        conv2=nn.Conv2d(10, 20, kernel_size=3),  # -> 20x10x10
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),  # -> 2000
        linear1=nn.Linear(flat_size, 500),
        relu3=nn.ReLU(),
        linear2=nn.Linear(500, num_classes),
    )


def mycnn(in_channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """Three small blocks of convolution, batch norm, leaky ReLU, pooling; 8,110 parameters, 0.35 M.

    Source: sivanWu0222/PyTorchDL.
    """
    flat_size = _flat_size(image_size, 32, (image_size + 2) // 8)
    return _sequential(
        conv1=nn.Conv2d(in_channels, 3, kernel_size=3, padding=2),  # 1x28x28 -> 3x30x30
        norm1=nn.BatchNorm2d(3),
        relu1=nn.LeakyReLU(0.2),
        pool1=nn.MaxPool2d(2),  # -> 3x15x15
        conv2=nn.Conv2d(3, 16, kernel_size=3, padding=1),  # -> 16x15x15
        norm2=nn.BatchNorm2d(16),
        relu2=nn.LeakyReLU(0.2),
        pool2=nn.MaxPool2d(2),  # -> 16x7x7
        conv3=nn.Conv2d(16, 32, kernel_size=3, padding=1),  # -> 32x7x7
        norm3=nn.BatchNorm2d(32),
        relu3=nn.LeakyReLU(0.2),
        pool3=nn.MaxPool2d(2),  # -> 32x3x3
        flatten=nn.Flatten(),  # -> 288
        linear=nn.Linear(flat_size, num_classes),
    )


def lenet5(in_channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """LeNet-5 with ReLU and max pooling on 32x32 images; 61,706 parameters, 0.42 M.

    As in the source's code there is no ReLU after the second convolution (its text puts one there).

    Source: coursework "LeNet-5 on MNIST"; LeCun et al. 1998.
    """
    flat_size = _flat_size(image_size, 16, ((image_size - 4) // 2 - 4) // 2)
    return _sequential(
        conv1=nn.Conv2d(in_channels, 6, kernel_size=5),  # 1x32x32 -> 6x28x28
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),  # -> 6x14x14
        conv2=nn.Conv2d(6, 16, kernel_size=5),  # -> 16x10x10
        pool2=nn.MaxPool2d(2),  # -> 16x5x5
        flatten=nn.Flatten(),  # -> 400
        linear1=nn.Linear(flat_size, 120),
        relu3=nn.ReLU(),
        linear2=nn.Linear(120, 84),
        relu4=nn.ReLU(),
        linear3=nn.Linear(84, num_classes),
    )


def lenet5_classic(in_channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """LeNet-5 as first taught: sigmoid everywhere, average pooling; the same 61,706 parameters.

    Source: the baseline of the same coursework.
    """
    flat_size = _flat_size(image_size, 16, ((image_size - 4) // 2 - 4) // 2)
    return _sequential(
        conv1=nn.Conv2d(in_channels, 6, kernel_size=5),  # 1x32x32 -> 6x28x28
        sigmoid1=nn.Sigmoid(),
        pool1=nn.AvgPool2d(2),  # -> 6x14x14
        conv2=nn.Conv2d(6, 16, kernel_size=5),  # -> 16x10x10
        sigmoid2=nn.Sigmoid(),
        pool2=nn.AvgPool2d(2),  # -> 16x5x5
        flatten=nn.Flatten(),  # -> 400
        linear1=nn.Linear(flat_size, 120),
        sigmoid3=nn.Sigmoid(),
        linear2=nn.Linear(120, 84),
        sigmoid4=nn.Sigmoid(),
        linear3=nn.Linear(84, num_classes),
    )


class ScaledTanh(nn.Module):
    """The squashing function of the paper of 1998: 1.7159 tanh(2/3 x), which maps 1 to 1 and -1 to -1."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return 1.7159 * torch.tanh(x * (2 / 3))


class TrainablePooling(nn.Module):
    """Sums of 2x2 pixels, times a weight, plus a bias, both learnt per map; starts as the mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1), 0.25))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        sums = 4 * functional.avg_pool2d(maps, 2)  # to the last bit; torch.onnx forgets a divisor_override of 1
        return sums * self.weight + self.bias


_C3_INPUTS = {  # the maps that each group of maps of C3 sees, one map of the group after the other
    "three": [(first + i) % 6 for first in range(6) for i in range(3)],
    "four": [(first + i) % 6 for first in range(6) for i in range(4)],
    "apart": [0, 1, 3, 4, 1, 2, 4, 5, 0, 2, 3, 5],
    "six": [0, 1, 2, 3, 4, 5],
}


class PartialConvolution(nn.Module):
    """C3 of LeNet-5: 16 maps, of which each sees 3, 4 or 6 of the 6 maps before it (table I of the paper)."""

    def __init__(self) -> None:
        super().__init__()
        for (name, inputs), num_maps in zip(_C3_INPUTS.items(), (6, 6, 3, 1), strict=True):
            self.add_module(name, nn.Conv2d(len(inputs), num_maps, kernel_size=5, groups=num_maps))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, 6, H, W) -> (B, 16, H-4, W-4)."""
        planes = maps.split(1, dim=1)
        seen = (torch.cat([planes[i] for i in inputs], dim=1) for inputs in _C3_INPUTS.values())
        return torch.cat([convolve(x) for convolve, x in zip(self.children(), seen, strict=True)], dim=1)


def lenet5_1998(in_channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """LeNet-5 as it was in 1998; 60,850 parameters, 0.33 M.

    Partial connections, trainable pooling, and 120 maps of one pixel. Only the output differs: a linear layer, whose
    softmax is in the loss, where the paper has distances to drawings of the digits (RBF units).

    Source: LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition, section II.B.
    """
    flat_size = _flat_size(image_size, 120, ((image_size - 4) // 2 - 4) // 2 - 4)
    return _sequential(
        c1=nn.Conv2d(in_channels, 6, kernel_size=5),  # 1x32x32 -> 6x28x28
        tanh1=ScaledTanh(),
        s2=TrainablePooling(6),  # -> 6x14x14
        tanh2=ScaledTanh(),
        c3=PartialConvolution(),  # -> 16x10x10
        tanh3=ScaledTanh(),
        s4=TrainablePooling(16),  # -> 16x5x5
        tanh4=ScaledTanh(),
        c5=nn.Conv2d(16, 120, kernel_size=5),  # -> 120x1x1
        tanh5=ScaledTanh(),
        flatten=nn.Flatten(),  # -> 120
        f6=nn.Linear(flat_size, 84),
        tanh6=ScaledTanh(),
        output=nn.Linear(84, num_classes),
    )


def _perceptron(widths: Sequence[int]) -> nn.Sequential:
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for i, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
        layers[f"linear{i}"] = nn.Linear(fan_in, fan_out)
        layers[f"relu{i}"] = nn.ReLU()
    del layers[f"relu{len(widths) - 1}"]  # logits stay raw
    return _sequential(**layers)


def mlp(in_channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """Six linear layers with ReLU between them; 640,842 parameters.

    Source: "handwritten digit recognition" tutorial; its softmax belongs to the loss here.
    """
    return _perceptron([in_channels * image_size**2, 512, 256, 256, 128, 64, num_classes])


def mlp_sigmoid(in_channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """Five linear layers with ReLU between them; 575,050 parameters.

    Source: the shorter network in the same tutorial; its final sigmoid belongs to the loss here.
    """
    return _perceptron([in_channels * image_size**2, 512, 256, 128, 64, num_classes])


def yannet(in_channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """A wide first half, then a depthwise-separable convolution; 30,306 parameters, 13.2 M.

    Source: mousecpn/MachineLearning_HW_CQUT, HW2.
    """
    flat_size = _flat_size(image_size, 8, (image_size - 2) // 2 - 2)
    return _sequential(
        conv1=nn.Conv2d(in_channels, 32, kernel_size=5, padding=2),  # 1x28x28 -> 32x28x28
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(32, 64, kernel_size=3),  # -> 64x26x26
        norm2=nn.BatchNorm2d(64),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),  # -> 64x13x13
        depthwise=nn.Conv2d(64, 64, kernel_size=3, groups=64),  # -> 64x11x11
        pointwise=nn.Conv2d(64, 8, kernel_size=1),  # -> 8x11x11
        relu3=nn.ReLU(),
        flatten=nn.Flatten(),  # -> 968
        dropout=nn.Dropout(0.2),
        linear=nn.Linear(flat_size, num_classes),
    )


def _three_convolutions(
    in_channels: int, image_size: int, num_classes: int, *, widths: tuple[int, int, int], is_strided: bool
) -> nn.Sequential:
    """Three convolutions with batch norm, and a linear layer.

    The first has a stride of 2, or a pooling after it: four times as many positions, and better for it.
    """
    first, second, third = widths
    halved = (image_size - 5) // 2 + 1 if is_strided else (image_size - 4) // 2
    flat_size = _flat_size(image_size, third, (halved - 2) // 2 - 2)
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(in_channels, first, kernel_size=5, stride=2 if is_strided else 1, bias=False),
        "pool1": nn.MaxPool2d(2),  # 1x28x28 -> first x 12x12
        "norm1": nn.BatchNorm2d(first),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(first, second, kernel_size=3, bias=False),  # -> second x 10x10
        "pool2": nn.MaxPool2d(2),  # -> second x 5x5
        "norm2": nn.BatchNorm2d(second),
        "relu2": nn.ReLU(),
        "conv3": nn.Conv2d(second, third, kernel_size=3, bias=False),  # -> third x 3x3
        "norm3": nn.BatchNorm2d(third),
        "relu3": nn.ReLU(),
        "flatten": nn.Flatten(),  # -> 9 third
        "linear": nn.Linear(flat_size, num_classes),
    }
    if is_strided:
        del layers["pool1"]
    return _sequential(**layers)


def fastnet(in_channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """The network of `fast`; 17,882 parameters, 0.38 M.

    A strided first convolution keeps large maps out of it, and few channels keep it small enough for two CPU cores.
    """
    return _three_convolutions(in_channels, image_size, num_classes, widths=(16, 16, 64), is_strided=True)


def poolnet(in_channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """The network of `balanced`; 23,658 parameters, 0.71 M: pooled where `fastnet` has a stride."""
    return _three_convolutions(in_channels, image_size, num_classes, widths=(16, 24, 64), is_strided=False)


def poolnet_deep(in_channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """A member of `ensemble`; 109,178 parameters, 1.8 M: wider than `poolnet`, with a fourth convolution."""
    flat_size = _flat_size(image_size, 128, ((image_size - 4) // 2 - 2) // 2 - 2)
    return _sequential(
        conv1=nn.Conv2d(in_channels, 16, kernel_size=5, bias=False),  # 1x28x28 -> 16x24x24
        pool1=nn.MaxPool2d(2),  # -> 16x12x12
        norm1=nn.BatchNorm2d(16),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(16, 32, kernel_size=3, bias=False),  # -> 32x10x10
        pool2=nn.MaxPool2d(2),  # -> 32x5x5
        norm2=nn.BatchNorm2d(32),
        relu2=nn.ReLU(),
        conv3=nn.Conv2d(32, 64, kernel_size=3, padding=1, bias=False),  # -> 64x5x5
        norm3=nn.BatchNorm2d(64),
        relu3=nn.ReLU(),
        conv4=nn.Conv2d(64, 128, kernel_size=3, bias=False),  # -> 128x3x3
        norm4=nn.BatchNorm2d(128),
        relu4=nn.ReLU(),
        flatten=nn.Flatten(),  # -> 1152
        linear=nn.Linear(flat_size, num_classes),
    )


class Ensemble(nn.Module):
    """Networks of one kind, each trained on a share of every batch; together they predict the mean of their logits.

    With a global batch as many times larger, each member learns as it would alone: from other images in each step than
    the others, and from initial weights of its own. Which images those are depends on the number of processes and
    micro-batches, as the statistics of batch norm do.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, K): in training the logits of one member for each image, else the mean of all members.

        A training batch that is too small to be shared goes to every member.
        """
        if self.training and len(images) >= len(self.members):
            shares = images.tensor_split(len(self.members))
            return torch.cat([member(share) for member, share in zip(self.members, shares, strict=True)])
        return torch.stack([member(images) for member in self.members]).mean(dim=0)


def ensemble(in_channels: int, image_size: int, num_classes: int) -> Ensemble:
    """The network of `thorough`: two `poolnet_deep`; 218,356 parameters, 3.7 M to predict."""
    return Ensemble(poolnet_deep(in_channels, image_size, num_classes) for _ in range(2))


def vggnet(in_channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """The network of `strong`; 307,370 parameters, 18 M: pairs of 3x3 convolutions, two of them pooled.

    Source: built as in Simonyan, Zisserman 2015 (arXiv:1409.1556), with batch norm.
    """
    layers: dict[str, nn.Module] = {}
    # 1x28x28 -> 32x26x26 -> 32x24x24, pooled 32x12x12 -> 64x12x12 -> 64x12x12, pooled 64x6x6 -> 128x6x6 -> 128x4x4
    channels, paddings = [in_channels, 32, 32, 64, 64, 128, 128], [0, 0, 1, 1, 1, 0]
    for i, ((channels_in, channels_out), padding) in enumerate(zip(pairwise(channels), paddings, strict=True), start=1):
        layers[f"conv{i}"] = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=padding, bias=False)
        layers[f"norm{i}"] = nn.BatchNorm2d(channels_out)
        layers[f"relu{i}"] = nn.ReLU()
        if i in (2, 4):
            layers[f"pool{i}"] = nn.MaxPool2d(2)
    flat_size = _flat_size(image_size, 128, (image_size - 4) // 2 // 2 - 2)
    return _sequential(**layers, flatten=nn.Flatten(), linear=nn.Linear(flat_size, num_classes))


def vggnet_ensemble(in_channels: int, image_size: int, num_classes: int) -> Ensemble:
    """The network of `accurate`: three `vggnet`; 922,110 parameters, 54 M to predict."""
    return Ensemble(vggnet(in_channels, image_size, num_classes) for _ in range(3))


def tinynet(in_channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """The network of `smoke`: small enough for a few seconds on one core."""
    flat_size = _flat_size(image_size, 16, ((image_size - 5) // 2 + 1 - 2) // 2)
    return _sequential(
        conv1=nn.Conv2d(in_channels, 8, kernel_size=5, stride=2),  # 1x28x28 -> 8x12x12
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(8, 16, kernel_size=3),  # -> 16x10x10
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),  # -> 16x5x5
        flatten=nn.Flatten(),  # -> 400
        linear1=nn.Linear(flat_size, 32),
        relu3=nn.ReLU(),
        linear2=nn.Linear(32, num_classes),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, and beside them a shortcut: the input itself, or a 1x1 convolution of it."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels_in != channels_out:
            self.shortcut = _sequential(
                conv=nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False),
                norm=nn.BatchNorm2d(channels_out),
            )
        self.relu2 = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, channels_out, H / stride, W / stride), rounded up."""
        changed = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(maps)))))
        return self.relu2(changed + self.shortcut(maps))  # type: ignore[no-any-return]


def resnet(in_channels: int, image_size: int, num_classes: int) -> nn.Sequential:  # noqa: ARG001 (takes any size)
    """A residual network of eight layers; 78,010 parameters, 2.6 M.

    Source: He, Zhang, Ren, Sun 2016 (arXiv:1512.03385), section 4.2, with n = 1. There the first convolution is 3x3
    without a stride, which costs four times as much.
    """
    return _sequential(
        conv1=nn.Conv2d(in_channels, 16, kernel_size=5, stride=2, padding=2, bias=False),  # 1x28x28 -> 16x14x14
        norm1=nn.BatchNorm2d(16),
        relu1=nn.ReLU(),
        block1=ResidualBlock(16, 16, stride=1),  # -> 16x14x14
        block2=ResidualBlock(16, 32, stride=2),  # -> 32x7x7
        block3=ResidualBlock(32, 64, stride=2),  # -> 64x4x4
        pool=nn.AdaptiveAvgPool2d(1),  # -> 64x1x1
        flatten=nn.Flatten(),  # -> 64
        linear=nn.Linear(64, num_classes),
    )


MODELS: dict[str, Builder] = {
    build.__name__: build
    for build in (
        convnet,
        mycnn,
        lenet5,
        lenet5_classic,
        lenet5_1998,
        mlp,
        mlp_sigmoid,
        yannet,
        fastnet,
        poolnet,
        poolnet_deep,
        ensemble,
        vggnet,
        vggnet_ensemble,
        tinynet,
        resnet,
    )
}


def build_model(name: str, in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """The network called `name` with fresh weights from torch's global random state (seed it first).

    Its weights lie in memory with channels last, which convolutions are faster with, on CPUs and GPUs.

    Raises:
        UserError: the network cannot take images of that size.
    """
    model = MODELS[name](in_channels, image_size, num_classes)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def seed_initial_weights(seed: int) -> None:
    """Fixes the weights that are drawn next, alike on every rank."""
    torch.manual_seed(derive_seed(seed, "weights"))
