"""Figures of the scaling study, in panels of one network each."""

from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ppl_bnn.results.figures.layout import save
from ppl_bnn.scaling.prediction import first_messages

_MARKERS = "osD^vP*X"
# What bars are grouped by: its label, and what tells the bars of a group apart beside the workload.
_GROUPS = {
    "ranks": ("ranks", ()),
    "cycle_ms": ("Horovod's cycle time, ms", ("ranks", "fusion_mb")),
    "fusion_mb": ("Horovod's fusion buffer, MiB", ("ranks", "cycle_ms")),
}
_WORDS = {"ranks": "{} ranks", "cycle_ms": "cycle {:g} ms", "fusion_mb": "fusion {:g} MiB"}


def draw_scaling(rows: xr.Dataset, predicted: xr.Dataset | None, folder: Path) -> int:
    """Draw every figure that the table allows into `folder`, as PNG, and return their number.

    Args:
        rows: result of `ppl_bnn.scaling.table.table`, with the ``held_out_step_seconds`` of `held_out`.
        predicted: result of `ppl_bnn.scaling.prediction.predictions`.

    Raises:
        OSError: a figure cannot be written.
    """
    local = rows.isel(point=rows["mbit"].values == 0)
    alike, with_links = first_messages(local), first_messages(rows)
    figures: dict[str, Figure] = {
        "throughput": _throughput(alike),
        "fixed_epochs": _fixed_epochs(alike),
        "efficiency": _efficiency(with_links, predicted),
    }
    if predicted is not None:
        figures["prediction"] = _prediction(with_links, predicted)
    if rows["seconds_to_accuracy"].notnull().any():
        figures["time_to_accuracy"] = _time_to_accuracy(alike)
    for name in ("batch", "device"):
        if len(set(local[name].values)) > 1:
            figures[name] = _compared(alike, name)
    several = local.isel(point=local["ranks"].values > 1)
    for name in ("cycle_ms", "fusion_mb"):
        if len(set(several[name].values[np.isfinite(several[name].values)])) > 1:
            figures[name] = _throughput(several, name)
    if (rows["mbit"].values > 0).any():
        figures["links"] = _links(rows)
    for name, figure in figures.items():
        save(figure, folder / f"{name}.png")
    return len(figures)


def _throughput(rows: xr.Dataset, by: str = "ranks") -> Figure:
    figure, panels = _panels("Samples a second of all ranks (bars: standard deviation over steps)", rows)
    for axes, (network, its) in zip(panels[:, 0], _by_network(rows), strict=True):
        _speeds(axes, its, network, by=by)
    return figure


def _fixed_epochs(rows: xr.Dataset) -> Figure:
    figure, panels = _panels("Time of the run's own epochs over all its images", rows)
    for axes, (network, its) in zip(panels[:, 0], _by_network(rows), strict=True):
        _times(axes, its, network)
    return figure


def _efficiency(rows: xr.Dataset, predicted: xr.Dataset | None) -> Figure:
    title = "Efficiency T1 / TN, each rank's batch the same: measured with 1 sigma (large), predicted with 90% (small)"
    figure, panels = _panels(title, rows)
    for axes, (network, its) in zip(panels[:, 0], _by_network(rows), strict=True):
        _measured_and_predicted(axes, its, predicted, "efficiency", error="efficiency_std")
        # Wide bands must not hide the points.
        top = max(1.1 * float(np.nan_to_num(its["efficiency"].max())), min(1.5, axes.get_ylim()[1]))
        axes.set(title=network, ylabel="efficiency", ylim=(0, top))
    return figure


def _prediction(rows: xr.Dataset, predicted: xr.Dataset) -> Figure:
    title = "Samples a second: measured with the standard deviation over steps (large), predicted with 90% (small)"
    figure, panels = _panels(title, rows)
    for axes, (network, its) in zip(panels[:, 0], _by_network(rows), strict=True):
        _measured_and_predicted(axes, its, predicted, "samples_per_second", error="samples_per_second_std")
        axes.set(title=network, ylabel="samples a second", yscale="log")
    return figure


