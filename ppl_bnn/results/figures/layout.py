"""What the figures share: their size and titles, an axis for probabilities, images, and how they are written."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ppl_bnn.files import written_atomically

Groups = dict[str, xr.Dataset]


def new_figure(title: str, width: float, height: float, rows: int, columns: int, **keywords: Any) -> tuple[Figure, Any]:
    """A figure of this size (inches) with `rows` x `columns` axes; the title is wrapped to the width."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(wrapped(title, width, 10), fontsize=10)
    ratios: dict[str, Any] = {
        name: keywords.pop(name) for name in ("height_ratios", "width_ratios") if name in keywords
    }
    axes = figure.subplots(rows, columns, gridspec_kw=ratios, **keywords)
    for axis in np.atleast_1d(axes).ravel():
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, atomically."""
    with written_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    return path


def noun(groups: Groups) -> str:
    """What a figure calls the examples of a result."""
    return "images" if "image" in groups.get("constant_data", {}) else "examples"


def wrapped(text: str, inches: float, points: float) -> str:
    """Text in lines that fit a width in inches at a font size in points."""
    # A letter of matplotlib's font is 0.6 of its size wide on average; 72 points are an inch.
    letters = max(8, int(72 * inches / (0.6 * points)))
    return "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, letters))


def probability_axis(axis: Axes) -> None:
    """Scale x for a probability: a peak at 0 or 1 lies inside the axes, and the labels of neighbours do not meet."""
    axis.set_xlim(-0.04, 1.04)
    axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])


def logarithmic_axis(axis: Axes, label: str) -> None:
    """Make x logarithmic, with labels that do not meet. Call it when everything is drawn."""
    axis.set(xscale="log", xlabel=label)
    # A range of less than a decade needs labels between the powers of ten; over many decades they would overlap.
    low, high = axis.get_xlim()
    between = (1.0, 2.0, 3.0, 5.0, 7.0) if high < 10 * low else (1.0, 3.0) if high < 1e3 * low else (1.0,)
    axis.xaxis.set_major_locator(LogLocator(subs=between))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def show_image(axis: Axes, image: np.ndarray) -> None:
    """Show one image [channels, height, width], a grey one dark on white."""
    axis.imshow(image[0] if len(image) == 1 else image.transpose(1, 2, 0), cmap="gray_r", interpolation="nearest")
    axis.set_axis_off()
