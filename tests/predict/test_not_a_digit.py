"""Warnings of what is no digit: how many of the wrong things are caught, and what that costs on real digits."""

from __future__ import annotations

import os
import string
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from mnist.config import DataConfig
from mnist.data.datasets import read
from mnist.predict.digit_image import see_digits
from mnist.predict.not_a_digit import Likeness

REAL_DIR = os.environ.get("MNIST_DATA_DIR", "")
needs_mnist = pytest.mark.skipif(not Path(REAL_DIR, "MNIST", "raw").is_dir(), reason="MNIST_DATA_DIR has no MNIST")
NOISE = (np.random.default_rng(0).random((50, 28, 28)) * 255).astype(np.uint8)
FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "STIXGeneral.ttf", "cmr10.ttf")
LIKE_DIGITS = set("OoIlSsZzBbgqDiQjyJ")  # letters that are written as digits are


def printed(character: str, font: str) -> np.ndarray:
    picture = Image.new("L", (400, 400), 235)
    kind = ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", font), 200)
    ImageDraw.Draw(picture).text((200, 200), character, font=kind, fill=30, anchor="mm")
    return see_digits(picture)[0].pixels


@needs_mnist
def test_half_of_printed_letters_and_all_noise_are_unlike_mnist_at_1_percent_of_real_digits() -> None:
    mnist = read("mnist", DataConfig(dataset="mnist", data_dir=REAL_DIR))
    likeness = Likeness(mnist.train.images.numpy())
    letters = [printed(c, font) for c in string.ascii_letters if c not in LIKE_DIGITS for font in FONTS]
    digits = [printed(c, font) for c in string.digits for font in FONTS]
    assert likeness.is_foreign(mnist.test.images.numpy()).mean() <= 0.01
    assert likeness.is_foreign(np.stack(digits)).mean() <= 0.05
    assert likeness.is_foreign(np.stack(letters)).mean() >= 0.5
    assert likeness.is_foreign(NOISE).all()


def test_noise_is_unlike_the_embedded_digits_and_their_test_set_is_not() -> None:
    digits = read("digits", DataConfig(dataset="digits"))
    likeness = Likeness(digits.train.images[:1437].numpy())  # each once
    assert likeness.is_foreign(NOISE).all()
    assert likeness.is_foreign(digits.test.images.numpy()).mean() <= 0.05


def test_a_blank_image_is_no_error() -> None:
    likeness = Likeness(read("digits", DataConfig(dataset="digits")).train.images[:1437].numpy())
    assert likeness.is_foreign(np.zeros((1, 28, 28), np.uint8)).all()
