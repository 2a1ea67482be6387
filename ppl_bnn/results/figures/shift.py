"""The figures of `shift.nc`: the predictive under graded shifts, and its uncertainty on other data."""

from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.layout import new_figure, save

_UNITS = {"rotation": "rotation (degrees)", "noise": "noise (standard deviation)", "blur": "blur (pixels)"}
# Below it an uncertainty is rounding; a logarithmic axis has to begin somewhere.
_LEAST = 1e-6


def draw_shift_figures(path: Path, folder: Path) -> list[Path]:
    """Draw ``shift.nc`` as shift.png and ood.png, each where it has something to show; return their paths.

    Raises:
        FileError: a result that cannot be read.
        OSError: a figure that cannot be written.
    """
    attrs = netcdf.read_attrs(path)
    title = f"{attrs['title']} ({attrs['num_samples']} draws)"
    levels, inside, ood = (netcdf.read_group(path, name) for name in ("shift", "in_distribution", "ood"))
    paths = []
    if levels is not None and levels.sizes["condition"] > 1:
        paths.append(save(metrics_under_shift(levels, title), folder / "shift.png"))
    if ood is not None and inside is not None:
        paths.append(save(uncertainty_outside(inside, ood, title), folder / "ood.png"))
    return paths


def metrics_under_shift(levels: xr.Dataset, title: str) -> Figure:
    """Accuracy, NLL, ECE and the uncertainties against severity, by shift."""
    kinds = [kind for kind in dict.fromkeys(levels["kind"].values.tolist()) if kind != "none"]
    figure, axes = new_figure(
        f"{title}: the same test images, shifted further and further",
        3.6 * len(kinds) + 0.6,
        9.5,
        4,
        len(kinds),
        sharey="row",
        squeeze=False,
    )
    for column, kind in enumerate(kinds):
        rows = levels.isel(condition=np.isin(levels["kind"].values, ("none", kind)))
        severity = rows["severity"].values
        for row, names in enumerate((("accuracy",), ("nll",), ("ece",), ("total", "aleatoric", "epistemic"))):
            axis = axes[row, column]
            for place, name in enumerate(names):
                colour = f"C{place + 1}" if row == 3 else "C0"
                axis.plot(severity, rows[name].values, "o-", color=colour, markersize=4, label=name)
            if row == 3:
                axis.set_xlabel(_UNITS.get(kind, kind))
        axes[0, column].set_title(kind, fontsize=10)
    for row, label in enumerate(("accuracy", "NLL (nats per datum)", "ECE", "mean uncertainty (nats)")):
        axes[row, 0].set_ylabel(label)
    # Last: a limit set while the axes share it would stop it from growing with the next shift.
    for row in range(4):
        axes[row, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylim(top=1.02)
    axes[3, 0].legend(frameon=False, fontsize=8)
    return figure


def uncertainty_outside(inside: xr.Dataset, ood: xr.Dataset, title: str) -> Figure:
    """Histograms of the epistemic and of the total uncertainty, test images against each set from outside."""
    sets, scores = [str(name) for name in ood["set"].values], ("epistemic", "total")
    figure, axes = new_figure(
        f"{title}: does its uncertainty tell other data apart?\n"
        "AUROC: an image from outside is the more uncertain of a pair; FPR95: share of the outside that passes where "
        "95% of the test images do",
        11,
        2.9 * len(sets) + 0.8,
        len(sets),
        2,
        squeeze=False,
    )
    for row, name in enumerate(sets):
        for axis, score in zip(axes[row], scores, strict=True):
            here, there = inside[score].values, ood[score].sel(set=name).dropna("image").values
            edges = np.geomspace(_LEAST, max(2 * _LEAST, here.max(), there.max()), 50)
            for values, label, colour in ((here, "test images", "C0"), (there, name, "C3")):
                axis.hist(
                    values.clip(_LEAST),
                    edges,
                    weights=np.full(len(values), 1 / len(values)),
                    color=colour,
                    alpha=0.55,
                    label=label,
                )
            axis.axvline(
                np.quantile(here, 0.95), color="0.3", linewidth=1, linestyle="--", label="95% of the test images"
            )
            auroc, fpr95 = (float(ood[key].sel(set=name, score=score)) for key in ("auroc", "fpr95"))
            axis.set_title(f"{name}, {score} uncertainty: AUROC {auroc:.4f}, FPR95 {fpr95:.4f}", fontsize=9)
            axis.set(xscale="log", xlabel=f"{score} uncertainty (nats)")
        axes[row, 0].set_ylabel("share of the images")
        axes[row, 0].set_ylim(top=1.3 * axes[row, 0].get_ylim()[1])
        axes[row, 0].legend(frameon=False, fontsize=8, loc="upper left", ncols=3)
    return figure
