"""The figures of numbers, counts and labels of yes or no, each drawn from `predictive.nc` alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ppl_bnn import metrics, number_metrics
from ppl_bnn.errors import UserError
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.layout import Groups, new_figure, save
from ppl_bnn.results.figures.predictive import snr_histograms, training_curves
from ppl_bnn.results.idata import load

# Blue, orange and green of Okabe and Ito, who chose them for the colour-blind.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
# More panels than this are one, of all numbers together; more points are every so many-th.
_PANELS, _POINTS = 4, 400
_LEVELS = tuple(k / 20 for k in range(1, 20))


@dataclass(frozen=True)
class Column:
    """One number of each example: what was observed, and what the predictive says of it, [N] each.

    Attributes:
        name: of y, for axes.
        interval: at the quantiles 5%, 25%, 75% and 95%, [N, 4], or None.
        mean_interval: the same of E[y | draw].
        where: position of the example.
    """

    name: str
    y: np.ndarray
    mean: np.ndarray
    interval: np.ndarray | None
    mean_interval: np.ndarray | None
    where: np.ndarray


def draw_number_figures(path: Path, folder: Path) -> list[Path]:
    """Draw every figure that a ``predictive.nc`` of numbers, counts or yes and no allows into `folder` as PNG.

    Numbers and counts: bands (against an input column), predicted_observed, quantile_calibration and pit. Labels of yes
    or no: reliability. All: training and snr. The attributes title and y_label, and the coordinates of the columns of
    x, name what they show. Without observed y there are training and snr alone.

    Raises:
        UserError: a result of classes, which `ppl_bnn.results.figures.predictive` draws.
        FileError: a result that cannot be read.
        OSError: a figure that cannot be written.
    """
    idata = load(path)
    groups = netcdf.groups_of(idata)
    if "class" in groups["posterior_predictive"].dims:
        raise UserError(f"{path} is of classes; draw it by ppl_bnn.results.figures.predictive.draw_figures")
    title, label = str(idata.attrs["title"]), str(idata.attrs.get("y_label", "y"))
    drawings: dict[str, Figure] = {}
    if "training" in groups:
        drawings["training"] = training_curves(groups, title)
    if "layers" in groups:
        drawings["snr"] = snr_histograms(groups, title)
    if "observed_data" in groups and "probs" in groups["posterior_predictive"]:
        drawings["reliability"] = binary_reliability(groups, title)
    elif "observed_data" in groups:
        drawings["predicted_observed"] = predicted_against_observed(groups, title, label)
        if "interval" in groups["uncertainty"]:
            if "x" in groups.get("constant_data", {}) and groups["constant_data"]["x"].ndim <= 2:
                drawings["bands"] = bands(groups, title, label)
            drawings["quantile_calibration"] = quantile_calibration(groups, title)
            drawings["pit"] = pit_histogram(groups, title)
    return [save(figure, folder / f"{name}.png") for name, figure in drawings.items()]


def bands(groups: Groups, title: str, label: str, *, column: int | None = None) -> Figure:
    """Predictive mean and intervals against one column of x, with the observed values.

    With one column the intervals are bands; with several they are a bar for each example, for the others vary too.

    Args:
        column: of x (default: the one whose ranks go best with those of the mean).
    """
    data = groups["constant_data"]["x"]
    x = data.values.reshape(len(data), -1)
    columns = columns_of(groups, label)
    if column is None:
        column = int(np.argmax([_rank_correlation(values, columns[0].mean) for values in x[columns[0].where].T]))
    names = [str(name) for name in data[data.dims[-1]].values] if data.ndim == 2 else ["x"]
    name = names[column] if names != ["0"] else "x"
    name = f"x[{name}]" if name.isdigit() else name
    other = "" if x.shape[1] == 1 else f"; the other {x.shape[1] - 1} columns of x vary from example to example"
    figure, axes = new_figure(
        f"{title}: predictive against {name}{other}", 7.5 * min(2, len(columns)), 4.8 * -(-len(columns) // 2),
        -(-len(columns) // 2), min(2, len(columns)), squeeze=False,
    )  # fmt: skip
    for axis, one in zip(axes.ravel(), columns, strict=False):
        order = np.argsort(x[one.where, column], kind="stable")
        alone = x.shape[1] == 1 and len(one.y) == len(x)
        (_draw_bands if alone else _draw_bars)(axis, x[one.where, column][order], one, order)
        axis.set(xlabel=name, ylabel=one.name)
        _legend_above(axis)
    for axis in axes.ravel()[len(columns) :]:
        axis.set_axis_off()
    return figure


def predicted_against_observed(groups: Groups, title: str, label: str) -> Figure:
    """Observed values against the predictive mean, with the 90% interval around each mean."""
    columns = columns_of(groups, label)
    shown = "\nlines: 90% predictive intervals" if columns[0].interval is not None else ""
    figure, axes = new_figure(
        f"{title}: predicted against observed{shown}", 5.6 * min(2, len(columns)), 5.6 * -(-len(columns) // 2),
        -(-len(columns) // 2), min(2, len(columns)), squeeze=False,
    )  # fmt: skip
    for axis, one in zip(axes.ravel(), columns, strict=False):
        some = _some(len(one.y))
        said = ""
        if one.interval is not None:
            low, high = one.interval[:, 0], one.interval[:, 3]
            inside = (low <= one.y) & (one.y <= high)
            known = np.isfinite(low)
            said = f"; {100 * inside[known].mean():.0f}% of {known.sum():,} inside"
            for mask, colour, name in ((inside, BLUE, "inside"), (~inside & known, ORANGE, "outside")):
                rows = some[mask[some]]
                axis.vlines(one.mean[rows], low[rows], high[rows], color=colour, linewidth=0.8, alpha=0.45)
                axis.plot(one.mean[rows], one.y[rows], "o" if mask is inside else "s", color=colour, markersize=3,
                          label=f"observed {name} the interval")  # fmt: skip
        else:
            axis.plot(one.mean[some], one.y[some], "o", color=BLUE, markersize=3, label="examples")
        ends = [min(one.mean.min(), one.y.min()), max(one.mean.max(), one.y.max())]
        axis.plot(ends, ends, "--", color="0.3", linewidth=1, label="predicted = observed")
        rmse = np.sqrt(np.mean((one.mean - one.y) ** 2))
        axis.set(xlabel=f"predicted {one.name} (mean)", ylabel=f"observed {one.name}")
        axis.set_title(f"RMSE {rmse:.3g}{said}", fontsize=9)
        _legend_above(axis)
    for axis in axes.ravel()[len(columns) :]:
        axis.set_axis_off()
    return figure


def quantile_calibration(groups: Groups, title: str) -> Figure:
    """Share of the observed values below each predictive quantile, with the band of a perfect predictive."""
    pit, upper = pit_of(groups)
    levels, count = np.array(_LEVELS), pit.numel()
    shares = number_metrics.observed_shares(pit, upper, levels=_LEVELS).numpy()
    error = number_metrics.quantile_calibration_error(pit, upper, levels=_LEVELS)
    figure, axis = new_figure(f"{title}: calibration of quantiles, mean error {error:.3f}", 5.6, 5.6, 1, 1)
    low, high = (stats.binom.ppf(side, count, levels) / count for side in (0.05, 0.95))
    axis.fill_between(
        levels, low, high, color="0.5", alpha=0.3, linewidth=0, label=f"90% of calibrated predictives, N = {count:,}"
    )
    axis.plot([0, 1], [0, 1], "--", color="0.3", linewidth=1, label="perfect calibration")
    axis.plot(levels, shares, "o-", color=BLUE, markersize=4, label="observed")
    axis.set(xlabel="nominal level of the quantile", ylabel="share of y observed below it", xlim=(0, 1), ylim=(0, 1))
    axis.set_aspect("equal")
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def pit_histogram(groups: Groups, title: str) -> Figure:
    """Histogram of the probability integral transform of y, with the band of a perfect predictive.

    Of counts each y is spread over the probabilities between those of less and of no more than it (Czado et al. 2009).
    """
    pit, upper = pit_of(groups)
    count = pit.numel()
    bins = int(np.clip(count // 20, 5, 20))
    inner = [at / bins for at in range(1, bins)]
    below = np.concatenate(([0.0], number_metrics.observed_shares(pit, upper, levels=inner).numpy(), [1.0]))
    heights = np.diff(below) * bins
    figure, axis = new_figure(
        f"{title}: where y lies in its predictive distribution (PIT)\n"
        "a hump in the middle: intervals too wide; at the ends: too narrow; a slope: biased",
        7, 4.4, 1, 1,
    )  # fmt: skip
    low, high = (stats.binom.ppf(side, count, 1 / bins) / count * bins for side in (0.05, 0.95))
    axis.axhspan(low, high, color="0.5", alpha=0.3, linewidth=0, label=f"90% of calibrated predictives, N = {count:,}")
    axis.axhline(1, linestyle="--", color="0.3", linewidth=1, label="perfect calibration")
    axis.bar(np.arange(bins) / bins, heights, 1 / bins, align="edge", color=BLUE, alpha=0.6, edgecolor="white")
    axis.set(xlabel="probability integral transform of y", ylabel="density", xlim=(0, 1))
    axis.set_ylim(0, 1.25 * max(heights.max(), high))
    axis.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    return figure


def binary_reliability(groups: Groups, title: str) -> Figure:
    """Share of y = 1 against its probability in 15 equal bins, with the share of labels in each; all labels pooled."""
    probs = torch.from_numpy(groups["uncertainty"]["mean_probs"].values)
    labels = torch.from_numpy(groups["observed_data"]["y"].values)
    # Other labels are ignored ones.
    known = (labels == 0) | (labels == 1)
    probs, labels = probs[known], labels[known]
    probability, share, count = (values.numpy() for values in metrics.binary_reliability(probs, labels))
    bins = len(count)
    figure, (above, below) = new_figure(
        f"Reliability on {title}: ECE {metrics.binary_ece(probs, labels):.4f}", 5.5, 6.5, 2, 1,
        height_ratios=(3, 1), sharex=True,
    )  # fmt: skip
    there = count > 0
    low, high = (stats.binom.ppf(s, count[there], probability[there]) / count[there] for s in (0.05, 0.95))
    above.vlines(
        probability[there], low, high, color="0.5", alpha=0.4, linewidth=6, label="90% of calibrated predictives"
    )
    above.plot([0, 1], [0, 1], "--", color="0.3", linewidth=1, label="perfect calibration")
    above.plot(probability[there], share[there], "o", color=BLUE, markersize=5, label="observed")
    above.set(ylabel="share of y = 1", ylim=(-0.02, 1.02), xlim=(0, 1))
    _legend_above(above)
    below.bar(np.arange(bins) / bins, count / count.sum(), 1 / bins, align="edge", color="0.6", edgecolor="white")
    below.set(xlabel="probability of y = 1", ylabel="share of labels")
    return figure


def columns_of(groups: Groups, label: str) -> list[Column]:
    """The numbers of y, a column for each; one column of all together where there are more than a few."""
    said, y = groups["uncertainty"], groups["observed_data"]["y"].values
    count, numbers = len(y), int(np.prod(y.shape[1:]))
    parts: dict[str, Any] = {"y": y.reshape(count, numbers), "mean": said["mean"].values.reshape(count, numbers)}
    for name in ("interval", "mean_interval"):
        parts[name] = said[name].values.reshape(count, numbers, -1) if name in said else None
    where = np.arange(count)[:, None].repeat(numbers, 1)
    if numbers > _PANELS:
        parts = {
            name: None if of is None else of.reshape(count * numbers, 1, *of.shape[2:]) for name, of in parts.items()
        }
        where, numbers = where.reshape(-1, 1), 1
    names = [label] if numbers == 1 else [f"{label}[{at}]" for at in range(numbers)]
    return [
        Column(
            name=name,
            y=parts["y"][:, at],
            mean=parts["mean"][:, at],
            interval=None if parts["interval"] is None else parts["interval"][:, at],
            mean_interval=None if parts["mean_interval"] is None else parts["mean_interval"][:, at],
            where=where[:, at],
        )
        for at, name in enumerate(names)
    ]


def pit_of(groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """Both limits of the PIT of y (`number_metrics.pit_limits`), [N] each."""
    said = groups["uncertainty"]
    lower, upper = (torch.from_numpy(said[name].values).flatten() for name in ("pit_lower", "pit_upper"))
    return lower, upper


def _draw_bands(axis: Axes, x: np.ndarray, one: Column, order: np.ndarray) -> None:
    assert one.interval is not None
    assert one.mean_interval is not None
    bounds = one.interval[order]
    axis.fill_between(x, bounds[:, 0], bounds[:, 3], color=BLUE, alpha=0.18, linewidth=0, label="90% of y")
    axis.fill_between(x, bounds[:, 1], bounds[:, 2], color=BLUE, alpha=0.3, linewidth=0, label="50% of y")
    of_mean = one.mean_interval[order]
    axis.fill_between(
        x, of_mean[:, 0], of_mean[:, 3], color=ORANGE, alpha=0.5, linewidth=0, label="90% of the mean (epistemic)"
    )
    axis.plot(x, one.mean[order], color="black", linewidth=1.3, label="mean")
    some = _some(len(x))
    axis.plot(x[some], one.y[order][some], "o", color="0.2", markersize=2.5, alpha=0.7, label="observed")


def _draw_bars(axis: Axes, x: np.ndarray, one: Column, order: np.ndarray) -> None:
    assert one.interval is not None
    assert one.mean_interval is not None
    some = _some(len(x))
    bounds, of_mean = one.interval[order][some], one.mean_interval[order][some]
    x, rows = x[some], order[some]
    axis.vlines(x, bounds[:, 0], bounds[:, 3], color=BLUE, alpha=0.25, linewidth=1, label="90% of y")
    axis.vlines(x, bounds[:, 1], bounds[:, 2], color=BLUE, alpha=0.55, linewidth=1.6, label="50% of y")
    axis.vlines(x, of_mean[:, 0], of_mean[:, 3], color=ORANGE, linewidth=1.6, label="90% of the mean (epistemic)")
    axis.plot(x, one.mean[rows], "_", color="black", markersize=4, label="mean")
    axis.plot(x, one.y[rows], "o", color="0.2", markersize=2.5, label="observed")


def _some(count: int) -> np.ndarray:
    """At most so many positions that points can be told apart, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, _POINTS)).round().astype(int))


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return abs(float(stats.spearmanr(one, other).statistic))


def _legend_above(axis: Axes) -> None:
    columns = 3 if len(axis.get_legend_handles_labels()[0]) > 3 else 2
    above = (0.5, 1.05 if axis.get_title() else 1.0)
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=above, ncols=columns)
