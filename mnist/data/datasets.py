"""From files to splits in memory: verify and read; and the digits embedded in the package.

In: the `data` section. Out: `Dataset`, three splits of uint8 images and int64 labels. Deciding (`choose`) is for rank
0, fetching (`fetch`) for one process per node, reading (`read`) for everyone; `load` does all three.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from mnist.config import MNIST_MEAN, MNIST_SIDE, MNIST_STD, DataConfig, DatasetName, TrainConfig, evolve
from mnist.data import folder
from mnist.data.batches import Split
from mnist.data.download import fetch
from mnist.data.idx import read_images, read_labels
from mnist.data.sources import SOURCES, DatasetInfo, Source, find_file
from mnist.errors import UserError
from mnist.system import ranks

DIGITS_FILE = Path(__file__).parent / "assets" / "digits.npz"
NUM_TRAIN_DIGITS = 1437  # of 1,797: in the order of the source, where one writer's digits lie together


@dataclass(frozen=True)
class Choice:
    """Which data set is used, and, where `auto` had to fall back, why."""

    name: str
    fallback_reason: str | None = None


@dataclass(frozen=True)
class Dataset:
    """A data set's splits; `val` is None where nothing is held out.

    Attributes:
        train: holds each training image `train_copies` times, so that an epoch shows it that often.
        fingerprint: 16 digits of each file's sha256; equal on two machines if their data is.
        warnings: what a person must know about the files.
        is_fallback: these are the embedded digits, where `auto` meant MNIST; a warning says why.
    """

    name: str
    train: Split
    val: Split | None
    test: Split
    info: DatasetInfo
    fingerprint: str
    train_copies: int = 1
    warnings: tuple[str, ...] = ()
    is_fallback: bool = False

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return self.info.class_names

    def to(self, device: torch.device) -> Dataset:
        """All splits on `device`."""
        val = None if self.val is None else self.val.to(device)
        return replace(self, train=self.train.to(device), val=val, test=self.test.to(device))


def relocate(config: DataConfig, dataset: DatasetName | None, data_dir: str | None) -> DataConfig:
    """The `data` section of a trained model for this machine: another folder or data set where one is given."""
    name, is_same = dataset or config.dataset, dataset in (None, config.dataset)
    here = None if name == "folder" else os.environ.get("MNIST_DATA_DIR")
    return replace(
        config,
        dataset=name,
        data_dir=data_dir or here or config.data_dir,
        val_size=config.val_size if is_same else 0,
        channels=config.channels if is_same else None,
    )


def load(
    config: DataConfig, accelerator: Accelerator, size: int, show: Callable[[str], object] = lambda _: None
) -> Dataset:
    """The data set of a run, on the device of this rank. Every rank must call this.

    Rank 0 decides what --dataset means, one process a node downloads or decodes what is missing, every rank reads.

    Args:
        config: which data set.
        accelerator: knows the ranks.
        size: side of the network's input, which people's own pictures are brought to.
        show: is told how far the download, or decoding the pictures, is.

    Raises:
        UserError: on all ranks, if any of them has no data, broken data, other data than rank 0, or no room for it.
    """
    choice = ranks.together(accelerator, lambda: choose(config, show))
    ranks.together(accelerator, lambda: _fetch_or_decode(choice.name, config, size, show), on="local_main")
    dataset = ranks.together(
        accelerator, lambda: read(choice.name, config, choice.fallback_reason, size, show), on="all"
    )
    ranks.require_agreement(accelerator, "data files", dataset.fingerprint)
    return ranks.together(accelerator, lambda: _to_device(dataset, accelerator.device), on="all")


def _to_device(dataset: Dataset, device: torch.device) -> Dataset:
    try:
        return dataset.to(device)
    except torch.OutOfMemoryError as error:
        splits = [split for split in (dataset.train, dataset.val, dataset.test) if split is not None]
        size = f"{sum(split.images.nbytes for split in splits) / 1e9:.1f} GB of images"
        raise UserError(
            f"--dataset {dataset.name}: {size} do not fit on {device}; try a smaller --image-size"
        ) from error


def resolve(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """`config` with the name of the data set that was read, and its own mean and std in the place of MNIST's.

    Raises:
        UserError: numbers for other channels than the images have.
    """
    mean, std, num_channels = config.image.mean, config.image.std, dataset.info.in_channels
    if (mean, std) == ((MNIST_MEAN,), (MNIST_STD,)) and not dataset.info.has_digits:
        mean, std = _mean_and_std(dataset.train.images)
    for flag, values in (("--mean", mean), ("--std", std)):
        if len(values) not in (1, num_channels):
            raise UserError(
                f"{flag}: {len(values)} numbers, but the images of {dataset.name} have {num_channels} channels"
            )
    return evolve(config, dataset=dataset.name, mean=mean, std=std)


def _mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of uint8 images (N, H, W) or (N, C, H, W) as numbers in [0, 1], per channel, to four decimals.

    Sums of integers: equal on every machine, so that a run can be resumed on another one.
    """
    means, stds = [], []
    for channel in images.unsqueeze(1).unbind(1) if images.ndim == 3 else images.unbind(1):
        parts = [torch.bincount(part.flatten(), minlength=256) for part in channel.split(10_000)]
        counts, values = torch.stack(parts).sum(dim=0).cpu(), torch.arange(256, dtype=torch.float64) / 255
        shares = counts.double() / counts.sum()
        mean = float(shares @ values)
        means.append(round(mean, 4))
        stds.append(max(round(float(shares @ (values - mean) ** 2) ** 0.5, 4), 0.001))  # images of one colour have none
    return tuple(means), tuple(stds)


