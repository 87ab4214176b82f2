"""Pictures are made here from the embedded digits, or from MNIST's: as files of every kind, on every kind of paper."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from mnist.config import DataConfig
from mnist.data.datasets import read
from mnist.data.picture_file import PictureError
from mnist.predict.digit_image import SeenDigit, see_digits
from mnist.predict.ink import read_picture

REAL_DIR = os.environ.get("MNIST_DATA_DIR", "")
needs_mnist = pytest.mark.skipif(not Path(REAL_DIR, "MNIST", "raw").is_dir(), reason="MNIST_DATA_DIR has no MNIST")
DIGITS = read("digits", DataConfig(dataset="digits")).test.images.numpy()


def ink_of(digit: np.ndarray, side: int) -> np.ndarray:
    """A 28x28 digit with pen-sharp edges, cropped to the ink, `side` pixels long: float (H, W) in [0, 1]."""
    rows, columns = np.nonzero(digit > 60)
    cropped = digit[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    zoom = side / max(cropped.shape)
    size = tuple(round(n * zoom) for n in cropped.shape[::-1])
    smooth = Image.fromarray(cropped).resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(side / 60))
    return np.clip((np.asarray(smooth, np.float32) / 255 - 0.5) * 3 + 0.5, 0, 1)


def page(*digits: np.ndarray, ink: float = 30, paper: float = 225, gap: int = 40) -> Image.Image:
    """Digits beside one another on a page, grey."""
    height = max(digit.shape[0] for digit in digits) + 130
    grey = np.full((height, sum(digit.shape[1] for digit in digits) + gap * (len(digits) - 1) + 150), paper, np.float32)
    left = 90
    for digit in digits:
        grey[80 : 80 + digit.shape[0], left : left + digit.shape[1]] += digit * (ink - paper)
        left += digit.shape[1] + gap
    return Image.fromarray(grey.round().astype(np.uint8))


def through_file(picture: Image.Image, kind: str = "PNG", **settings: Any) -> SeenDigit:
    """The one digit in a picture."""
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    (seen,) = see_digits(read_picture(file.getvalue()))
    return seen


def difference(a: SeenDigit, b: SeenDigit) -> float:
    """Mean absolute difference of pixels, as a share of the ink."""
    return float(np.abs(a.pixels.astype(float) - b.pixels).sum() / a.pixels.sum())


def test_a_page_becomes_what_mnist_would_have_made_of_it() -> None:
    for digit in DIGITS[:20]:
        seen = through_file(page(ink_of(digit, 180)))
        rows, columns = np.nonzero(seen.pixels > 40)
        mass = seen.pixels[rows, columns].astype(float)
        assert seen.pixels.shape == (28, 28)
        assert seen.pixels.dtype == np.uint8
        assert 18 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 21
        assert np.average(rows, weights=mass) == pytest.approx(14, abs=0.3)
        assert np.average(columns, weights=mass) == pytest.approx(14, abs=0.3)
        assert seen.pixels.max() >= 250
        assert np.median(seen.pixels) == 0
        assert seen.warning is None


def test_the_box_is_where_the_digit_is() -> None:
    ink = ink_of(DIGITS[0], 180)
    rows, columns = np.nonzero(ink > 0.5)
    expected = (90 + columns.min(), 80 + rows.min(), 90 + columns.max(), 80 + rows.max())
    assert through_file(page(ink)).box == pytest.approx(expected, abs=5)


def test_mnists_own_form_is_taken_bit_for_bit() -> None:
    for image in DIGITS:
        for picture in (Image.fromarray(image), Image.fromarray(image).convert("RGB")):
            assert (through_file(picture).pixels == image).all()


@needs_mnist
def test_all_of_mnist_is_in_its_own_form() -> None:
    images = read("mnist", DataConfig(dataset="mnist", data_dir=REAL_DIR)).test.images.numpy()
    assert all((see_digits(Image.fromarray(image))[0].pixels == image).all() for image in images)


def test_other_pictures_of_28_by_28_are_brought_to_the_form() -> None:
    image = DIGITS[0]
    inverted = through_file(Image.fromarray(255 - image))
    shifted = through_file(Image.fromarray(np.roll(image, (3, -3), axis=(0, 1))))
    assert difference(inverted, shifted) < 0.1
    assert difference(SeenDigit(image, (0, 0, 28, 28)), shifted) < 0.4  # a quarter of a pixel apart


def as_drawing_in_alpha(picture: Image.Image, colour: int) -> Image.Image:
    drawing = Image.new("LA", picture.size, (colour, 0))
    drawing.putalpha(picture.point(lambda value: round((225 - value) * 255 / 195)))
    return drawing


def with_round_corners(picture: Image.Image) -> Image.Image:
    corners = Image.new("L", picture.size, 0)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, *picture.size), 40, fill=255)
    rounded = picture.convert("RGBA")
    rounded.putalpha(corners)
    return rounded


KINDS = {
    "1 bit": lambda p: p.convert("1"),
    "palette": lambda p: p.convert("P"),
    "16 bits": lambda p: Image.fromarray(np.asarray(p).astype(np.uint16) * 257),
    "12 of 16 bits": lambda p: Image.fromarray(np.asarray(p).astype(np.uint16) * 16),
    "white on black": ImageOps.invert,
    "black on nothing": lambda p: as_drawing_in_alpha(p, 0),
    "white on nothing": lambda p: as_drawing_in_alpha(p, 255),
    "round corners": with_round_corners,
    "grey and alpha": lambda p: with_round_corners(p).convert("LA"),
    "small": lambda p: p.resize((p.width // 6, p.height // 6), Image.Resampling.BOX),
    "large": lambda p: p.resize((p.width * 8, p.height * 8)),
    "red ink": lambda p: ImageOps.colorize(p, (200, 20, 30), (255, 250, 230)),
    "yellow ink": lambda p: ImageOps.colorize(p, (250, 230, 40), (255, 255, 255)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_seen_does_not_depend_on_the_kind_of_picture(kind: str) -> None:
    picture = page(ink_of(DIGITS[3], 180))
    assert difference(through_file(picture), through_file(KINDS[kind](picture))) < 0.15


@pytest.mark.parametrize("file_type", ["JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_what_is_seen_does_not_depend_on_the_type_of_file(file_type: str) -> None:
    picture = page(ink_of(DIGITS[3], 180))
    assert difference(through_file(picture), through_file(picture, file_type)) < 0.1


def test_cmyk_float_and_rotated_files() -> None:
    picture = page(ink_of(DIGITS[3], 180))
    expected = through_file(picture)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    on_its_side = through_file(picture.rotate(90, expand=True), "JPEG", exif=exif)
    assert difference(expected, through_file(picture.convert("CMYK"), "JPEG")) < 0.1
    assert difference(expected, through_file(Image.fromarray(np.asarray(picture, np.float32) / 255), "TIFF")) < 0.1
    assert difference(expected, on_its_side) < 0.1


def light(name: str, height: int, width: int) -> np.ndarray:
    """Brightness of a page in [0, 1], (H, W)."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    if name == "a gradient":
        return 1 - 0.6 * x
    if name == "a soft shadow":
        return 1 - 0.5 / (1 + np.exp(-(x + y - 1) * 10))
    if name == "a hard shadow":
        return np.where(x + 0.5 * y > 0.8, 0.5, 1.0)
    return 1 - 1.2 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)


