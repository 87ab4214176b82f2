"""Drawing one answer: the picture, what the network sees of it, and the probabilities.

In: pixels and an `Answer`. Out: a figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mnist.plots.canvas import BLUE, GREY, HEAD, INK, MARGIN, PALE, RED, add_axes, fit, new_figure
from mnist.predict.answers import Answer, shown_classes
from mnist.predict.digit_image import NO_BOX

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_prediction(source: npt.NDArray[np.uint8], answer: Answer, class_names: Sequence[str]) -> Figure:
    """Three panels: a person's picture, what the network sees of it, what it says.

    Args:
        source: the picture that `answer.seen.box` lies in, grey (H, W) or RGB (H, W, 3).
        answer: its warning, if there is one, is written below the title.
        class_names: in the order of the labels.
    """
    title = fit(f"{class_names[answer.digit]}, {answer.probabilities[answer.digit]:.1%}", 860, 11)
    has_frame = answer.seen.box != NO_BOX
    subtitle = "on the left the picture" + ", with the digit framed" * has_frame
    figure = new_figure(960, 360, title, f"warning: {answer.warning}" if answer.warning else subtitle)
    picture, network = (add_axes(figure, MARGIN + left, HEAD, 270, 270) for left in (0, 300))
    picture.imshow(source, cmap="gray", vmin=0, vmax=255)
    if has_frame:
        left, top, right, bottom = (edge - 0.5 for edge in answer.seen.box)
        picture.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=RED, linewidth=1.5)
    seen = answer.seen.pixels
    if seen.ndim == 3:
        network.imshow(seen.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
    else:
        network.imshow(seen, cmap="gray_r", vmin=0, vmax=255)  # 255 = ink
    network.set_title("what the network sees", size=9, color=GREY)
    for axes in (picture, network):
        axes.set(xticks=[], yticks=[])
    _draw_probabilities(add_axes(figure, MARGIN + 660, HEAD, 240, 270), answer, class_names)
    return figure


def _draw_probabilities(axes: Axes, answer: Answer, class_names: Sequence[str]) -> None:
    shown = shown_classes(answer.probabilities)
    shares = [answer.probabilities[k] for k in shown]
    axes.barh(range(len(shown)), shares, color=[BLUE if k == answer.digit else PALE for k in shown])
    for row, share in enumerate(shares):
        axes.text(share + 0.02, row, f"{share:.1%}", va="center", size=8, color=INK)
    axes.set(xlim=(0, 1.3), xticks=[], yticks=range(len(shown)))
    axes.set_yticklabels([fit(class_names[k], 82, 8) for k in shown])
    axes.tick_params(length=0)  # a tick before a number looks like a minus sign
    axes.invert_yaxis()
    heading = "what it says" if len(shown) == len(class_names) else f"what it says: {len(shown)} of {len(class_names)}"
    axes.set_title(heading, size=9, color=GREY)
