"""What the cost model says of more ranks, and of links whose points it was not fitted to."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ppl_bnn.scaling.cost_model import Link, Point, fit_cost_model

RANKS = tuple(2**k for k in range(11))


def predictions(rows: xr.Dataset, *, mbit: float | None = None, num_samples: int = 200) -> xr.Dataset | None:
    """Predict samples a second and efficiency on 1 to 1024 ranks, for the runs that were measured on several.

    If Horovod's cycle time or fusion buffer was swept, the points with the first of each are used.

    Args:
        rows: a result of `ppl_bnn.scaling.table.table`.
        mbit: the links' Mbit/s; None for the speed of the machine's own.

    Returns:
        A Dataset over ``workload``, ``ranks`` and ``quantile`` (5, 50, 95%), or None if no run was measured on several
        ranks. The attribute ``ratios`` has one line for each Bayesian network: its time over that of its deterministic
        twin.
    """
    rows = first_messages(rows)
    sent = _sent(rows)
    if not sent:
        return None
    model = fit_cost_model(_points(rows), num_samples=num_samples)
    link = None if mbit is None else Link(mbit * 1e6 / 8)
    workloads = {row["workload"].item(): row for row in _each(rows) if row["run"].item() in sent}
    times = {
        name: [model.measured(Point(name, ranks, *sent[row["run"].item()], link=link)) for ranks in RANKS]
        for name, row in workloads.items()
    }
    speeds = [
        [_quantiles(float(row["batch"]) * ranks / time) for ranks, time in zip(RANKS, times[name], strict=True)]
        for name, row in workloads.items()
    ]
    efficiency = [[_quantiles(times[name][0] / time) for time in times[name]] for name in workloads]
    dimensions = ("workload", "ranks", "quantile")
    return xr.Dataset(
        {"samples_per_second": (dimensions, speeds), "efficiency": (dimensions, efficiency)},
        coords={"workload": list(workloads), "ranks": list(RANKS), "quantile": [0.05, 0.5, 0.95]},
        attrs={"ratios": "\n".join(_ratios(workloads, times)), "mbit": mbit or 0.0},
    )


def held_out(rows: xr.Dataset, *, num_samples: int = 100) -> xr.DataArray:
    """Predict each link's points by a fit to the points of the other links. This needs three links or more.

    Returns:
        Seconds a step over ``point`` and ``quantile`` (5, 50, 95%, with the model's own error), NaN where there is no
        prediction.
    """
    quantiles = np.full((rows.sizes["point"], 3), math.nan)
    points = _points(rows)
    links = {point.link for point in points if point.link is not None}
    for link in links if len(links) > 2 else []:
        model = fit_cost_model([point for point in points if point.link != link], num_samples=num_samples)
        for place, point in enumerate(points):
            if point.link == link:
                quantiles[place] = _quantiles(model.measured(point))
    return xr.DataArray(quantiles, coords={"quantile": [0.05, 0.5, 0.95]}, dims=("point", "quantile"))


def first_messages(rows: xr.Dataset) -> xr.Dataset:
    """Return the points on one rank, and those with the cycle time and fusion buffer of the first on several."""
    several = rows["ranks"].values > 1
    kept = np.ones(len(several), dtype=bool)
    for name in ("cycle_ms", "fusion_mb"):
        values = rows[name].values
        first = values[several][:1]
        kept &= ~several | (values == first) | (np.isnan(values) & np.isnan(first)) if several.any() else True
    return rows.isel(point=kept)


def _each(rows: xr.Dataset) -> list[xr.Dataset]:
    return [rows.isel(point=number) for number in range(rows.sizes["point"])]


def _points(rows: xr.Dataset) -> list[Point]:
    points = []
    for row in _each(rows):
        seconds = row["seconds"].values
        mbit, delay = float(row["mbit"]), float(row["latency_ms"]) / 1e3
        link = Link(mbit * 1e6 / 8, delay) if mbit else None
        sent = float(row["messages"]), float(row["bytes"])
        points.append(Point(row["workload"].item(), int(row["ranks"]), *sent, seconds[np.isfinite(seconds)], link))
    return points


def _sent(rows: xr.Dataset) -> dict[str, tuple[float, float]]:
    """Return the messages and bytes of gradients a step of each run, from its first point on several ranks."""
    found: dict[str, tuple[float, float]] = {}
    for row in _each(rows):
        if int(row["ranks"]) > 1:
            found.setdefault(row["run"].item(), (float(row["messages"]), float(row["bytes"])))
    return found


def _quantiles(draws: NDArray) -> list[float]:
    quantiles: list[float] = np.quantile(draws, (0.05, 0.5, 0.95)).tolist()
    return quantiles


def _ratios(workloads: Mapping[str, xr.Dataset], times: Mapping[str, Sequence[NDArray]]) -> list[str]:
    lines = []
    for name, row in workloads.items():
        for other, twin in workloads.items():
            same = all(row[part].item() == twin[part].item() for part in ("network", "data", "device", "batch"))
            if same and not row["deterministic"] and twin["deterministic"]:
                ratios = [_quantiles(times[name][RANKS.index(n)] / times[other][RANKS.index(n)]) for n in (1, 128)]
                one, many = (f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in ratios)
                lines.append(f"time of {name} over {other}: {one} on 1 rank, {many} predicted on 128")
    return lines
