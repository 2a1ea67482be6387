"""Figures of the scaling study."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ppl_bnn.files import written_atomically


def draw_scaling(rows: xr.Dataset, predicted: xr.Dataset, folder: Path) -> int:
    """Draw every figure that the table allows into `folder`, as PNG, and return their number.

    Args:
        rows, predicted: results of `table` and `predictions` in `ppl_bnn.scaling.table`.

    Raises:
        OSError: a figure cannot be written.
    """
    local = rows.isel(point=rows["mbit"].values == 0)
    figures: dict[str, Figure] = {
        "throughput": _bars(local, "samples_per_second", "samples a second", error="samples_per_second_std"),
        "fixed_epochs": _bars(local, "fixed_epochs_seconds", "seconds for the run's epochs"),
        "efficiency": _efficiency(rows, predicted),
        "prediction": _prediction(rows, predicted),
    }
    if rows["seconds_to_accuracy"].notnull().any():
        figures["time_to_accuracy"] = _bars(local, "seconds_to_accuracy", "seconds to the training accuracy")
    for name, label in (("batch", "batch of a rank"), ("device", "device")):
        if len(set(local[name].values)) > 1:
            figures[name] = _compared(local, name, label)
    if (rows["mbit"].values > 0).any():
        figures["links"] = _links(rows)
    for name, figure in figures.items():
        with written_atomically(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=130)
    return len(figures)


def _bars(rows: xr.Dataset, name: str, label: str, *, error: str | None = None) -> Figure:
    """Draw a group of bars for each number of ranks, with one bar for each run, device and batch."""
    figure, axes = _figure(label)
    _grouped(axes, rows, name, by="ranks", error=error)
    axes.set(xlabel="ranks", ylabel=label)
    return figure


def _compared(rows: xr.Dataset, by: str, label: str) -> Figure:
    figure, axes = _figure(f"Samples a second by {label}")
    _grouped(axes, rows, "samples_per_second", by=by, error="samples_per_second_std")
    axes.set(xlabel=label, ylabel="samples a second")
    return figure


def _grouped(axes: Axes, rows: xr.Dataset, name: str, *, by: str, error: str | None) -> None:
    groups = list(dict.fromkeys(rows[by].values.tolist()))
    others = [part for part in ("run", "device", "batch", "ranks") if part != by]
    keys = list(dict.fromkeys(zip(*(rows[part].values.tolist() for part in others), strict=True)))
    width = 0.8 / len(keys)
    for number, key in enumerate(keys):
        mine = np.all([rows[part].values == value for part, value in zip(others, key, strict=True)], axis=0)
        series = rows.isel(point=mine)
        x = [groups.index(value) + (number - (len(keys) - 1) / 2) * width for value in series[by].values.tolist()]
        spread = series[error].values if error else None
        told = [part for part in others if part == "run" or len(set(rows[part].values)) > 1]
        words = [_words(part, value) for part, value in zip(others, key, strict=True) if part in told]
        axes.bar(x, series[name].values, width, yerr=spread, label=", ".join(words))
    axes.set_xticks(range(len(groups)), [str(group) for group in groups])
    _legend(axes)


def _words(part: str, value: object) -> str:
    return f"{part} {value}" if part in ("batch", "ranks") else Path(str(value)).name


def _efficiency(rows: xr.Dataset, predicted: xr.Dataset) -> Figure:
    figure, axes = _figure("Efficiency T1 / TN, each rank's batch the same")
    _bands(axes, rows, predicted, "efficiency", lambda row: float(row["efficiency"]))
    axes.set(xlabel="ranks", ylabel="efficiency", ylim=(0, 1.1))
    return figure


def _prediction(rows: xr.Dataset, predicted: xr.Dataset) -> Figure:
    figure, axes = _figure("Samples a second: measured (points), and predicted with 90% bands")
    _bands(axes, rows, predicted, "samples_per_second", lambda row: float(row["samples_per_second"]))
    axes.set(xlabel="ranks", ylabel="samples a second", yscale="log")
    return figure


def _bands(
    axes: Axes, rows: xr.Dataset, predicted: xr.Dataset, name: str, measured: Callable[[xr.Dataset], float]
) -> None:
    ranks = predicted["ranks"].values
    for number, workload in enumerate(predicted["workload"].values.tolist()):
        low, middle, high = predicted[name].sel(workload=workload).values.T
        axes.plot(ranks, middle, color=f"C{number}", label=workload)
        axes.fill_between(ranks, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
        for place in range(rows.sizes["point"]):
            row = rows.isel(point=place)
            link = float(row["mbit"]), float(row["latency_ms"])
            same_link = link == (predicted.attrs["mbit"], 0) or int(row["ranks"]) == 1
            if same_link and row["point"].item().startswith(f"{workload}, "):
                axes.plot(int(row["ranks"]), measured(row), "o", color=f"C{number}")
    axes.set_xscale("log", base=2)
    _legend(axes)


def _links(rows: xr.Dataset) -> Figure:
    figure, axes = _figure("Seconds a step by link: measured (points), predicted by the other links (90%)")
    limited = rows.isel(point=rows["mbit"].values > 0)
    delays = np.unique(limited["latency_ms"].values).tolist()
    names = ("run", "ranks", "batch", "latency_ms")
    settings = list(zip(*(limited[name].values.tolist() for name in names), strict=True))
    for key in dict.fromkeys(settings):
        series = limited.isel(point=[each == key for each in settings]).sortby("mbit")
        # Points whose links differ only in latency lie beside each other.
        at = series["mbit"] * 1.08 ** delays.index(key[3])
        label = f"{Path(key[0]).name}, {key[1]} ranks" + (f", {key[3]:g} ms" if key[3] else "")
        (line,) = axes.plot(at, series["step_seconds"], "o", label=label)
        low, middle, high = series["held_out_step_seconds"].values.T
        errors = middle - low, high - middle
        axes.errorbar(at, middle, errors, fmt="_", capsize=4, color=line.get_color(), alpha=0.6)
    axes.set(xlabel="Mbit/s", ylabel="seconds a step", xscale="log", yscale="log")
    _legend(axes)
    return figure


def _legend(axes: Axes) -> None:
    # Below the axes, because there may be one line for each run, device and batch.
    axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
