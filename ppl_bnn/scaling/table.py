"""The table of the scaling study, from the results of each training, and the predictions of the cost model."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ppl_bnn.errors import UserError
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.config import TrainConfig
from ppl_bnn.scaling.cost_model import Link, Point, fit_cost_model

KINDS = ("gradients", "step", "batch norm", "broadcast", "other")
RANKS = tuple(2**k for k in range(11))
PUBLISHED = (
    "published (Sharma, Jennings 2020): BNN over CNN 2.4 for fixed epochs; VGG-16 on 128 nodes 3.37 over 1.3 minutes, "
    "that is 2.59"
)
_IMAGES = {"mnist": 60_000, "fashion-mnist": 60_000, "cifar10": 50_000, "digits100k": 100_000}
_SETTING = ("run", "device", "batch", "ranks", "mbit", "latency_ms")


def table(points: Sequence[tuple[Mapping[str, Any], Path]], accuracy: float, *, whole: bool) -> xr.Dataset:
    """Return one row for each setting. The steps of its repeats are concatenated.

    Args:
        points: for each point its run, device, batch (of one rank), ranks, mbit and latency_ms (of its links; 0 for the
            machine's own), and the out folder of its training.
        accuracy: training accuracy to time.
        whole: whether the trainings are whole ones. If not, no accuracy is reported.

    Returns:
        A Dataset over ``point``: samples_per_second with its ``_std`` over steps, step_seconds (median),
        fixed_epochs_seconds (the run's own epochs over all its images, at this speed), efficiency T1 / TN by the
        medians, seconds_to_accuracy (NaN if not reached), communication_share (share of the steps' time in which rank
        0 waited for gradients and step messages), messages and bytes of gradients a step. Over ``point`` and
        ``kind``: call_count, call_mean_bytes, call_seconds, over the whole training. Over ``point`` and ``step``:
        seconds. No speed counts the first step of a training.
    """
    found: dict[tuple[Any, ...], list[tuple[Path, dict[str, Any]]]] = {}
    for setting, folder in points:
        content = json.loads((folder / "performance.json").read_text(encoding="utf-8"))
        found.setdefault(tuple(setting[name] for name in _SETTING), []).append((folder, content))
    rows = [
        {**dict(zip(_SETTING, key, strict=True)), **_row(parts, _epochs(key[0]), accuracy, whole)}
        for key, parts in found.items()
    ]
    for row in rows:
        alone = [
            r for r in rows if r["ranks"] == 1 and all(r[name] == row[name] for name in ("run", "device", "batch"))
        ]
        row["efficiency"] = alone[0]["step_seconds"] / row["step_seconds"] if alone else math.nan
    calls = [row.pop("calls") for row in rows]
    steps = [row.pop("steps") for row in rows]
    names = [
        f"{Path(row['run']).name}, {row['device']}, batch {row['batch']}, {row['ranks']} ranks"
        + (f" at {row['mbit']:g} Mbit/s" if row["mbit"] else "")
        + (f", {row['latency_ms']:g} ms" if row["latency_ms"] else "")
        for row in rows
    ]
    padded = np.full((len(rows), max(map(len, steps))), math.nan)
    for line, values in zip(padded, steps, strict=True):
        line[: len(values)] = values
    variables: dict[str, Any] = {name: ("point", [row[name] for row in rows]) for name in rows[0]}
    for name in ("count", "mean_bytes", "seconds"):
        variables[f"call_{name}"] = (("point", "kind"), [[call[kind][name] for kind in KINDS] for call in calls])
    variables["seconds"] = (("point", "step"), padded)
    dataset = xr.Dataset(variables, coords={"point": names, "kind": list(KINDS)})
    for name, units in (("samples_per_second", "1/s"), ("step_seconds", "s"), ("fixed_epochs_seconds", "s"),
                        ("seconds_to_accuracy", "s"), ("call_mean_bytes", "bytes"), ("call_seconds", "s"),
                        ("seconds", "s"), ("mbit", "Mbit/s"), ("latency_ms", "ms")):  # fmt: skip
        dataset[name].attrs["units"] = units
    return dataset


def predictions(rows: xr.Dataset, *, mbit: float | None = None, num_samples: int = 200) -> xr.Dataset:
    """Predict samples a second and efficiency on 1 to 1024 ranks.

    The result is over ``workload``, ``ranks`` and ``quantile`` (5, 50, 95%). The links have `mbit` Mbit/s, or by
    default the speed of the machine's own. The attribute ``ratios`` has one line for each Bayesian network: its time
    over that of its deterministic twin.
    """
    model = fit_cost_model(_model_points(rows), num_samples=num_samples)
    link = None if mbit is None else Link(mbit * 1e6 / 8)
    found, efficiency, times = [], [], {}
    workloads = {_workload(row): row for row in _rows(rows)}
    for name, row in workloads.items():
        sent = _sent(rows, row)
        times[name] = [model.measured(Point(name, ranks, *sent, link=link)) for ranks in RANKS]
        found.append([_quantiles(float(row["batch"]) * n / time) for n, time in zip(RANKS, times[name], strict=True)])
        efficiency.append([_quantiles(times[name][0] / time) for time in times[name]])
    dimensions = ("workload", "ranks", "quantile")
    return xr.Dataset(
        {"samples_per_second": (dimensions, found), "efficiency": (dimensions, efficiency)},
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
    points = _model_points(rows)
    links = {point.link for point in points if point.link is not None}
    for link in links if len(links) > 2 else []:
        model = fit_cost_model([point for point in points if point.link != link], num_samples=num_samples)
        for place, point in enumerate(points):
            if point.link == link:
                quantiles[place] = _quantiles(model.measured(point))
    return xr.DataArray(quantiles, coords={"quantile": [0.05, 0.5, 0.95]}, dims=("point", "quantile"))


def _row(parts: Sequence[tuple[Path, dict[str, Any]]], epochs: int, accuracy: float, whole: bool) -> dict[str, Any]:
    settings = saved_config.read(parts[0][0] / "config.yaml")
    first = parts[0][1]
    seconds = np.concatenate([content["seconds"][1:] for _, content in parts])
    speeds = np.concatenate([np.divide(content["rows"][1:], content["seconds"][1:]) for _, content in parts])
    steps = sum(len(content["seconds"]) for _, content in parts)
    calls = {}
    for kind in KINDS:
        count, bytes_, waited = (
            sum(content["calls"].get(kind, {}).get(name, 0) for _, content in parts)
            for name in ("count", "bytes", "seconds")
        )
        calls[kind] = {"count": count, "mean_bytes": bytes_ / count if count else 0.0, "seconds": waited}
    still = calls["gradients"]["seconds"] + calls["step"]["seconds"]
    return {
        "network": settings["model"]["name"],
        "deterministic": bool(settings["model"]["deterministic"]),
        "backend": first["backend"],
        "threads": first["threads"],
        "samples_per_second": float(speeds.mean()),
        "samples_per_second_std": float(speeds.std(ddof=1)),
        "step_seconds": float(np.median(seconds)),
        "fixed_epochs_seconds": epochs * _IMAGES[settings["data"]["name"]] / float(speeds.mean()),
        "seconds_to_accuracy": _time_to(accuracy, parts[0][0] / "log.csv") if whole else math.nan,
        "communication_share": still / sum(sum(content["seconds"]) for _, content in parts),
        "messages": calls["gradients"]["count"] / steps,
        "bytes": calls["gradients"]["count"] * calls["gradients"]["mean_bytes"] / steps,
        "calls": calls,
        "steps": seconds,
    }


def _epochs(run: str) -> int:
    return saved_config.read(Path(run) / "config.yaml").get("train", {}).get("epochs", TrainConfig.epochs)


def _time_to(accuracy: float, path: Path) -> float:
    """Return the seconds of training up to the first epoch with this training accuracy, or NaN if none reached it."""
    seconds = 0.0
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            seconds += float(row["seconds"])
            if float(row["accuracy"]) >= accuracy:
                return seconds
    return math.nan


def _rows(rows: xr.Dataset) -> list[xr.Dataset]:
    return [rows.isel(point=number) for number in range(rows.sizes["point"])]


def _workload(row: xr.Dataset) -> str:
    return f"{Path(row['run'].item()).name}, {row['device'].item()}, batch {row['batch'].item()}"


def _model_points(rows: xr.Dataset) -> list[Point]:
    points = []
    for row in _rows(rows):
        seconds = row["seconds"].values
        mbit, delay = float(row["mbit"]), float(row["latency_ms"]) / 1e3
        link = Link(mbit * 1e6 / 8, delay) if mbit else None
        sent = float(row["messages"]), float(row["bytes"])
        points.append(Point(_workload(row), int(row["ranks"]), *sent, seconds[np.isfinite(seconds)], link))
    return points


def _sent(rows: xr.Dataset, row: xr.Dataset) -> tuple[float, float]:
    """Return messages and bytes of gradients a step, from any point of the workload on several ranks."""
    run = rows.isel(point=(rows["run"].values == row["run"].item()) & (rows["ranks"].values > 1))
    if not run.sizes["point"]:
        raise UserError(f"{row['run'].item()} was not run on several ranks: add one above 1 to --ranks")
    return float(run["messages"][0]), float(run["bytes"][0])


def _quantiles(draws: np.ndarray) -> list[float]:
    return np.quantile(draws, (0.05, 0.5, 0.95)).tolist()


def _ratios(workloads: Mapping[str, xr.Dataset], times: Mapping[str, Sequence[np.ndarray]]) -> list[str]:
    lines = []
    for name, row in workloads.items():
        for other, twin in workloads.items():
            same = all(row[part].item() == twin[part].item() for part in ("network", "device", "batch"))
            if same and not row["deterministic"] and twin["deterministic"]:
                ratios = [_quantiles(times[name][RANKS.index(n)] / times[other][RANKS.index(n)]) for n in (1, 128)]
                one, many = (f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in ratios)
                lines.append(f"time of {name} over {other}: {one} on 1 rank, {many} predicted on 128")
    return lines