def _time_to_accuracy(rows: xr.Dataset) -> Figure:
    accuracies = rows["accuracy"].values
    figure, panels = _panels("Time to a training accuracy", rows, lines=len(accuracies))
    for axes, (network, its) in zip(panels[:, 0], _by_network(rows), strict=True):
        for number, (workload, points) in enumerate(_by_workload(its)):
            for place, accuracy in enumerate(accuracies):
                seconds = points["seconds_to_accuracy"].sel(accuracy=accuracy)
                style: dict[str, Any] = {"color": f"C{number}", "marker": _MARKERS[place % len(_MARKERS)]}
                filled: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "white"} if place % 2 else {}
                axes.plot(points["ranks"], seconds, **style, **filled, label=f"{accuracy:g}: {workload}")
        _rank_axis(axes, its)
        axes.set(title=network, ylabel="seconds", ylim=(0, 1.05 * axes.get_ylim()[1]))
        _legend(axes)
    return figure


def _compared(rows: xr.Dataset, by: str) -> Figure:
    """Draw a row for each network: the throughput with each batch (or device), the epochs' time, and efficiency."""
    values = list(dict.fromkeys(rows[by].values.tolist()))
    figure, panels = _panels(f"By {by}", rows, columns=len(values) + 2)
    for (*speeds, times, efficiency), (network, its) in zip(panels, _by_network(rows), strict=True):
        for axes, value in zip(speeds, values, strict=True):
            _speeds(axes, its.isel(point=its[by].values == value), f"{network}, {by} {value}")
            if by == "batch":
                axes.set(ylim=(0, 1.15 * float(its["samples_per_second"].max())))
        _times(times, its, network)
        _measured_and_predicted(efficiency, its, None, "efficiency", error="efficiency_std")
        _rank_axis(efficiency, its)
        efficiency.set(title=network, ylabel="efficiency, 1 sigma", ylim=(0, 1.05 * efficiency.get_ylim()[1]))
    return figure


def _speeds(axes: Axes, rows: xr.Dataset, title: str, *, by: str = "ranks") -> None:
    _bars(axes, rows, "samples_per_second", by=by, error="samples_per_second_std")
    axes.set(title=title, ylabel="samples a second")


def _times(axes: Axes, rows: xr.Dataset, title: str) -> None:
    _bars(axes, rows, "fixed_epochs_seconds", scale=1 / 60)
    axes.set(title=title, ylabel="minutes (hatched: extrapolated)")


def _bars(
    axes: Axes, rows: xr.Dataset, name: str, *, by: str = "ranks", error: str | None = None, scale: float = 1.0
) -> None:
    """Draw a group of bars for each value of `by`, with one bar for each setting of the others.

    Without `error` the bars are times, and hatched where they were extrapolated.
    """
    groups = np.unique(rows[by].values).tolist()
    label, parts = _GROUPS[by]
    others = [part for part in parts if len(np.unique(rows[part].values)) > 1]
    keys = list(zip(*(rows[part].values.tolist() for part in ("workload", *others)), strict=True))
    series = list(dict.fromkeys(keys))
    width = 0.8 / len(series)
    for number, key in enumerate(series):
        its = rows.isel(point=[other == key for other in keys])
        x = [groups.index(value) + (number - (len(series) - 1) / 2) * width for value in its[by].values.tolist()]
        words = [key[0], *(_WORDS[part].format(value) for part, value in zip(others, key[1:], strict=True))]
        errors = its[error].values if error else None
        bars = axes.bar(x, scale * its[name].values, width, yerr=errors, capsize=2, label=", ".join(words))
        if error is None:
            for bar, measured in zip(bars, its["fixed_epochs_measured"].values, strict=True):
                bar.set(alpha=1.0 if measured else 0.6, hatch="" if measured else "////", edgecolor="white")
    axes.set_xticks(range(len(groups)), [f"{group:g}" for group in groups])
    axes.set(xlabel=label)
    _legend(axes)


