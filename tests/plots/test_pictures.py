from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from mnist.config import IMAGE_SIZES
from mnist.data.batches import Split
from mnist.data.sources import SOURCES
from mnist.errors import RunError
from mnist.models import MODELS
from mnist.plots import canvas, pictures
from mnist.plots.architecture import draw_architecture, layer_costs
from mnist.plots.features import activations, filters
from mnist.predict.answers import Answer
from mnist.predict.digit_image import NO_BOX, SeenDigit
from mnist.predict.drawing import draw_prediction
from tests.networks import mnist_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIGITS = SOURCES["mnist"].class_names
WORDS = SOURCES["fashion_mnist"].class_names


def shape_of(name: str) -> tuple[int, int, int]:
    return 1, IMAGE_SIZES.get(name, 28), IMAGE_SIZES.get(name, 28)


def pixels_of(figure: Figure, path: Path) -> torch.Tensor:
    """Saves, reads back, checks that something is there and that nothing is cut off: (H, W) grey values."""
    pictures.save_picture(figure, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        grey = torch.from_numpy(np.array(image.convert("L")))
    assert min(grey.shape) >= canvas.HEAD
    assert (grey < 128).sum() > 100
    for edge in (grey[0], grey[-1], grey[:, 0], grey[:, -1]):
        assert edge.min() == 255
    return grey


def texts(figure: Figure) -> list[str]:
    """All that is written on a figure."""
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [text.get_text() for text in axes.texts]
        if axes.axison:
            found += [text.get_text() for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
            found += [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    found += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return [line for text in found for line in text.splitlines() if line]


def overlapping_texts(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that are drawn over one another."""
    figure.draw_without_rendering()
    artists = [text for axes in figure.axes for text in axes.texts] + list(figure.texts)
    for axes in figure.axes:
        artists += [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.yaxis.label] if axes.axison else []
    artists = [text for text in artists if text.get_rotation() in (0, 90)]  # the boxes of others are not their shape
    boxes = [(text.get_text(), text.get_window_extent()) for text in artists if text.get_text()]
    return [
        (one, other)
        for number, (one, box) in enumerate(boxes)
        for other, other_box in boxes[:number]
        if box.padded(-1.5).overlaps(other_box.padded(-1.5))
    ]


def draw_mistakes(count: int) -> Figure:
    """Of 100 images of a 9, so many are taken for a 2."""
    images = torch.randint(0, 256, (100, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wrong, predicted, confidences = torch.arange(count) + 10, torch.full((100,), 2), torch.linspace(1.09, 0.1, 100)
    split = Split(images, torch.full((100,), 9))
    return pictures.draw_mistakes(split, (wrong, predicted, confidences), WORDS, "title")


def confusion(mistaken: int) -> list[list[int]]:
    counts = [[0] * 10 for _ in range(10)]
    for k in range(10):
        counts[k][k] = 1000 - mistaken
        counts[k][(k + 3) % 10] += mistaken
    return counts


@pytest.mark.parametrize("names", [DIGITS, WORDS])
@pytest.mark.parametrize("is_augmented", [False, True])
def test_samples_carry_their_labels(tmp_path: Path, names: tuple[str, ...], is_augmented: bool) -> None:
    images = torch.randint(0, 256, (37, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(37).remainder(10)
    augmented = images.float().flip(2) if is_augmented else None
    figure = pictures.draw_samples(images, labels, names, "title", "subtitle", augmented=augmented)
    pixels_of(figure, tmp_path / "samples.png")
    written = texts(figure)
    assert [written.count(name) for name in names] == [4] * 7 + [3] * 3
    assert overlapping_texts(figure) == []


def test_every_pixel_of_an_image_is_a_square_of_whole_pixels(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey = pixels_of(pictures.draw_samples(images, torch.tensor([7]), DIGITS, "t", "s"), tmp_path / "one.png")
    top, left = canvas.HEAD + 1, canvas.MARGIN + 1
    shown = grey[top : top + 56, left : left + 56]
    expected = (255 - images[0]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert (shown.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_every_network_is_shown(tmp_path: Path, name: str) -> None:
    model, side = mnist_model(name), IMAGE_SIZES.get(name, 28)
    image = torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(0))
    outputs = activations(model, image)
    figure = pictures.draw_features(outputs, WORDS, "title", "subtitle", [])
    pixels_of(figure, tmp_path / "features.png")
    written = texts(figure)
    assert [text for text in written if text in outputs] == list(outputs)
    assert set(WORDS) <= set(written)
    maps = [
        f"first 32 of {output.shape[1]} maps"
        for output in outputs.values()
        if output.ndim == 4 and output.shape[1] > 32
    ]
    assert [text for text in written if text.startswith("first")] == maps
    assert overlapping_texts(figure) == []


def test_logits_are_drawn_as_they_are() -> None:
    logits = torch.tensor([-3.0, 4.0, *[0.5] * 8])
    outputs = {"input": torch.rand(1, 1, 28, 28), "linear": logits.unsqueeze(0)}
    figure = pictures.draw_features(outputs, DIGITS, "t", "s", [])
    bars = figure.axes[1].patches
    assert [bar.get_height() for bar in bars] == logits.tolist()
    assert f"{float(logits.softmax(0)[1]):.1%}" in texts(figure)


def test_several_images_have_a_row_each(tmp_path: Path) -> None:
    images = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    said = [f"image {number}" for number in range(20)]
    outputs = activations(mnist_model("tinynet"), images)
    figure = pictures.draw_features(outputs, DIGITS, "title", "subtitle", said)
    pixels_of(figure, tmp_path / "features.png")
    assert [text for text in texts(figure) if text.startswith("image ")] == said
    assert "10 logits" in texts(figure)


def test_colour_images_of_any_size_and_any_number_of_classes(tmp_path: Path) -> None:
    names = [f"class {k}" for k in range(47)]
    images = torch.randint(0, 256, (47, 3, 100, 100), dtype=torch.uint8)
    figure = pictures.draw_samples(images, torch.arange(47), names, "t", "s", augmented=images.float())
    pixels_of(figure, tmp_path / "samples.png")
    outputs = {"input": images[:1].float(), "conv": torch.randn(1, 8, 98, 98), "linear": torch.randn(1, 47)}
    figure = pictures.draw_features(outputs, names, "t", "s", [])
    pixels_of(figure, tmp_path / "features.png")
    assert "47 logits" in texts(figure)
    pixels_of(pictures.draw_confusion(torch.eye(47).int().tolist(), names, "t"), tmp_path / "confusion.png")
    pixels_of(pictures.draw_pixels(images[0, :, :20, :20], "t", "s"), tmp_path / "pixels.png")


@pytest.mark.parametrize("name", ["$...^{$", "$a$", r"\frac", "a_{b}^$$"])
def test_names_are_never_read_as_mathematics(tmp_path: Path, name: str) -> None:
    figure = pictures.draw_confusion(confusion(1), [name] * 10, name)
    pixels_of(figure, tmp_path / "confusion.png")
    figure = pictures.draw_samples(torch.zeros(3, 28, 28), torch.arange(3), [name] * 3, name, name)
    pixels_of(figure, tmp_path / "samples.png")


def test_pixels_are_written_as_numbers(tmp_path: Path) -> None:
    image = torch.arange(784).remainder(256).view(28, 28)
    figure = pictures.draw_pixels(image, "title", "subtitle")
    pixels_of(figure, tmp_path / "pixels.png")
    assert [text.get_text() for text in figure.axes[0].texts] == [str(value) for value in image.flatten().tolist()]


def test_the_diagram_names_each_change_of_shape_once() -> None:
    figure = draw_architecture(layer_costs(mnist_model("lenet5"), (1, 32, 32)), "lenet5")
    written = texts(figure)
    assert [written.count(name) for name in ("conv1", "pool1", "linear1", "relu1")] == [2, 2, 2, 1]
    assert {"4,704", "122,304"} <= set(written)


@pytest.mark.parametrize("name", MODELS)
def test_filters_of_every_network(tmp_path: Path, name: str) -> None:
    found = filters(mnist_model(name), shape_of(name))
    figure = pictures.draw_filters(found, "title", "subtitle")
    pixels_of(figure, tmp_path / "filters.png")
    assert set(found) <= set(texts(figure))
    assert overlapping_texts(figure) == []


def test_the_first_64_of_many_filters_are_shown() -> None:
    written = [texts(pictures.draw_filters(filters(mnist_model(n), shape_of(n)), "t", "s")) for n in ("mlp", "lenet5")]
    assert ["first 64 shown" in found for found in written] == [True, False]


def test_filters_of_a_first_layer_that_sees_colours_are_in_colour(tmp_path: Path) -> None:
    weights = torch.zeros(4, 3, 3, 3)
    weights[0, 0], weights[1, 1], weights[2, 2] = 1.0, 1.0, 1.0
    weights[3] = -1.0
    figure = pictures.draw_filters({"conv1": weights, "conv2": torch.randn(2, 3, 3, 3)}, "title", "subtitle")
    path = pictures.save_picture(figure, tmp_path / "filters.png")
    with Image.open(path) as image:
        row = canvas.HEAD + canvas.TILE // 2
        middles = [canvas.MARGIN + canvas.LABEL + k * canvas.PITCH + canvas.TILE // 2 for k in range(4)]
        found = [image.convert("RGB").getpixel((x, row)) for x in middles]
    assert found == [(255, 127, 127), (127, 255, 127), (127, 127, 255), (0, 0, 0)]
    written = texts(figure)
    assert {"4 filters, 3x3", "of red, green and blue", "2 filters (across)", "3 inputs (down)"} <= set(written)


LONG = ("grüne Katze im Garten", "un très long nom de classe, avec espaces", "赤い円")
LETTERS = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt")
MANY_WORDS = tuple(f"class number {k}" for k in range(26))


def written_outside(figure: Figure) -> list[str]:
    """Texts that the edge of a figure cuts off."""
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * canvas.DPI
    artists = [text for axes in figure.axes for text in axes.texts] + list(figure.texts)
    for axes in figure.axes:
        artists += [*axes.get_xticklabels(), *axes.get_yticklabels()] if axes.axison else []
        artists += [axes.xaxis.label, axes.yaxis.label] if axes.axison else []
    boxes = [(text.get_text(), text.get_window_extent()) for text in artists if text.get_text()]
    return [text for text, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("names", [LONG, LETTERS, MANY_WORDS], ids=["long", "47", "26 words"])
@pytest.mark.parametrize("picture", ["confusion", "features", "several", "samples", "mistakes", "prediction"])
def test_names_of_classes_of_any_length_and_number_stay_apart_and_in_the_picture(
    picture: str, names: tuple[str, ...]
) -> None:
    count = len(names)
    images = torch.zeros(8, 3, 48, 40, dtype=torch.uint8)
    labels, others = torch.arange(8) % count, torch.arange(1, 9) % count
    outputs = {"input": torch.randn(1, 3, 28, 28), "linear": torch.linspace(-1, 1, count).unsqueeze(0)}
    two = {layer: values.repeat(2, *[1] * (values.ndim - 1)) for layer, values in outputs.items()}
    said = [f"test image {k}: true {names[0]}, predicted {names[1]}" for k in range(2)]
    counts = (100 * torch.eye(count) + 3 * torch.eye(count).roll(1, dims=0)).int().tolist()
    worst = torch.arange(8), others, torch.full((8,), 0.9)
    answer = Answer(0, (1 / count,) * count, None, SeenDigit(np.zeros((3, 32, 32), np.uint8), NO_BOX))
    figure = {
        "confusion": lambda: pictures.draw_confusion(counts, names, "title"),
        "features": lambda: pictures.draw_features(outputs, names, "title", "subtitle", []),
        "several": lambda: pictures.draw_features(two, names, "title", "subtitle", said),
        "samples": lambda: pictures.draw_samples(images, labels, names, "title", "subtitle"),
        "mistakes": lambda: pictures.draw_mistakes(Split(images, labels), worst, names, "title"),
        "prediction": lambda: draw_prediction(np.zeros((50, 50), np.uint8), answer, names),
    }[picture]()
    assert written_outside(figure) == []
    assert overlapping_texts(figure) == []


def test_a_name_that_is_too_wide_is_cut_and_a_short_one_is_not() -> None:
    assert canvas.fit("ankle boot", 100, 8) == "ankle boot"
    assert canvas.fit("un très long nom", 80, 8) == "un très l…"
    assert canvas.fit("赤い円赤い円", 60, 8) == "赤い円赤…"
    assert canvas.fit("abc", 1, 8) == "…"


@pytest.mark.parametrize("counts", [47, 10])
def test_a_prediction_shows_at_most_the_ten_most_probable_classes(counts: int) -> None:
    picture, chances = np.zeros((50, 50), np.uint8), torch.arange(float(counts)).softmax(0).tolist()
    answer = Answer(counts - 1, tuple(chances), None, SeenDigit(picture, NO_BOX))
    figure = draw_prediction(picture, answer, LETTERS[:counts])
    shown = [label.get_text() for label in figure.axes[2].get_yticklabels()]
    assert shown == (list(LETTERS[:36:-1]) if counts == 47 else list(LETTERS[:10]))


def test_a_letter_that_no_font_has_is_drawn_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    pictures.save_picture(pictures.draw_confusion([[1, 0], [0, 1]], ["赤い円", "b"], "title"), tmp_path / "a.png")
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("shape", [(64, 4, 3, 3), (42, 6, 3, 3), (16, 16, 3, 3), (2, 128, 1, 1)])
def test_filters_of_several_inputs_stay_in_the_picture(shape: tuple[int, ...]) -> None:
    figure = pictures.draw_filters({"conv": torch.randn(shape)}, "title", "subtitle")
    (axes,) = figure.axes
    left, right, bottom, top = axes.images[0].get_extent()
    assert axes.get_xlim()[0] < left < right < axes.get_xlim()[1]
    assert axes.get_ylim()[0] > bottom > top > axes.get_ylim()[1]
    assert ("first 40 shown" in texts(figure)) == (shape[0] > 40)


@pytest.mark.parametrize("names", [DIGITS, WORDS])
def test_confusion_shows_counts_and_rates(tmp_path: Path, names: tuple[str, ...]) -> None:
    figure = pictures.draw_confusion(confusion(25), names, "title")
    pixels_of(figure, tmp_path / "confusion.png")
    written = texts(figure)
    assert "250 mistakes among 10,000 test images; only mistakes are coloured" in written
    assert [written.count(text) for text in ("975", "25", "97.5", "2.5")] == [10] * 4


@pytest.mark.parametrize("counts", [confusion(0), [[0] * 10 for _ in range(10)]])
def test_confusion_without_mistakes_or_without_a_class(tmp_path: Path, counts: list[list[int]]) -> None:
    pixels_of(pictures.draw_confusion(counts, DIGITS, "title"), tmp_path / "confusion.png")


@pytest.mark.parametrize(("count", "num_shown"), [(1, 1), (28, 28), (74, 28)])
def test_mistakes_say_what_was_taken_for_what(tmp_path: Path, count: int, num_shown: int) -> None:
    figure = draw_mistakes(count)
    pixels_of(figure, tmp_path / "mistakes.png")
    written = texts(figure)
    assert written.count("true ankle boot") == written.count("taken for pullover") == num_shown
    assert "99.0%  #10" in written
    assert f"{count} mistakes among 100 test images; the most confident first" in written
    assert overlapping_texts(figure) == []


def test_no_mistakes_are_a_line(tmp_path: Path) -> None:
    figure = draw_mistakes(0)
    pictures.save_picture(figure, tmp_path / "mistakes.png")
    assert "0 mistakes among 100 test images: nothing to show" in texts(figure)


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_layers_fits(tmp_path: Path, name: str) -> None:
    figure = draw_architecture(layer_costs(mnist_model(name), shape_of(name)), name)
    pixels_of(figure, tmp_path / "architecture.png")
    assert overlapping_texts(figure) == []


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_a_picture_is_written_in_the_format_of_its_name(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / "new" / f"table{suffix}"
    pictures.save_picture(draw_architecture([], "empty"), path)
    assert path.read_bytes().startswith(start)
    assert list(path.parent.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="picture not written"):
        pictures.save_picture(draw_architecture([], "empty"), tmp_path / "file" / "table.png")


@pytest.mark.parametrize("module", ["architecture", "canvas", "curves", "pictures", "run_pictures", "__main__"])
def test_matplotlib_waits_for_the_first_figure_and_its_global_state_is_left_alone(module: str) -> None:
    spec = importlib.util.find_spec(f"mnist.plots.{module}")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    imported = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [line for line in imported if "matplotlib" in line]
    assert "pyplot" not in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]


def test_colours_have_a_sign() -> None:
    colours: Callable[..., torch.Tensor] = canvas.signed
    below, zero, above, beyond = colours(torch.tensor([-2.0, 0.0, 2.0, 5.0]), 2.0)
    assert zero.tolist() == [1, 1, 1]
    assert below.tolist() == pytest.approx(canvas.BLUE)
    assert above.tolist() == beyond.tolist() == pytest.approx(canvas.RED)
