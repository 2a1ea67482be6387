"""The least certain sequences as lines over time: `least_certain.png`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.layout import new_figure, save
from ppl_bnn.results.figures.least_certain import said

_COLUMNS = 4


def draw_least_certain(
    predictive: Path,
    sequences: Callable[[np.ndarray], np.ndarray],
    path: Path,
    *,
    scale: tuple[float, float] | None = None,
    count: int = 12,
) -> Path:
    """Draw the test sequences with the most total uncertainty into `path` (PNG) and return it.

    Args:
        sequences: gives the sequences at some positions [M], [M, T, D], with D few.
        scale: mean and standard deviation by which numeric targets were standardized.
        count: number of sequences.

    Raises:
        FileError: the result cannot be read.
        OSError: the figure cannot be written.
    """
    idata = inference_data.load(predictive)
    groups = netcdf.groups_of(idata)
    about, y = groups["uncertainty"], groups["observed_data"]["y"].values
    each = {name: about[name].values.reshape(len(y), -1).mean(1) for name in ("total", "epistemic")}
    at = np.argsort(-each["total"], kind="stable")[:count]
    columns, _ = said(groups, at, scale)
    answers = {}
    if "predicted" in columns:
        pairs = zip(at, columns["observed"], columns["predicted"], strict=True)
        answers = {place: f": {_text(observed)}, predicted {_text(predicted)}" for place, observed, predicted in pairs}
    rows = -(-len(at) // _COLUMNS)
    units = str(idata.attrs.get("units", "nats"))
    figure, axes = new_figure(
        f"{idata.attrs['title']}: the least certain test sequences\nuncertainty: total / epistemic, in {units}",
        11, 2.3 * rows + 0.8, rows, _COLUMNS, sharex=True, squeeze=False,
    )  # fmt: skip
    for axis, place, values in zip(axes.ravel(), at, sequences(at), strict=False):
        for feature, line in enumerate(values.T):
            axis.plot(line, linewidth=1, color=f"C{feature}", label=f"feature {feature}")
        parts = " / ".join(f"{each[name][place]:.2g}" for name in each)
        axis.set_title(f"#{place}{answers.get(place, '')}\n{parts}", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes.ravel()[len(at) :]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("time step", fontsize=8)
    if axes[0, 0].lines and len(axes[0, 0].lines) > 1:
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(), frameon=False, ncols=4, fontsize=8, loc="outside lower center"
        )
    return save(figure, path)


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
