"""The communication calls of rank 0, each Bayesian network beside its deterministic twin: table 2(d) of the study."""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from ppl_bnn.scaling.prediction import first_messages

# The kinds of ours that each routine of MPI would be, and what they are for. All sums are allreduces: gathering the
# ranks' values adds tensors that are zero outside the rank's own place, and a barrier adds a zero.
ROUTINES = {
    "Allreduce": {
        "gradients": "gradients, a bucket each",
        "step": "the step's loss and number of correct answers",
        "batch norm": "the statistics of batch norm",
        "other": "barriers, and values that are gathered or shared at the start and at checkpoints",
    },
    "Bcast": {"broadcast": "the state at the start and counters of batch norm, a tensor each"},
}


def calls_page(rows: xr.Dataset) -> str:
    """Return the tables of `call_tables` as Markdown."""
    text = (
        "Communication calls of rank 0 in a training: their number, their average bytes, and the seconds that rank 0 "
        "waited for them. BNN is the Bayesian network, twin its deterministic twin.\n"
    )
    tables = call_tables(rows)
    for title, (header, *lines) in tables:
        alignment = ["---", *("---:" for _ in header[1:])]
        text += (
            f"\n## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in (header, alignment, *lines)) + "\n"
        )
    return text if tables else text + "\nNo point on several ranks was measured.\n"


def call_tables(rows: xr.Dataset, *, twin: str = "twin") -> list[tuple[str, list[list[str]]]]:
    """Return a table for each network, data set, estimator, device and batch, on the largest number of ranks.

    Args:
        rows: a result of `ppl_bnn.scaling.table.table`.
        twin: what the header calls a deterministic network.

    Returns:
        Of each table its title and its lines of cells, the header first.
    """
    local = first_messages(rows.isel(point=(rows["mbit"].values == 0) & (rows["ranks"].values > 1)))
    tables = []
    points = [local.isel(point=place) for place in range(local.sizes["point"])]
    for network in dict.fromkeys(map(_network, points)):
        block = [point for point in points if _network(point) == network]
        ranks = max(point["ranks"].item() for point in block)
        largest = [point for point in block if point["ranks"].item() == ranks]
        twins = [point for point in largest if point["deterministic"].item()]
        bayesian = [[point, *twins] for point in largest if not point["deterministic"].item()]
        for beside in bayesian or [twins]:
            tables.append((_title(beside[0]), _table(beside, twin)))
    return tables


def _network(point: xr.Dataset) -> tuple[str, str, str, int]:
    return point["network"].item(), point["data"].item(), point["device"].item(), point["batch"].item()


def _title(point: xr.Dataset) -> str:
    estimator = "" if point["deterministic"].item() else f" ({point['estimator'].item()})"
    network, data, device, batch = _network(point)
    ranks, backend = point["ranks"].item(), point["backend"].item()
    return f"{network}{estimator}, {data}, {device}, batch {batch} a rank, {ranks} ranks over {backend}"


def _table(points: Sequence[xr.Dataset], twin: str) -> list[list[str]]:
    kinds = [twin if point["deterministic"].item() else "BNN" for point in points]
    names = [f"{kind} {quantity}" for kind in kinds for quantity in ("calls", "average bytes", "seconds")]
    lines = [["routine", *names]]
    for routine, parts in ROUTINES.items():
        lines.append([f"**{routine}**", *(cell for point in points for cell in _cells(point, list(parts)))])
        if len(parts) > 1:
            for part, purpose in parts.items():
                lines.append([f"of it: {purpose}", *(cell for point in points for cell in _cells(point, [part]))])
    lines.append(["time in all / elapsed", *(cell for point in points for cell in _efficiency(point))])
    return lines


def _cells(point: xr.Dataset, kinds: Sequence[str]) -> list[str]:
    chosen = point.sel(kind=list(kinds))
    count = float(chosen["call_count"].sum())
    bytes_ = float((chosen["call_count"] * chosen["call_mean_bytes"]).sum())
    return [f"{count:.0f}", f"{bytes_ / count if count else 0.0:.0f}", f"{float(chosen['call_seconds'].sum()):.3g}"]


def _efficiency(point: xr.Dataset) -> list[str]:
    waited = float(np.sum(point["call_seconds"].values))
    return [
        "",
        "",
        f"{waited:.3g} / {float(point['elapsed_seconds']):.3g} = {float(point['communication_efficiency']):.1%}",
    ]