def _measured_and_predicted(
    axes: Axes, rows: xr.Dataset, predicted: xr.Dataset | None, name: str, *, error: str
) -> None:
    mbit = 0.0 if predicted is None else predicted.attrs["mbit"]
    workloads = list(_by_workload(rows))
    for number, (workload, points) in enumerate(workloads):
        # Side by side, so that the error bars can be told apart.
        aside = 2 ** (0.12 * (number - (len(workloads) - 1) / 2))
        style: dict[str, Any] = {"color": f"C{number}", "marker": _MARKERS[number % len(_MARKERS)], "capsize": 3}
        if predicted is not None and workload in predicted["workload"].values:
            low, middle, high = predicted[name].sel(workload=workload).values.T
            axes.errorbar(aside * predicted["ranks"], middle, (middle - low, high - middle), **style, markersize=3,
                          linewidth=0.8, alpha=0.5)  # fmt: skip
        same_link = (points["mbit"].values == mbit) & (points["latency_ms"].values == 0)
        own = points.isel(point=same_link | (points["ranks"].values == 1))
        line = "-" if predicted is None else "none"
        axes.errorbar(aside * own["ranks"], own[name], own[error], **style, linestyle=line, label=workload)
    _rank_axis(axes, rows if predicted is None else predicted)
    _legend(axes)


def _links(rows: xr.Dataset) -> Figure:
    title = "Seconds a step by link: measured (points), predicted by the other links (90%)"
    figure, panels = _panels(title, rows.assign(network=("point", ["all"] * rows.sizes["point"])))
    axes = panels.item()
    limited = rows.isel(point=rows["mbit"].values > 0)
    delays = np.unique(limited["latency_ms"].values).tolist()
    names = ("workload", "ranks", "latency_ms")
    settings = list(zip(*(limited[name].values.tolist() for name in names), strict=True))
    for key in dict.fromkeys(settings):
        series = limited.isel(point=[each == key for each in settings]).sortby("mbit")
        # Points whose links differ only in latency lie beside each other.
        at = series["mbit"] * 1.08 ** delays.index(key[2])
        label = f"{key[0]}, {key[1]} ranks" + (f", {key[2]:g} ms" if key[2] else "")
        (line,) = axes.plot(at, series["step_seconds"], "o", label=label)
        low, middle, high = series["held_out_step_seconds"].values.T
        errors = middle - low, high - middle
        axes.errorbar(at, middle, errors, fmt="_", capsize=4, color=line.get_color(), alpha=0.6)
    axes.set(xlabel="Mbit/s", ylabel="seconds a step", xscale="log", yscale="log")
    _legend(axes)
    return figure


def _by_network(rows: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
    for network in dict.fromkeys(rows["network"].values.tolist()):
        yield network, rows.isel(point=rows["network"].values == network)


def _by_workload(rows: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
    for workload in dict.fromkeys(rows["workload"].values.tolist()):
        yield workload, rows.isel(point=rows["workload"].values == workload).sortby("ranks")


def _rank_axis(axes: Axes, rows: xr.Dataset) -> None:
    ranks = np.unique(rows["ranks"].values).tolist()
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(count) for count in ranks])
    axes.minorticks_off()
    axes.set(xlabel="ranks")


def _legend(axes: Axes) -> None:
    # Below the axes, because there may be one line for each run, device and batch.
    axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _panels(title: str, rows: xr.Dataset, *, columns: int = 1, lines: int = 1) -> tuple[Figure, NDArray]:
    """Return a figure and its panels [networks, columns]: one row of a figure, or a row a network with more columns.

    Args:
        lines: number of lines that each workload has in a legend.
    """
    networks = list(_by_network(rows))
    entries = lines * max(len(set(its["workload"].values.tolist())) for _, its in networks)
    height = 4.0 + 0.2 * entries
    if columns == 1:
        figure = Figure(figsize=(max(6.5, 5.5 * len(networks)), height), layout="constrained")
        panels = figure.subplots(1, len(networks), squeeze=False).T
    else:
        figure = Figure(figsize=(4.6 * columns, height * len(networks)), layout="constrained")
        panels = figure.subplots(len(networks), columns, squeeze=False)
    figure.suptitle(fill(title, round(11 * figure.get_figwidth())), fontsize="medium")
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
