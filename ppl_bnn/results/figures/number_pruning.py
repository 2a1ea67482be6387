"""The figure of a pruning sweep of numbers, counts or yes-or-no labels: each score against the share pruned."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.layout import new_figure, save

_BLUE, _GREY = "#0072B2", "#595959"
# Of the scores that a sweep has, those with a panel, and what their axis says.
_PANELS = {
    "nll": "NLL (nats an example)",
    "rmse": "RMSE",
    "crps": "CRPS",
    "accuracy": "accuracy",
    "ece": "ECE",
    "brier": "Brier score",
    "coverage_90": "coverage of 90% intervals",
}


def draw_number_pruning(path: Path, folder: Path) -> list[Path]:
    """Draw ``pruning.png`` from a ``pruning.nc`` without classes: scores, uncertainty and seconds of each level.

    Raises:
        FileError: a result that cannot be read.
        OSError: a figure that cannot be written.
    """
    levels, attrs = netcdf.read_group(path, "pruning"), netcdf.read_attrs(path)
    assert levels is not None
    share = 100 * levels["pruned_fraction"].values
    curves = {label: levels[name].values for name, label in _PANELS.items() if name in levels}
    epistemic = levels["epistemic"].values.reshape(len(share), -1)
    curves[f"epistemic uncertainty\n({attrs.get('units', 'variance of y')}), mean"] = np.nanmean(epistemic, 1)
    curves["seconds of the prediction"] = levels["seconds"].values
    columns = 3
    rows = -(-len(curves) // columns)
    draws = int(levels["num_samples"].values[0])
    title = f"{attrs['title']}: pruned networks, {draws} draws a level; dashed: nothing pruned"
    figure, axes = new_figure(title, 9, 2.3 * rows + 0.4, rows, columns, squeeze=False)
    for axis, (label, values) in zip(axes.ravel(), curves.items(), strict=False):
        _curve(axis, share, values, label)
    for axis in axes.ravel()[len(curves) :]:
        axis.set_axis_off()
    return [save(figure, folder / "pruning.png")]


def _curve(axis: Axes, share: np.ndarray, values: np.ndarray, label: str) -> None:
    axis.plot(share, values, "o-", color=_BLUE, markersize=4)
    # Beside the value of the network that is not pruned.
    axis.axhline(values[0], color=_GREY, linestyle="--", linewidth=1)
    axis.set(xlabel="weights pruned (%)", ylabel=label, xlim=(-3, 103))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    if label.startswith("coverage"):
        axis.axhline(0.9, color=_GREY, linewidth=0.8)
