"""The table of the scaling study, from what each training left in its folder."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ppl_bnn.experiment import saved_config

KINDS = ("gradients", "step", "batch norm", "broadcast", "other")
# The accuracy of a training is a mean over this number of its last steps, or over an epoch's if that has fewer.
WINDOW = 20
_IMAGES = {"mnist": 60_000, "fashion-mnist": 60_000, "cifar10": 50_000, "digits100k": 100_000}
_SETTING = ("run", "device", "batch", "ranks", "estimator", "mbit", "latency_ms", "cycle_ms", "fusion_mb")
_ALONE = ("run", "device", "batch", "estimator")
_UNITS = {
    "samples_per_second": "1/s", "samples_per_second_std": "1/s", "step_seconds": "s", "fixed_epochs_seconds": "s",
    "seconds_to_accuracy": "s", "call_mean_bytes": "bytes", "call_seconds": "s", "seconds": "s", "elapsed_seconds": "s",
    "mbit": "Mbit/s", "latency_ms": "ms", "cycle_ms": "ms", "fusion_mb": "MiB",
}  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """One repeat of a point.

    Attributes:
        content: its performance.json.
        settings: what it was trained with.
        own: the run's own settings.
        elapsed: seconds from the launcher's start to its end.
    """

    content: Mapping[str, Any]
    settings: Mapping[str, Any]
    own: Mapping[str, Any]
    elapsed: float

    @classmethod
    def read(cls, folder: Path) -> "_Part":
        point = json.loads((folder / "point.json").read_text(encoding="utf-8"))
        content = json.loads((folder / "performance.json").read_text(encoding="utf-8"))
        settings = saved_config.read(folder / "config.yaml")
        return cls(content, settings, point["identity"]["settings"], point["elapsed_seconds"])

    @property
    def starts(self) -> list[int]:
        """Places of the first steps of the processes that trained it."""
        places = [start - self.content["first_step"] + 1 for start in self.content["starts"]]
        return [place for place in places if place >= 0]

    @property
    def timed(self) -> NDArray[np.bool_]:
        """Which steps count for a speed [K]: all but the first of each process."""
        counts = np.ones(len(self.content["seconds"]), dtype=bool)
        counts[self.starts] = False
        return counts

    @property
    def last_process(self) -> slice:
        """Places of the steps of the last process, whose messages were counted."""
        return slice((self.starts or [0])[-1], None)


def table(points: Sequence[tuple[Mapping[str, Any], Path]], accuracies: Sequence[float], *, whole: bool) -> xr.Dataset:
    """Return one row for each setting. The steps of its repeats are concatenated.

    Args:
        points: for each point the fields of its `ppl_bnn.scaling.point.Setting`, and the out folder of its training.
        accuracies: training accuracies to time [A].
        whole: whether the trainings are whole ones. If not, no accuracy is reported.

    Returns:
        A Dataset over ``point``, described in docs/scaling.md. Over ``point`` and ``accuracy``: seconds_to_accuracy
        (NaN if a repeat did not reach it). Over ``point`` and ``kind``: call_count, call_mean_bytes, call_seconds, of
        a training's last process. Over ``point`` and ``step``: seconds. No speed counts the first step of a process.
    """
    found: dict[tuple[Any, ...], list[_Part]] = {}
    for setting, folder in points:
        found.setdefault(tuple(setting[name] for name in _SETTING), []).append(_Part.read(folder))
    settings = [dict(zip(_SETTING, key, strict=True)) for key in found]
    rows = [
        _row(setting, parts, accuracies, whole=whole) for setting, parts in zip(settings, found.values(), strict=True)
    ]
    _add_efficiency(rows, settings)
    calls = [row.pop("calls") for row in rows]
    steps = [row.pop("steps") for row in rows]
    times = [row.pop("times") for row in rows]
    padded = np.full((len(rows), max(map(len, steps))), math.nan)
    for line, values in zip(padded, steps, strict=True):
        line[: len(values)] = values
    variables: dict[str, Any] = {name: ("point", [row[name] for row in rows]) for name in rows[0]}
    for name in ("count", "mean_bytes", "seconds"):
        variables[f"call_{name}"] = (("point", "kind"), [[call[kind][name] for kind in KINDS] for call in calls])
    variables["seconds"] = (("point", "step"), padded)
    variables["seconds_to_accuracy"] = (("point", "accuracy"), np.reshape(times, (len(rows), len(accuracies))))
    names = [_label(row, setting) for row, setting in zip(rows, settings, strict=True)]
    dataset = xr.Dataset(variables, coords={"point": names, "kind": list(KINDS), "accuracy": list(accuracies)})
    for name, units in _UNITS.items():
        dataset[name].attrs["units"] = units
    return dataset


def flat(rows: xr.Dataset) -> Any:
    """Return a data frame of one row a point, with columns for each kind of call and each training accuracy."""
    dimensions = ["kind", "step", "quantile", "accuracy"]
    frame = rows.drop_dims([name for name in dimensions if name in rows.dims]).to_dataframe().reset_index(drop=True)
    for accuracy in rows["accuracy"].values:
        frame[f"seconds_to_accuracy_{accuracy:g}"] = rows["seconds_to_accuracy"].sel(accuracy=accuracy).values
    for kind in rows["kind"].values:
        for name in ("count", "mean_bytes", "seconds"):
            # `step_seconds` is already the column of a step's own seconds.
            column = f"{'step message' if kind == 'step' else kind}_{name}".replace(" ", "_")
            frame[column] = rows[f"call_{name}"].sel(kind=kind).values
    if "held_out_step_seconds" in rows:
        frame["held_out_step_seconds"] = rows["held_out_step_seconds"].sel(quantile=0.5).values
    return frame


def _row(
    setting: Mapping[str, Any], parts: Sequence[_Part], accuracies: Sequence[float], *, whole: bool
) -> dict[str, Any]:
    seconds, rows = (
        np.concatenate([np.asarray(part.content[name], dtype=float)[part.timed] for part in parts])
        for name in ("seconds", "rows")
    )
    speeds = rows / seconds
    counted = np.concatenate([part.content["seconds"][part.last_process] for part in parts])
    calls = {kind: _calls(parts, kind) for kind in KINDS}
    gradients, steps = calls["gradients"], len(counted) / len(parts)
    elapsed = sum(part.elapsed for part in parts) / len(parts)
    first, model = parts[0], parts[0].settings["model"]
    fixed = [_fixed_epochs(part, float(speeds.mean())) for part in parts]
    return {
        **{name: setting[name] for name in ("run", "device", "batch", "ranks", "mbit", "latency_ms")},
        **{name: math.nan if setting[name] is None else setting[name] for name in ("cycle_ms", "fusion_mb")},
        "workload": _workload(setting),
        "network": model["name"],
        "data": first.settings["data"]["name"],
        "deterministic": bool(model["deterministic"]),
        "estimator": "none" if model["deterministic"] else first.settings["train"]["estimator"],
        "backend": first.content["backend"],
        "threads": first.content["threads"],
        "samples_per_second": float(speeds.mean()),
        "samples_per_second_std": float(speeds.std(ddof=1)),
        "step_seconds": float(np.median(seconds)),
        "fixed_epochs_seconds": float(np.mean([time for time, _ in fixed])),
        "fixed_epochs_measured": all(measured for _, measured in fixed),
        "communication_share": (gradients["seconds"] + calls["step"]["seconds"]) / (steps * float(counted.mean())),
        "communication_efficiency": sum(call["seconds"] for call in calls.values()) / elapsed,
        "elapsed_seconds": elapsed,
        "messages": gradients["count"] / steps,
        "bytes": gradients["count"] * gradients["mean_bytes"] / steps,
        "calls": calls,
        "steps": seconds,
        "times": [
            float(np.mean([_seconds_to(accuracy, part) for part in parts])) if whole else math.nan
            for accuracy in accuracies
        ],
    }


def _calls(parts: Sequence[_Part], kind: str) -> dict[str, float]:
    found = [part.content["calls"].get(kind, {}) for part in parts]
    count, bytes_, seconds = (sum(call.get(name, 0) for call in found) for name in ("count", "bytes", "seconds"))
    mean = bytes_ / count if count else 0.0
    return {"count": count / len(parts), "mean_bytes": mean, "seconds": seconds / len(parts)}


def _fixed_epochs(part: _Part, speed: float) -> tuple[float, bool]:
    """Return the seconds of the run's own epochs over all its images, and whether they were measured."""
    own, trained = part.own, part.settings
    epochs = own["train"]["epochs"]
    same = epochs == trained["train"]["epochs"] and own["data"]["num_train"] == trained["data"]["num_train"]
    if same and part.content["first_step"] == 1:
        return sum(part.content["seconds"]), True
    images = _IMAGES.get(own["data"]["name"], math.nan) - own["data"]["holdout"]
    if own["data"]["num_train"] is not None:
        # In this order the number stands if the size of the data set is not known.
        images = min(own["data"]["num_train"], images)
    return epochs * images / speed, False


