"""Figures of the posterior predictive: one image of each class (the study's figure 5), and the risk-coverage curve."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from ppl_bnn import metrics
from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.draw_counts import density_by_draws
from ppl_bnn.results.figures.layout import Groups, new_figure, noun, probability_axis, save, show_image, wrapped
from ppl_bnn.results.figures.side_by_side import check_images, check_same_images, load_runs


def draw_predictive_figures(predictive: Path, folder: Path) -> list[Path]:
    """Draw risk_coverage.png and, where there is more than one draw, density_draws.png and density_classes.png.

    Raises:
        FileError: a result that cannot be read.
        OSError: a figure that cannot be written.
    """
    idata = inference_data.load(predictive)
    groups, title = netcdf.groups_of(idata), str(idata.attrs["title"])
    paths = [save(risk_coverage(groups, title), folder / "risk_coverage.png")]
    if groups["posterior_predictive"].sizes["draw"] > 1:
        sampling = str(idata.attrs.get("sampling", "independent"))
        paths.append(save(density_by_draws(groups, title, sampling=sampling), folder / "density_draws.png"))
        paths.append(save(density_by_class({str(idata.attrs.get("run", "")): groups}), folder / "density_classes.png"))
    return paths


def compare_densities(
    left: Path,
    right: Path,
    path: Path,
    *,
    images: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    num_samples: int | None = None,
) -> Path:
    """Draw `density_by_class` of two runs' ``predictive.nc`` side by side into `path` (PNG) and return it.

    Args:
        images, num_samples: the test images and the number of draws, as `density_by_class` takes them.
        names: of the two runs (default: their own).

    Raises:
        UserError: results of different images and classes, results without draws, an image without draws, or another
            number of names.
        FileError: a result that cannot be read.
    """
    runs = load_runs([left, right], names, kind="predictive")
    return save(density_by_class(runs, images=images, num_samples=num_samples), path)


def density_by_class(
    runs: dict[str, Groups], *, images: Sequence[int] | None = None, num_samples: int | None = None
) -> Figure:
    """Density of the true class's softmax for one test image of each class, the runs side by side (study, figure 5).

    Args:
        runs: {name of a run: its groups}, all of the same images.
        images: positions of the images to show (default: of each class that occurs the one on which the runs'
            epistemic uncertainties add up to the most).
        num_samples: the number of draws to use, the first (default: all).

    Raises:
        UserError: the runs are not of the same images and classes, or an image that is not in them.
    """
    check_same_images(runs)
    groups = next(iter(runs.values()))
    labels, probs = groups["observed_data"]["y"].values, groups["posterior_predictive"]["probs"]
    if images is None:
        labels = labels[: min(its["observed_data"].sizes["obs_id"] for its in runs.values())]
        epistemic = np.sum([its["uncertainty"]["epistemic"].values[: len(labels)] for its in runs.values()], 0)
        images = [int(np.where(labels == label, epistemic, -1).argmax()) for label in np.unique(labels)]
        choice = "of each class the image with the most epistemic uncertainty"
    else:
        choice = "images chosen by number"
    check_images(images, runs)
    classes = [str(one) for one in probs["class"].values]
    columns = min(5, len(images))
    blocks, height = -(-len(images) // columns), 1 + len(runs)
    figure, axes = new_figure(
        f"Density of the true class's softmax over the draws ({choice})\ndashed, number: mean, the predictive "
        f"probability; kernel standard deviation at least {inference_data.NARROWEST}",
        2.7 * columns,
        (1.3 + 1.25 * len(runs)) * blocks + 0.9,
        blocks * height,
        columns,
        squeeze=False,
        height_ratios=[1.1, *[1.0] * len(runs)] * blocks,
    )
    for axis in axes.ravel():
        axis.set_axis_off()
    for place, image in enumerate(images):
        block, column = divmod(place, columns)
        label = int(labels[image])
        show_image(axes[block * height, column], groups["constant_data"]["image"].values[image])
        axes[block * height, column].set_title(f"#{image}: {classes[label]}", fontsize=9)
        for row, (run, its) in enumerate(runs.items()):
            axis = axes[block * height + 1 + row, column]
            axis.set_axis_on()
            values = inference_data.draws_of(its, image)[label][:num_samples]
            grid, density = inference_data.density(values)
            axis.fill_between(grid, density, facecolor=(f"C{row}", 0.6), edgecolor=f"C{row}", linewidth=0.8)
            axis.axvline(values.mean(), color="0.2", linestyle="--", linewidth=1)
            right = values.mean() > 0.5
            axis.text(
                0.02 if right else 0.98, 0.95, f"{values.mean():.2f}", transform=axis.transAxes, fontsize=8,
                va="top", ha="left" if right else "right",
            )  # fmt: skip
            probability_axis(axis)
            axis.set(ylim=(0, 1.05 * density.max()), yticks=[])
            axis.tick_params(labelsize=7, labelbottom=row == len(runs) - 1)
            if column == 0 and run:
                name = wrapped(f"{run}\n({len(values)} draws)", 1.1, 8)
                axis.set_ylabel(name, fontsize=8, color=f"C{row}")
    return figure


def risk_coverage(groups: Groups, title: str) -> Figure:
    """Error rate among the examples kept against the share kept, when the most uncertain are refused first."""
    probs = torch.from_numpy(groups["uncertainty"]["mean_probs"].values)
    labels = torch.from_numpy(groups["observed_data"]["y"].values)
    top, choice = probs.max(1)
    correct = choice == labels
    word = noun(groups)
    figure, axis = new_figure(f"Risk against coverage on {title}: refuse the least certain {word} first", 7, 5, 1, 1)
    scores = [("top probability", top)]
    scores += [
        (f"{name} uncertainty", -torch.from_numpy(groups["uncertainty"][name].values))
        for name in ("total", "epistemic")
    ]
    for name, certainty in (*scores, ("at best (errors first)", correct)):
        coverage, risk = metrics.risk_coverage(certainty.double(), correct)
        style = {"color": "0.5", "linestyle": ":"} if certainty is correct else {}
        axis.plot(100 * coverage, 100 * risk, label=f"{name}: area {float(risk.mean()):.5f}", **style)
    axis.axhline(
        100 * float((~correct).double().mean()), color="0.7", linewidth=1, linestyle="--", label="none refused"
    )
    if bool(correct.all()):
        axis.text(50, 0.5, "no errors", ha="center", transform=axis.get_xaxis_transform())
    axis.set(xlabel=f"coverage: {word} kept (%)", ylabel="risk: errors among them (%)", xlim=(0, 100))
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8, loc="center left")
    return figure