@pytest.mark.parametrize("name", ["a gradient", "a soft shadow", "a hard shadow", "a vignette"])
def test_light_leaves_no_trace(name: str) -> None:
    for digit in DIGITS[:5]:
        picture = page(ink_of(digit, 180))
        lit = np.asarray(picture) * light(name, picture.height, picture.width)
        assert difference(through_file(picture), through_file(Image.fromarray(lit.astype(np.uint8)))) < 0.25


def test_noise_and_specks_leave_little_trace() -> None:
    rng = np.random.default_rng(0)
    for digit in DIGITS[:5]:
        picture = page(ink_of(digit, 180))
        dirty = np.asarray(picture) + rng.normal(0, 25, (picture.height, picture.width))
        for _ in range(6):
            y, x = rng.integers(0, picture.height), rng.integers(0, picture.width)
            dirty[y : y + 3, x : x + 3] = 0
        dirty_picture = Image.fromarray(dirty.clip(0, 255).astype(np.uint8))
        assert difference(through_file(picture), through_file(dirty_picture, "JPEG", quality=50)) < 0.25


@pytest.mark.parametrize(("width", "least", "most"), [(2, 1.3, 3.5), (12, 1.3, 4), (44, 3, 7)])
def test_thin_and_thick_pens_give_strokes_that_mnist_knows(width: int, least: float, most: float) -> None:
    picture = Image.new("L", (400, 400), 240)
    ImageDraw.Draw(picture).line([(120, 100), (280, 100), (180, 320)], fill=20, width=width, joint="curve")
    pixels = through_file(picture).pixels
    middle = pixels[12:16].astype(float).sum(axis=1) / 255  # rows where only the slanted stroke is
    assert pixels.max() > 230
    assert least <= middle.mean() <= most


def test_a_broken_stroke_is_one_digit() -> None:
    picture = Image.new("L", (300, 300), 240)
    draw = ImageDraw.Draw(picture)
    draw.line([(120, 100), (115, 150)], fill=20, width=12)
    draw.arc((90, 140, 190, 240), -120, 140, fill=20, width=12)
    body = through_file(picture)
    draw.line([(132, 92), (190, 88)], fill=20, width=12)  # the top of a 5, apart from the rest
    whole = through_file(picture)
    assert whole.warning is None
    assert whole.box[1] < body.box[1]
    assert whole.box[3] == pytest.approx(body.box[3], abs=3)


