"""The page's HTML, without a browser."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnist.demo.reader import Reading, find_models
from mnist.predict.answers import Answer
from mnist.predict.digit_image import SeenDigit

pytest.importorskip("gradio", reason="gradio is not installed")

from mnist.demo.page import _choices, _read, answers_html, layers_html

DIGITS = tuple("0123456789")
PIXELS = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)


def answer(digit: int, num_classes: int = 10, warning: str | None = None) -> Answer:
    probabilities = [0.1 / (num_classes - 1)] * num_classes
    probabilities[digit] = 0.9
    return Answer(digit, tuple(probabilities), warning, SeenDigit(PIXELS, (0, 0, 28, 28)))


def texts(kind: str, html: str) -> list[str]:
    return re.findall(rf'class="{kind}[^"]*"[^>]*>([^<]*)<', html)


def images(html: str) -> list[np.ndarray]:
    found = re.findall(r"base64,([^\"]+)", html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) for content in found]


def test_ten_bars_in_the_order_of_the_classes_and_the_digit_large() -> None:
    html = answers_html(Reading(DIGITS, (answer(7),)))
    assert texts("digit", html) == ["7"]
    assert texts("name", html) == list(DIGITS)
    assert texts("share", html) == [*["1.1%"] * 7, "90.0%", *["1.1%"] * 2]
    assert texts("name best", html) == ["7"]
    assert texts("notice", html) == [""]


def test_what_the_network_sees_is_shown_pixel_for_pixel_as_ink_on_paper() -> None:
    (image,) = images(answers_html(Reading(DIGITS, (answer(7),))))
    assert (image == 255 - PIXELS).all()


def test_a_coloured_picture_is_shown_as_it_is_and_never_as_ink() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    reading = Reading(("a", "b"), (Answer(0, (0.9, 0.1), None, SeenDigit(picture, (0, 0, 0, 0))),))
    html = answers_html(reading) + layers_html(replace(reading, outputs={"input": torch.from_numpy(picture)[None]}))
    shown = images(html)
    assert (shown[0] == picture.transpose(1, 2, 0)).all()
    assert abs(shown[1].astype(int) - picture.transpose(1, 2, 0)).max() <= 1
    assert 'class="ink"' not in html


def test_a_warning_of_predict_and_an_error_are_shown() -> None:
    assert texts("notice", answers_html(Reading(DIGITS, (answer(7, warning="not sure"),)))) == ["not sure"]
    html = answers_html(Reading(DIGITS, error="blank"))
    assert (texts("notice", html), texts("digit", html), texts("share", html)) == (["blank"], ["?"], [""] * 10)


def test_two_digits_are_shown_side_by_side() -> None:
    html = answers_html(Reading(DIGITS, (answer(4), answer(2))))
    assert texts("digit", html) == ["4", "2"]
    assert 'class="answers several"' in html


def test_of_47_classes_the_ten_most_probable_ones_get_a_bar() -> None:
    names = tuple(f"c{k}" for k in range(47))
    html = answers_html(Reading(names, (answer(40, 47),)))
    assert len(texts("name", html)) == 10
    assert texts("name", html)[0] == "c40"


def test_names_of_classes_are_text_and_never_html() -> None:
    html = answers_html(Reading(("<script>", "&"), (answer(0, 2),)))
    assert "<script>" not in html
    assert texts("name", html) == ["&lt;script&gt;", "&amp;"]


def test_maps_are_red_above_zero_and_blue_below_and_at_most_32_of_a_layer_are_shown() -> None:
    maps = torch.zeros(1, 40, 2, 2)
    maps[0, 0] = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    outputs = {"input": torch.rand(1, 1, 28, 28), "conv1": maps, "output": torch.tensor([[1.0, -1.0]])}
    html = layers_html(Reading(("no", "yes"), outputs=outputs))
    shown = images(html)
    assert len(shown) == 1 + 32 + 1
    (red, blue), (white, _) = shown[1]
    assert (red[0] > red[2], blue[2] > blue[0], white.tolist()) == (True, True, [255, 255, 255])
    assert "conv1: 40x2x2, -1 to 1, first 32 of 40 maps" in html


def test_a_page_that_is_loaded_when_all_runs_are_gone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    choice = _choices(lambda: find_models(None))
    (text, folder), *others = choice.choices
    assert others == []
    assert text.startswith("--run: no finished run below runs/; train one")
    assert texts("notice", _read("", folder, is_open=True)[0]) == ["runs: no model there any more; reload the page"]
