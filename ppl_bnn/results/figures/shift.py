"""The figures of `shift.nc`: the predictive under graded shifts, and its uncertainty on other data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.layout import logarithmic_axis, new_figure, save

_UNITS = {
    "rotation": "rotation (degrees)",
    "noise": "noise (standard deviation)",
    "blur": "blur (pixels)",
    "feature_noise": "noise (training standard deviations)",
    "missing": "columns missing (share)",
    "covariate": "tilt by {column}\n(training standard deviations)",
    "dropped": "steps dropped (share)",
    "truncated": "steps cut off (share)",
    "replaced": "tokens replaced (share)",
}
# A row of panels for those of its scores that a result has: the scores, and what the axis says.
_PANELS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("accuracy",), "accuracy"),
    (("rmse", "crps"), "RMSE and CRPS"),
    (("nll",), "NLL (nats per datum)"),
    (("ece",), "ECE"),
    (("coverage_90",), "coverage of 90% intervals"),
    (("total", "aleatoric", "epistemic"), "mean uncertainty\n({units})"),
)
# Below it an uncertainty is rounding; a logarithmic axis has to begin somewhere. Of nats; of variances relative to the
# largest.
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
    # Results of earlier versions are all of images and their classes.
    how = {"examples": "images", "units": "nats", "column": "", **attrs}
    paths = []
    if levels is not None and levels.sizes["condition"] > 1:
        paths.append(save(metrics_under_shift(levels, title, how), folder / "shift.png"))
    if ood is not None and inside is not None:
        paths.append(save(uncertainty_outside(inside, ood, title, how), folder / "ood.png"))
    return paths


def metrics_under_shift(levels: xr.Dataset, title: str, how: Mapping[str, Any]) -> Figure:
    """The likelihood's chief scores and the uncertainties against severity, by shift.

    Args:
        how: ``examples``, the word for them; ``units`` of the uncertainties; ``column`` of a covariate shift.
    """
    kinds = [kind for kind in dict.fromkeys(levels["kind"].values.tolist()) if kind != "none"]
    panels = [(shown, label) for names, label in _PANELS if (shown := [name for name in names if name in levels])]
    figure, axes = new_figure(
        f"{title}: the same test {how['examples']}, shifted further and further",
        max(5.0, 3.6 * len(kinds) + 0.6),
        2.25 * len(panels) + 0.5,
        len(panels),
        len(kinds),
        sharey="row",
        squeeze=False,
    )
    for column, kind in enumerate(kinds):
        rows = levels.isel(condition=np.isin(levels["kind"].values, ("none", kind)))
        order = np.argsort(rows["severity"].values, kind="stable")
        severity = rows["severity"].values[order]
        for row, (names, _) in enumerate(panels):
            axis = axes[row, column]
            for place, name in enumerate(names):
                colour = f"C{place + 1}" if len(names) > 1 else "C0"
                axis.plot(severity, rows[name].values[order], "o-", color=colour, markersize=4, label=name)
        axes[-1, column].set_xlabel(_UNITS.get(kind, kind.rpartition(":")[2]).format(**how))
        axes[0, column].set_title(kind.rpartition(":")[2], fontsize=10)
    # Last: a limit set while the axes share it would stop it from growing with the next shift.
    for row, (names, label) in enumerate(panels):
        axes[row, 0].set_ylabel(label.format(**how))
        if all(float(levels[name].min()) >= 0 for name in names):
            axes[row, 0].set_ylim(bottom=0)
        if names[0] in ("accuracy", "coverage_90"):
            axes[row, 0].set_ylim(top=1.02)
        if len(names) > 1:
            axes[row, 0].legend(frameon=False, fontsize=8)
    return figure


def uncertainty_outside(inside: xr.Dataset, ood: xr.Dataset, title: str, how: Mapping[str, Any]) -> Figure:
    """Histograms of the epistemic and of the total uncertainty, test examples against each set from outside.

    Args:
        how: as of `metrics_under_shift`.
    """
    word, units = how["examples"], how["units"]
    sets, scores = [str(name) for name in ood["set"].values], ("epistemic", "total")
    figure, axes = new_figure(
        f"{title}: does its uncertainty tell other data apart?\n"
        f"AUROC: the one from outside is the more uncertain of a pair; FPR95: outside that passes where 95% of the "
        f"test {word} do",
        11,
        2.9 * len(sets) + 0.8,
        len(sets),
        2,
        squeeze=False,
    )
    for row, name in enumerate(sets):
        for axis, score in zip(axes[row], scores, strict=True):
            here, there = inside[score].values, ood[score].sel(set=name).dropna("image").values
            most = max(here.max(), there.max())
            least = _LEAST if units == "nats" else max(_LEAST * most, min(here.min(), there.min()))
            edges = np.geomspace(least, max(2 * least, most), 50)
            for values, label, colour in ((here, f"test {word}", "C0"), (there, name, "C3")):
                axis.hist(
                    values.clip(least),
                    edges,
                    weights=np.full(len(values), 1 / len(values)),
                    color=colour,
                    alpha=0.55,
                    label=label,
                )
            axis.axvline(
                np.quantile(here, 0.95), color="0.3", linewidth=1, linestyle="--", label=f"95% of the test {word}"
            )
            auroc, fpr95 = (float(ood[key].sel(set=name, score=score)) for key in ("auroc", "fpr95"))
            axis.set_title(f"{name}, {score} uncertainty: AUROC {auroc:.4f}, FPR95 {fpr95:.4f}", fontsize=9)
            logarithmic_axis(axis, f"{score} uncertainty ({units})")
        axes[row, 0].set_ylabel(f"share of the {word}")
        axes[row, 0].set_ylim(top=1.3 * axes[row, 0].get_ylim()[1])
        axes[row, 0].legend(frameon=False, fontsize=8, loc="upper left", ncols=3)
    return figure