def _seconds_to(accuracy: float, part: _Part) -> float:
    """Return the seconds up to the first step whose last `WINDOW` steps have this mean accuracy, or NaN."""
    content = part.content
    rows = np.asarray(content["rows"], dtype=float)
    correct = rows * np.array([math.nan if share is None else share for share in content["accuracy"]])
    window = max(1, min(WINDOW, len(rows) // part.settings["train"]["epochs"]))
    if content["first_step"] > 1:
        return math.nan
    totals = np.lib.stride_tricks.sliding_window_view(np.stack([correct, rows]), window, axis=1).sum(-1)
    # The accuracies are rounded.
    reached = np.flatnonzero(totals[0] / totals[1] >= accuracy - 1e-6)
    return math.nan if not len(reached) else float(sum(content["seconds"][: reached[0] + window]))


def _add_efficiency(rows: Sequence[dict[str, Any]], settings: Sequence[Mapping[str, Any]]) -> None:
    for row, setting in zip(rows, settings, strict=True):
        alone = [
            other for other, its in zip(rows, settings, strict=True)
            if its["ranks"] == 1 and all(its[name] == setting[name] for name in _ALONE)
        ]  # fmt: skip
        row["efficiency"] = alone[0]["step_seconds"] / row["step_seconds"] if alone else math.nan
        errors = [_relative_error(each["steps"]) for each in (row, *alone[:1])]
        row["efficiency_std"] = 0.0 if row["ranks"] == 1 else row["efficiency"] * math.hypot(*errors)


def _relative_error(steps: NDArray) -> float:
    # The standard error of a median.
    return float(1.25 * steps.std(ddof=1) / len(steps) ** 0.5 / np.median(steps))


def _workload(setting: Mapping[str, Any]) -> str:
    name = Path(setting["run"]).name + (f" {setting['estimator']}" if setting["estimator"] else "")
    return f"{name}, {setting['device']}, batch {setting['batch']}"


def _label(row: Mapping[str, Any], setting: Mapping[str, Any]) -> str:
    link = (f" at {row['mbit']:g} Mbit/s" if row["mbit"] else "") + (
        f", {row['latency_ms']:g} ms" if row["latency_ms"] else ""
    )
    cycle = f", cycle {setting['cycle_ms']:g} ms" if setting["cycle_ms"] is not None else ""
    fusion = f", fusion {setting['fusion_mb']:g} MiB" if setting["fusion_mb"] is not None else ""
    return f"{row['workload']}, {row['ranks']} ranks{link}{cycle}{fusion}"
