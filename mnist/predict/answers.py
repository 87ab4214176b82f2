"""What a trained network says of digits that were found in pictures, or of whole pictures, and whether to believe it.

In: a trained model and `SeenDigit`s. Out: an `Answer` for each, with the warning of `python -m mnist.predict`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mnist.data.datasets import read, relocate
from mnist.data.picture_file import to_image
from mnist.data.sources import is_present
from mnist.errors import UserError
from mnist.predict.digit_image import NO_BOX, SeenDigit, see_digits
from mnist.predict.ink import read_picture
from mnist.predict.not_a_digit import Likeness
from mnist.runs.console import Console
from mnist.runs.export import TrainedModel

UNSURE = 0.6  # a probability below it is a guess
MOST_BARS = 10  # classes of which the probabilities are shown
UNSURE_WARNING = "not sure: no {} is much more probable than the others"
UNLIKE_WARNING = "unlike all training images: perhaps no digit"


@dataclass(frozen=True)
class Answer:
    """What the network says of one digit, or of a whole picture where its data set has none.

    Attributes:
        digit: the class of the largest probability, as a number.
        probabilities: of the classes, in [0, 1].
        warning: why the answer may be wrong, or None.
        seen: what the network was shown.
    """

    digit: int
    probabilities: tuple[float, ...]
    warning: str | None
    seen: SeenDigit

    def as_dict(self, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Digit, probabilities and warning for --json; with `class_names` the class, and probabilities by class."""
        probabilities = [round(p, 6) for p in self.probabilities]
        if class_names is None:
            return {"digit": self.digit, "probabilities": probabilities, "warning": self.warning}
        by_class = dict(zip(class_names, probabilities, strict=True))
        return {"class": class_names[self.digit], "probabilities": by_class, "warning": self.warning}


def see(content: bytes, suffix: str, trained: TrainedModel) -> list[SeenDigit]:
    """What a network is to be shown of a picture file: its digits, or the whole picture where it knows no digits.

    The data sets in MNIST's format show light things on black: for their networks a picture with a light edge is
    inverted. Those of people's own pictures see it as it is.

    Raises:
        PictureError: not a picture, or there is nothing in it.
    """
    if trained.info.has_digits:
        return see_digits(read_picture(content, suffix))
    num_channels, side, _ = trained.info.image_shape
    with warnings.catch_warnings(action="ignore"):
        pixels = to_image(content, suffix, num_channels, side)
    edge = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    if trained.config.data.dataset != "folder" and np.median(edge) > 127:
        pixels = 255 - pixels
    return [SeenDigit(pixels, NO_BOX)]


def training_likeness(trained: TrainedModel) -> Likeness | None:
    """What tells letters and scribbles from digits; None where MNIST is not on this machine, or was not learnt."""
    config = relocate(trained.config.data, None, None)
    if trained.config.data.dataset != "mnist" or not is_present("mnist", config.data_dir):
        return None
    try:
        return Likeness(read("mnist", config).train.images.numpy())
    except UserError as error:  # damaged files: the pictures can be read all the same
        Console().warn(f"letters and scribbles are not told from digits: {error}")
        return None


def answer_digits(
    trained: TrainedModel, pictures: Sequence[Sequence[SeenDigit]], likeness: Likeness | None = None
) -> list[tuple[Answer, ...]]:
    """What the network says of the digits of each picture, in order. All digits go through it as one batch."""
    digits = [digit.pixels for found in pictures for digit in found]
    if not digits:
        return [()] * len(pictures)
    images = torch.from_numpy(np.stack(digits))
    with torch.inference_mode():
        probabilities = iter(trained.model(trained.transform(images)).softmax(dim=1).tolist())
    unsure = UNSURE_WARNING.format("digit" if trained.info.has_digits else "class")
    is_unlike = iter(likeness.is_foreign(np.stack(digits)).tolist() if likeness else [False] * len(digits))
    return [
        tuple(_answer(digit, next(probabilities), unsure, next(is_unlike)) for digit in found) for found in pictures
    ]


def _answer(seen: SeenDigit, probabilities: list[float], unsure: str, is_unlike: bool) -> Answer:
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    doubt = UNLIKE_WARNING if is_unlike else unsure if probabilities[best] < UNSURE else None
    return Answer(best, tuple(probabilities), seen.warning or doubt, seen)


def shown_classes(probabilities: Sequence[float]) -> list[int]:
    """The classes that get a bar: all, in their order, or of more than ten the ten most probable, those first."""
    classes = range(len(probabilities))
    if len(classes) <= MOST_BARS:
        return list(classes)
    return sorted(classes, key=lambda k: -probabilities[k])[:MOST_BARS]


def largest_of(answers: Sequence[Answer]) -> Answer:
    """The answer on the tallest digit of a picture."""
    return max(answers, key=lambda answer: answer.seen.box[3] - answer.seen.box[1])
