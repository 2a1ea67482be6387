"""Commands of `ppl_bnn.scaling` for the study's networks, and single numbers of their tables as text."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import xarray as xr

from ppl_bnn.results import netcdf
from ppl_bnn.scaling.calls import call_tables
from ppl_bnn.study.work import MISSING, Outcome, Work

# In place of a number.
ALONE = "not measured: needs several ranks, see --ranks"


def timed(
    work: Work, name: str, networks: Sequence[str], *how: str, ranks: Sequence[int] | None = None,
    settings: Sequence[str] = ("--channels_last", "true"),
) -> Outcome:  # fmt: skip
    """Time networks and their deterministic twins with ``python -m ppl_bnn.scaling`` into the folder `name`.

    Args:
        networks: run folders without ``study-``; each one's twin has ``-cnn`` behind its name.
        how: options of `ppl_bnn.scaling`.
        settings: settings of each training.
    """
    runs = [work.run_folder(network + twin) for network in networks for twin in ("", "-cnn")]
    started = time.time()
    outcome = work.do(
        name, "scaling", *runs, "--ranks", *map(str, ranks or work.ranks), *how,
        "--launcher", work.options.launcher, "--out", str(work.folder(name)),
        "--", *work.data(networks[0]), *settings, makes=[work.folder(name) / "scaling.nc"],
    )  # fmt: skip
    path = work.folder(name) / "failed.json"
    if outcome.reason is None or outcome.partly or not path.exists() or path.stat().st_mtime < started:
        return outcome
    points = json.loads(path.read_text(encoding="utf-8"))
    reason = "; ".join(f"{point}: {why}" for point, why in points.items()) or outcome.reason
    work.failures[name] = replace(outcome, reason=reason, partly=True)
    return work.failures[name]


class Timings:
    """The table of a folder that `timed` filled; what is missing in it is ``not measured``."""

    def __init__(self, work: Work, name: str) -> None:
        path = work.folder(name) / "scaling.nc"
        self._rows = netcdf.read_group(path, "scaling") if path.exists() else None

    def row(self, run: str, ranks: int, **same: float | str) -> xr.Dataset | None:
        """The row of a run and number of ranks, whose other columns are `same`; None where there is none."""
        if self._rows is None:
            return None
        for place in range(self._rows.sizes["point"]):
            row = self._rows.isel(point=place)
            # The estimator makes no difference to a deterministic network, which is timed once.
            ignored = {"estimator"} if bool(row["deterministic"]) else set()
            wanted = {"ranks": ranks, **{name: value for name, value in same.items() if name not in ignored}}
            mine = Path(row["run"].item()).name == f"study-{run}"
            if mine and all(row[name].item() == value for name, value in wanted.items()):
                return row
        return None

    def calls(self) -> list[tuple[str, list[list[str]]]]:
        """Table 2d: `call_tables` of `ppl_bnn.scaling.calls`. Every twin of the study is a CNN."""
        return [] if self._rows is None else call_tables(self._rows, twin="CNN")

    def value(self, column: str, run: str, ranks: int, **same: float | str) -> float:
        """One number, NaN where there is none."""
        row = self.row(run, ranks, **same)
        return math.nan if row is None else float(row[column])

    def pair(self, column: str, network: str, ranks: int, form: str = "{:,.1f}", **same: float | str) -> str:
        """The number of a Bayesian network and of its twin."""
        return "; ".join(text(self.value(column, network + twin, ranks, **same), form) for twin in ("", "-cnn"))

    def ratio(self, column: str, network: str, ranks: int, **same: float | str) -> str:
        """The number of a Bayesian network over that of its twin."""
        one, other = (self.value(column, network + twin, ranks, **same) for twin in ("", "-cnn"))
        return text(one / other if other else math.nan, "{:.2f}")


def training_accuracy(folder: Path) -> str:
    """The training accuracy of the last epoch of an out folder that was predicted with."""
    path = folder / "predictive.nc"
    history = netcdf.read_group(path, "training") if path.exists() else None
    return MISSING if history is None else f"{float(history['accuracy'][-1]):.3f}"


def text(value: float, form: str) -> str:
    """A number by a format, or ``not measured``."""
    return form.format(value) if math.isfinite(value) else MISSING


def on_ranks(number: int) -> str:
    """``1 rank``, ``2 ranks``."""
    return counted(number, "rank")


def counted(number: int, what: str) -> str:
    """A number of things, as in ``1 epoch`` and ``6,000 digits``."""
    return f"{number:,} {what}" + "s" * (number != 1)