@pytest.mark.parametrize("gap", [15, 40, 120])
def test_three_digits_in_a_row_are_seen_from_left_to_right(gap: int) -> None:
    inks = [ink_of(digit, 120) for digit in DIGITS[:21]]
    for i in range(0, 21, 3):
        seen = see_digits(page(*inks[i : i + 3], gap=gap))
        alone = [through_file(page(ink)) for ink in inks[i : i + 3]]
        assert len(seen) == 3
        assert [digit.box[0] for digit in seen] == sorted(digit.box[0] for digit in seen)
        assert all(difference(a, b) < 0.25 for a, b in zip(seen, alone, strict=True))


def test_two_rows_of_digits_are_seen_row_by_row() -> None:
    upper, lower = (np.asarray(page(*(ink_of(digit, 120) for digit in DIGITS[i : i + 2]))) for i in (0, 2))
    width = max(upper.shape[1], lower.shape[1])
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1])), mode="edge") for row in (upper, lower)]
    boxes = [digit.box for digit in see_digits(Image.fromarray(np.vstack(rows)))]
    assert len(boxes) == 4
    assert max(box[3] for box in boxes[:2]) < min(box[1] for box in boxes[2:])
    assert boxes[0][0] < boxes[1][0]
    assert boxes[2][0] < boxes[3][0]


STROKES = {  # corners of three digits, as shares of the side
    1: [(0.5, 0.2), (0.45, 0.8)],
    7: [(0.3, 0.25), (0.7, 0.25), (0.45, 0.8)],
    4: [(0.6, 0.8), (0.6, 0.2), (0.3, 0.6), (0.75, 0.6)],
}


@pytest.mark.parametrize("white", [False, True], ids=["black on white", "white on black"])
@pytest.mark.parametrize("side", [320, 600, 1200, 1600])
@pytest.mark.parametrize("digit", STROKES)
def test_lines_of_one_pixel_are_seen(digit: int, side: int, white: bool) -> None:
    corners = [(x * side, y * side) for x, y in STROKES[digit]]
    drawings = []
    for width in (1, side // 40):
        picture = Image.new("L", (side, side), 255)
        ImageDraw.Draw(picture).line(corners, fill=0, width=width)
        with warnings.catch_warnings(action="error"):
            drawings.append(through_file(ImageOps.invert(picture) if white else picture))
    thin, thick = drawings
    assert thin.box == pytest.approx(thick.box, abs=side // 20)
    assert difference(thick, thin) < 0.6  # of a pen's width
    assert thin.pixels.max() > 200


def in_a_form(digit: np.ndarray, rows: int, columns: int, line: int) -> Image.Image:
    """A digit of 70 pixels in the second cell of a grid, or in a box of its own."""
    cell = 140
    picture = Image.new("L", (columns * cell + 60, rows * cell + 60), 235)
    draw = ImageDraw.Draw(picture)
    for row in range(rows):
        for column in range(columns):
            left, top = 30 + column * cell, 30 + row * cell
            draw.rectangle((left, top, left + cell, top + cell), outline=40, width=line)
    grey = np.array(picture, np.float32)
    ink = ink_of(digit, 70)
    left, top = 30 + (columns - 1) * cell + 35, 65
    grey[top : top + ink.shape[0], left : left + ink.shape[1]] += ink * (40 - 235)
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("line", [2, 6])
def test_a_digit_in_a_printed_box_or_grid_is_seen_without_it(rows: int, columns: int, line: int) -> None:
    for digit in DIGITS[:10]:
        seen = through_file(in_a_form(digit, rows, columns, line))
        assert difference(through_file(page(ink_of(digit, 70))), seen) < 0.35


def test_an_empty_box_is_called_a_frame_and_not_a_digit() -> None:
    empty = Image.new("L", (300, 300), 235)
    ImageDraw.Draw(empty).rectangle((60, 50, 230, 240), outline=40, width=4)
    with pytest.raises(PictureError, match="a frame with nothing in it"):
        see_digits(empty)


def blank(kind: str) -> Image.Image:
    rng = np.random.default_rng(0)
    if kind == "transparent":
        return Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    brightness = {"white": 255, "black": 0}.get(kind, 180) * np.ones((200, 300))
    if kind == "noise":
        brightness += rng.normal(0, 30, brightness.shape)
    if kind == "gradient":
        brightness *= light("a gradient", 200, 300)
    return Image.fromarray(brightness.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("kind", ["white", "black", "transparent", "noise", "gradient"])
def test_a_blank_picture_is_refused(kind: str) -> None:
    with pytest.raises(PictureError, match="blank"):
        through_file(blank(kind))


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (1, 2000)])
def test_a_blank_picture_of_any_size_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(PictureError, match="blank"):
        through_file(Image.new("L", size, 0))