def _fetch_or_decode(name: str, config: DataConfig, size: int, show: Callable[[str], object]) -> None:
    if name == "folder":
        folder.prepare(config.data_dir, config.channels or folder.CHANNELS, size, show)
    else:
        fetch(name, config.data_dir, show)


def choose(config: DataConfig, show: Callable[[str], object] = lambda _: None) -> Choice:
    """Decides what `--dataset` means on this machine, and downloads what is missing. Rank 0 calls it for all.

    Raises:
        UserError: the data set was not found and could not be downloaded.
    """
    if config.dataset != "auto":
        fetch(config.dataset, config.data_dir, show)
        return Choice(config.dataset)
    try:
        fetch("mnist", config.data_dir, show)
    except UserError as error:
        return Choice("digits", fallback_reason=str(error).partition("; ")[0].removeprefix("--dataset mnist: "))
    return Choice("mnist")


def read(
    name: str,
    config: DataConfig,
    fallback_reason: str | None = None,
    size: int = MNIST_SIDE,
    show: Callable[[str], object] = lambda _: None,
) -> Dataset:
    """Reads and checks the splits; every rank calls it, once the files are there.

    The validation split is the end of the training set: writers come in blocks, so that a contiguous piece keeps a
    writer's digits on one side.

    Args:
        name: of the data set, not `auto`.
        config: folder and size of the validation split.
        fallback_reason: why `auto` came to the embedded digits, or None.
        size: side of the network's input, which people's own pictures are brought to.
        show: is told how far decoding them is, where the cache does not have them.

    Raises:
        UserError: a file that is broken, or of another kind, or does not fit its partner; or `val_size` too large.
    """
    source = SOURCES[name]
    if name == "folder":
        pictures = folder.read(config.data_dir, config.channels or folder.CHANNELS, size, show)
        train, test, hashes, warnings = pictures.train, pictures.test, [pictures.sha256], pictures.warnings()
        class_names = pictures.class_names
    else:
        train, test, hashes, warnings = _read_digits() if name == "digits" else _read_files(source, config.data_dir)
        class_names = source.class_names
    if config.val_size >= len(train):
        raise UserError(f"--val-size {config.val_size}: must be below the {len(train):,} training images of {name}")
    num_train = len(train) - config.val_size
    if fallback_reason is not None:
        warnings = [f"NOT MNIST: these are the 1,797 embedded digits, because MNIST is {fallback_reason}"]
    return Dataset(
        name=name,
        train=train[:num_train].repeat(source.train_copies),
        val=train[num_train:] if config.val_size else None,
        test=test,
        info=DatasetInfo(test.image_shape, class_names, source.has_digits),
        train_copies=source.train_copies,
        fingerprint=",".join(digest[:16] for digest in hashes),
        warnings=tuple(warnings),
        is_fallback=fallback_reason is not None,
    )


