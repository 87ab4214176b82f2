"""The page: paper to draw on, the answer beside it, the layers below.

In: the models to choose from. Out: `gradio.Blocks`. While one draws the browser sends a picture some 15 times a second,
and none before the last one is answered (`trigger_mode="always_last"`).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from mnist.config import MNIST_SIDE
from mnist.demo.reader import Reading, read
from mnist.errors import UserError
from mnist.plots.canvas import as_rgb, signed
from mnist.plots.features import INPUT, describe_shape
from mnist.plots.pictures import MOST_MAPS
from mnist.predict.answers import MOST_BARS, Answer, shown_classes


def _text(file: str) -> str:
    return (Path(__file__).parent / file).read_text(encoding="utf-8")


_FONTS = (gr.themes.utils.fonts.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif")
LOOK: dict[str, Any] = {
    "theme": gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=("ui-monospace", "monospace")),
    "css": _text("page.css"),
    "footer_links": [],
    "run_history": False,
    "ssr_mode": False,
}  # arguments of `launch`
_PICTURE = "(_, ...others) => [window.pictureOnPaper(), ...others]"  # what is on the paper when the call is made
_QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def build_page(models: Callable[[], Mapping[str, str]]) -> gr.Blocks:
    """The page.

    Args:
        models: folders of models, each with the text of its choice; called whenever the page is loaded.
    """
    with gr.Blocks(title="Draw a digit") as page:
        picture, is_open = gr.Textbox(visible=False), gr.State(True)
        with gr.Row(elem_id="head"):
            gr.HTML("<h1>Draw a digit</h1>", elem_id="title")
            run = gr.Dropdown(show_label=False, container=False, filterable=False, interactive=True, elem_id="run")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                paper = gr.HTML(html_template=_text("paper.html"), js_on_load=_text("paper.js"), elem_id="paper")
            with gr.Column(min_width=320):
                answers = gr.HTML(elem_id="answers")
        with gr.Accordion("What each layer makes of it", open=True) as accordion:
            layers = gr.HTML(elem_id="layers")
        reads = {"inputs": [picture, run, is_open], "outputs": [answers, layers], "js": _PICTURE, **_QUICK}
        paper.input(_read, trigger_mode="always_last", **reads)
        run.change(_read, **reads)
        accordion.expand(lambda: True, None, is_open, **_QUICK).then(_read, **reads)
        accordion.collapse(lambda: False, None, is_open, **_QUICK)
        page.load(lambda: _choices(models), None, run, **_QUICK)
    return page


def _read(picture: str, run: str, is_open: bool) -> tuple[str, str]:
    """What to show for a picture, a data URL of paper.js; blank paper is an empty one."""
    reading = read(base64.b64decode(picture.partition(",")[2]), run, with_layers=is_open)
    return answers_html(reading), layers_html(reading)


def _choices(models: Callable[[], Mapping[str, str]]) -> Any:
    try:
        found = models()
    except UserError as error:  # all have been removed: the choice says so, and `read` finds no model there
        found = {"runs": str(error)}
    return gr.Dropdown(choices=[(text, folder) for folder, text in found.items()], value=next(iter(found)))


def answers_html(reading: Reading) -> str:
    """The class of each digit, what the network sees of it, and its probabilities as bars."""
    if not reading.answers:
        return f'<div class="answers">{_article(reading.class_names, None, reading.error)}</div>'
    articles = "".join(_article(reading.class_names, answer, answer.warning) for answer in reading.answers)
    return f'<div class="answers{" several" * (len(reading.answers) > 1)}">{articles}</div>'


def _article(class_names: tuple[str, ...], answer: Answer | None, notice: str | None) -> str:
    name = "?" if answer is None else class_names[answer.digit]
    kind = " none" if answer is None else " word" if len(name) > 2 else ""
    sees = _seen(np.zeros((MNIST_SIDE, MNIST_SIDE), np.uint8) if answer is None else answer.seen.pixels)
    return f"""<article>
    <div class="top"><span class="digit{kind}">{escape(name)}</span>
    <figure>{sees}<figcaption>what the network sees</figcaption></figure></div>
    <p class="notice" role="status">{escape(notice or "")}</p>
    {_bars(class_names, answer)}</article>"""


def _seen(pixels: npt.NDArray[np.uint8]) -> str:
    """Ink (H, W) as black on white; a picture (C, H, W) as it is."""
    if pixels.ndim == 2:
        return _image(255 - pixels, "what the network sees")
    return _image(pixels.transpose(1, 2, 0).squeeze(), "what the network sees", is_ink=False)


def _bars(class_names: tuple[str, ...], answer: Answer | None) -> str:
    shares = answer.probabilities if answer is not None else (0.0,) * len(class_names)
    rows = ""
    for k in shown_classes(shares):
        best = " best" if answer is not None and k == answer.digit else ""
        width = f'<div style="width: {shares[k]:.1%}"></div>'
        text = f"{shares[k]:.1%}" if answer is not None else ""
        rows += f'<span class="name{best}">{escape(class_names[k])}</span><div class="bar{best}">{width}</div>'
        rows += f'<span class="share{best}">{text}</span>'
    return f'<div class="bars">{rows}</div>'


def layers_html(reading: Reading) -> str:
    """The outputs of the layers for one digit: maps as tiles, vectors as strips; red above zero, blue below."""
    figures = "".join(_layer(name, output[0].float()) for name, output in reading.outputs.items())
    has_names = bool(figures) and len(reading.class_names) <= MOST_BARS
    names = "".join(f"<span>{escape(name)}</span>" for name in reading.class_names) if has_names else ""
    which = "of the largest digit; " if len(reading.answers) > 1 else ""
    legend = f"<p>{which}red: above zero, blue: below</p>" if figures else ""
    return f'<div class="layers">{legend}{figures}<div class="names">{names}</div></div>'


def _layer(name: str, values: Tensor) -> str:
    """(channels, height, width) or (units,) as a figure."""
    caption = f"{name}: {describe_shape(values.shape)}, {float(values.min()):.2g} to {float(values.max()):.2g}"
    if values.ndim != 3:
        strip = _image(_colours(values.flatten()[None]), name)
        return f'<figure><figcaption>{escape(caption)}</figcaption><div class="units">{strip}</div></figure>'
    if name == INPUT:
        low, high = values.min(), values.max()
        (rgb,) = (255 * as_rgb(255 * (values - low)[None] / (high - low).clamp(min=1e-6))).byte().numpy()
        images = _image(rgb, name, is_ink=len(values) == 1)
    else:
        images = "".join(_image(tile, name) for tile in _colours(values[:MOST_MAPS]))
        caption += f", first {MOST_MAPS} of {len(values)} maps" if len(values) > MOST_MAPS else ""
    return f'<figure><figcaption>{escape(caption)}</figcaption><div class="maps">{images}</div></figure>'


def _colours(values: Tensor) -> npt.NDArray[np.uint8]:
    """(..., ) -> uint8 (..., 3)."""
    return (signed(values, float(values.abs().max())) * 255).byte().numpy()


def _image(pixels: npt.NDArray[np.uint8], text: str, *, is_ink: bool = True) -> str:
    """Pixels as a PNG inside the page, which the browser enlarges. Where the page is dark, ink is white."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=1)
    source = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return f'<img class="{"ink" * is_ink}" alt="{escape(text)}" src="{source}">'
