"""The table of data sets: their files, images and classes, and where the files are on this machine.

In: the name of a data set. Out: a `Source`, a `DatasetInfo`, paths. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

import msgspec

from mnist.errors import UserError

_MNIST_FILES = (
    *("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    *("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_DIGIT_NAMES = tuple(digits)


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and what its images and classes are."""

    torchvision_class: str | None  # also the name of its folder
    class_names: tuple[str, ...] = _DIGIT_NAMES
    image_shape: tuple[int, int, int] = (1, 28, 28)  # channels, height, width
    files: tuple[str, ...] = _MNIST_FILES  # images and labels to train on, images and labels of the test set
    sha256: tuple[str, ...] = ()  # of `files`, unpacked; empty = not pinned
    max_bytes: int = 30_000_000  # of a packed file; a server that sends more has failed
    train_copies: int = 1  # how often each training image is stored, and so seen in one epoch
    is_transposed: bool = False  # in the files; here all images are upright
    first_label: int = 0  # in the files; here it is 0
    has_digits: bool = False  # in MNIST's form: `predict` looks for them in a picture, and MNIST's mean and std fit


@dataclass(frozen=True)
class DatasetInfo:
    """What the images and classes of a data set are; a trained model is exported with it.

    Attributes:
        image_shape: channels, height and width.
        class_names: in the order of the labels.
        has_digits: the images are digits in MNIST's form, which `predict` looks for in a picture.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    has_digits: bool = False

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.image_shape[0]

    @property
    def num_classes(self) -> int:
        """Classes, and so logits of a network."""
        return len(self.class_names)


def _emnist(split: str, class_names: str, *, first_label: int = 0, has_digits: bool = False) -> Source:
    """One of the data sets that NIST publishes in a single archive (Cohen, Afshar, Tapson, van Schaik 2017)."""
    parts = [f"emnist-{split}-{part}" for part in ("train", "test")]
    return Source(
        "EMNIST",
        tuple(class_names),
        files=tuple(f"{part}-{file}" for part in parts for file in ("images-idx3-ubyte", "labels-idx1-ubyte")),
        max_bytes=600_000_000,
        is_transposed=True,
        first_label=first_label,
        has_digits=has_digits,
    )


SOURCES = {
    "mnist": Source(
        "MNIST",
        sha256=(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        has_digits=True,
    ),
    "fashion_mnist": Source(
        "FashionMNIST",
        ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "kmnist": Source("KMNIST", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
    "qmnist": Source(  # MNIST made anew from its sources, with all 60,000 test images
        "QMNIST",
        files=(
            *("qmnist-train-images-idx3-ubyte", "qmnist-train-labels-idx2-int"),
            *("qmnist-test-images-idx3-ubyte", "qmnist-test-labels-idx2-int"),
        ),
        has_digits=True,
    ),
    "emnist_letters": _emnist("letters", ascii_lowercase, first_label=1),  # capital and small letters are one class
    "emnist_balanced": _emnist("balanced", digits + ascii_uppercase + "abdefghnqrt"),  # other small letters likewise
    "emnist_digits": _emnist("digits", digits, has_digits=True),
    "digits": Source(  # 1,437 images: recipes made for MNIST's 60,000 keep their length
        None, files=(), train_copies=42, has_digits=True
    ),
    "folder": Source(None, (), files=()),  # people's own pictures: what they are is known when they are read
}


def info_of(name: str) -> DatasetInfo:
    """What the table says of a data set before it is read; of `auto`, what it says of MNIST."""
    source = SOURCES.get(name, SOURCES["mnist"])
    return DatasetInfo(source.image_shape, source.class_names, source.has_digits)


def take_info(flat: dict[str, Any]) -> DatasetInfo:
    """Removes the fields of a `DatasetInfo` from an exported configuration; older exports have none: the table knows.

    Raises:
        UserError: the fields are damaged.
    """
    names = ("image_shape", "class_names", "has_digits")
    values = {name: flat.pop(name) for name in names if name in flat}
    if not values:
        return info_of(str(flat.get("dataset")))
    try:
        info = msgspec.convert(values, DatasetInfo)
    except msgspec.ValidationError as error:
        raise UserError(f"image_shape or class_names is damaged ({error})") from error
    if not info.class_names or min(info.image_shape) < 1:
        raise UserError("image_shape or class_names is damaged (nothing may be empty)")
    return info


def is_present(name: str, data_dir: str) -> bool:
    """Whether all files of the data set are in `data_dir`; the digits always are, people's own pictures may be."""
    source = SOURCES[name]
    if name == "folder":
        return Path(data_dir).is_dir()
    return all(find_file(source, data_dir, file) is not None for file in source.files)


def find_file(source: Source, data_dir: str, name: str) -> Path | None:
    """The file `name`, packed or not, also as mirrors spell it (train-images.idx3-ubyte) or in a folder of its name.

    `data_dir` may be the folder of the files itself, unless it is the one of another data set: their files have the
    same names.
    """
    own = source.torchvision_class
    assert own is not None
    folders = [Path(data_dir, own, "raw")]
    if Path(data_dir).resolve().parent.name not in {other.torchvision_class for other in SOURCES.values()} - {own}:
        folders.append(Path(data_dir))
    spellings = [spelling + packed for spelling in (name, name.replace("-idx", ".idx")) for packed in ("", ".gz")]
    paths = (path for folder in folders for file in spellings for path in (folder / file, folder / file / file))
    return next((path for path in paths if path.exists() and not path.is_dir()), None)