def _read_files(source: Source, data_dir: str) -> tuple[Split, Split, list[str], list[str]]:
    """Both splits, the sha256 of each file, and a warning of each that is not as published."""
    splits, hashes = [], []
    for images_name, labels_name in (source.files[:2], source.files[2:]):
        images_path, labels_path = (find_file(source, data_dir, name) for name in (images_name, labels_name))
        if images_path is None or labels_path is None:
            raise UserError(f"--data-dir {data_dir}: {images_name} or {labels_name} is missing on this node")
        images, images_hash = read_images(images_path)
        labels, labels_hash = read_labels(labels_path)
        split, last = Split(images, labels), len(source.class_names) - 1 + source.first_label
        if split.image_shape != source.image_shape:
            found, expected = ("x".join(map(str, shape)) for shape in (split.image_shape, source.image_shape))
            raise UserError(f"{images_path}: images of {found} (channels, height, width), expected {expected}")
        if len(images) != len(labels):
            raise UserError(
                f"{labels_path}: {len(labels):,} labels for the {len(images):,} images of {images_path.name}"
            )
        for label in (int(labels.min()), int(labels.max())):
            if not source.first_label <= label <= last:
                raise UserError(f"{labels_path}: label {label}, expected {source.first_label} to {last}")
        upright = images.transpose(1, 2).contiguous() if source.is_transposed else images
        splits.append(Split(upright, labels - source.first_label))
        hashes += [images_hash, labels_hash]
    pairs = zip(source.files, source.sha256, hashes, strict=False)  # most data sets have no published sha256
    changed = [file for file, published, found in pairs if published != found]
    warnings = [f"{file} is not the published file (its sha256 differs)" for file in changed]
    return splits[0], splits[1], hashes, warnings


def _read_digits() -> tuple[Split, Split, list[str], list[str]]:
    with np.load(DIGITS_FILE, allow_pickle=False) as archive:
        images, labels = torch.from_numpy(archive["images"]), torch.from_numpy(archive["labels"])
    everything = Split(to_mnist_form(images), labels.long())
    return everything[:NUM_TRAIN_DIGITS], everything[NUM_TRAIN_DIGITS:], ["digits"], []


def to_mnist_form(images: Tensor) -> Tensor:
    """8x8 grey digits in the form of MNIST: 20x20 pixels, centred by mass on a larger page.

    Args:
        images: uint8 (N, 8, 8), 0..16.

    Returns:
        uint8 (N, H, W), 0..255, with the sides that the table says.
    """
    grey = images.unsqueeze(1).float() * (255 / 16)
    box = F.interpolate(grey, size=20, mode="bicubic", align_corners=False).clamp(0, 255)
    side = SOURCES["digits"].image_shape[-1]
    padded = F.pad(box, [(side - 20) // 2] * 4).squeeze(1)
    pixels, middle = torch.arange(float(side)), side // 2  # MNIST's centres of mass lie on pixel 14 on the average
    mass = padded.sum(dim=(1, 2))
    shift_y = (middle - (padded.sum(dim=2) @ pixels) / mass).round().long()
    shift_x = (middle - (padded.sum(dim=1) @ pixels) / mass).round().long()
    rows = (torch.arange(side) - shift_y[:, None]).remainder(side)  # a shift of at most 4: only paper wraps around
    columns = (torch.arange(side) - shift_x[:, None]).remainder(side)
    samples = torch.arange(len(padded))[:, None, None]
    return padded[samples, rows[:, :, None], columns[:, None, :]].round().to(torch.uint8)
