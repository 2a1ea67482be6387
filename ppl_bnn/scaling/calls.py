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
    """Return Markdown: a table for each network, device and batch, on its largest number of ranks.

    Args:
        rows: a result of `ppl_bnn.scaling.table.table`.
    """
    local = first_messages(rows.isel(point=(rows["mbit"].values == 0) & (rows["ranks"].values > 1)))
    parts = ("network", "device", "batch")
    keys = list(zip(*(local[part].values.tolist() for part in parts), strict=True))
    text = (
        "Communication calls of rank 0 in a training: their number, their average bytes, and the seconds that rank 0 "
        "waited for them. BNN is the Bayesian network, twin its deterministic twin.\n"
    )
    for key in dict.fromkeys(keys):
        block = local.isel(point=[other == key for other in keys])
        block = block.isel(point=block["ranks"].values == block["ranks"].values.max()).sortby("deterministic")
        text += f"\n{_title(block)}\n\n{_table(block)}\n"
    return text if keys else text + "\nNo point on several ranks was measured.\n"


def _title(block: xr.Dataset) -> str:
    first = block.isel(point=0)
    backends = ", ".join(dict.fromkeys(block["backend"].values.tolist()))
    return (
        f"## {first['network'].item()}, {first['device'].item()}, batch {first['batch'].item()} a rank, "
        f"{first['ranks'].item()} ranks over {backends}"
    )


def _table(block: xr.Dataset) -> str:
    points = [block.isel(point=place) for place in range(block.sizes["point"])]
    names = [f"{_kind(point)} {quantity}" for point in points for quantity in ("calls", "average bytes", "seconds")]
    lines = [["routine", *names], ["---", *("---:" for _ in names)]]
    for routine, kinds in ROUTINES.items():
        lines.append([f"**{routine}**", *(cell for point in points for cell in _cells(point, list(kinds)))])
        if len(kinds) > 1:
            for kind, purpose in kinds.items():
                lines.append([f"of it: {purpose}", *(cell for point in points for cell in _cells(point, [kind]))])
    lines.append(["time in all / elapsed", *(cell for point in points for cell in _efficiency(point))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _kind(point: xr.Dataset) -> str:
    return "twin" if point["deterministic"].item() else f"BNN ({point['estimator'].item()})"


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
