"""Figures of the posterior predictive's draws: the study's figures 4 and 5 for any run, and the risk-coverage curve."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from ppl_bnn import metrics
from ppl_bnn.errors import UserError
from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.predictive import Groups, new_figure, save, show_image

DRAWS = (10, 25, 50, 100, 200, 400, 1000)
_RESAMPLES = 100


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


def compare_densities(left: Path, right: Path, path: Path, *, images: Sequence[int] | None = None) -> Path:
    """Draw `density_by_class` of two runs' ``predictive.nc`` side by side into `path` (PNG).

    Raises:
        UserError: they are not of the same images and classes, or an image that is not in them.
        FileError: a result that cannot be read.
    """
    runs: dict[str, Groups] = {}
    for file in (left, right):
        idata = inference_data.load(file)
        name = str(idata.attrs.get("run", file))
        runs[name if name not in runs else f"{name} ({file})"] = netcdf.groups_of(idata)
    return save(density_by_class(runs, images=images), path)


def density_by_draws(
    groups: Groups, title: str, *, image: int | None = None, label: int | None = None, sampling: str = "independent"
) -> Figure:
    """Density of one class's softmax for one image, from the first 10, 25, ... draws up to all (the study's figure 4).

    The band holds 90% of the densities of draws resampled with replacement: the Monte Carlo error at that number.

    Args:
        sampling: how the draws were made: ``antithetic`` pairs are resampled as pairs; ``sobol`` points, which depend
            on each other, do not tell their error and have no band.
        image: position of the image (default: the one with the most epistemic uncertainty).
        label: the class (default: the one whose softmax the draws differ on the most).

    Raises:
        UserError: no such image or class.
    """
    probs, labels = groups["posterior_predictive"]["probs"], groups["observed_data"]["y"].values
    image = int(groups["uncertainty"]["epistemic"].values.argmax()) if image is None else image
    _check_images([image], groups)
    label = int(probs.sel(obs_id=image).std(("chain", "draw")).values.argmax()) if label is None else label
    classes = [str(name) for name in probs["class"].values]
    if not 0 <= label < len(classes):
        raise UserError(f"label must be from 0 to {len(classes) - 1}, got {label}")
    values = inference_data.draws_of(groups, image)[label]
    together = 2 if sampling == "antithetic" else 1
    counts = [count // together * together for count in DRAWS if count < len(values)] + [len(values)]
    band = "" if sampling == "sobol" else "band: 90% of the densities of resampled draws; "
    columns = min(4, len(counts) + 1)
    rows = -(-(len(counts) + 1) // columns)
    figure, axes = new_figure(
        f"{title}, image #{image} (a {classes[labels[image]]}): density of the softmax of {classes[label]}, by number "
        f"of draws\n({band}dashed: mean; dotted: all draws)",
        3 * columns,
        2.5 * rows + 0.7,
        rows,
        columns,
        squeeze=False,
    )
    flat, random = axes.ravel(), np.random.default_rng(0)
    show_image(flat[0], groups["constant_data"]["image"].values[image])
    whole, top = inference_data.density(values), 0.0
    for axis, count in zip(flat[1:], counts, strict=False):
        some = values[:count]
        grid, height = inference_data.density(some)
        axis.plot(grid, height, color="C0")
        highest, mean = float(height.max()), f"mean {some.mean():.3f}"
        if band:
            # A whole number of pairs, where draws come in pairs.
            pairs = some[: count // together * together].reshape(-1, together)
            resampled = [inference_data.density(random.choice(pairs, len(pairs)).ravel()) for _ in range(_RESAMPLES)]
            low, high = np.quantile([np.interp(grid, *one, left=0, right=0) for one in resampled], (0.05, 0.95), axis=0)
            axis.fill_between(grid, low, high, color="C0", alpha=0.25, linewidth=0)
            highest = float(high.max())
            mean += f" ± {pairs.mean(1).std(ddof=1) / np.sqrt(len(pairs)):.3f}"
        axis.plot(*whole, ":", color="0.3", linewidth=1)
        axis.axvline(some.mean(), color="C1", linestyle="--", linewidth=1)
        axis.set_title(f"{count} draws: {mean}", fontsize=9)
        axis.set(xlim=(0, 1), xlabel=f"softmax of {classes[label]}")
        top = max(top, min(highest, 4 * float(whole[1].max())))
    for axis in flat[1 : 1 + len(counts)]:
        axis.set(ylim=(0, 1.05 * top), yticks=[])
    for axis in flat[1 + len(counts) :]:
        axis.set_axis_off()
    return figure


def density_by_class(runs: dict[str, Groups], *, images: Sequence[int] | None = None) -> Figure:
    """Density of the true class's softmax for one test image of each class, the runs side by side (study, figure 5).

    Args:
        runs: {name of a run: its groups}, all of the same images.
        images: positions of the images to show (default: of each class that occurs the one on which the runs'
            epistemic uncertainties add up to the most).

    Raises:
        UserError: the runs are not of the same images and classes, or an image that is not in them.
    """
    (name, groups), *others = runs.items()
    labels, probs = groups["observed_data"]["y"].values, groups["posterior_predictive"]["probs"]
    for other, its in others:
        same = np.array_equal(its["observed_data"]["y"], labels) and np.array_equal(
            its["constant_data"]["image"], groups["constant_data"]["image"]
        )
        if not same or its["posterior_predictive"]["class"].values.tolist() != probs["class"].values.tolist():
            raise UserError(f"{name} and {other} are not of the same test images; predict both on the same data")
    if images is None:
        epistemic = np.sum([its["uncertainty"]["epistemic"].values for its in runs.values()], 0)
        images = [int(np.where(labels == label, epistemic, -1).argmax()) for label in np.unique(labels)]
        choice = "of each class the image with the most epistemic uncertainty"
    else:
        choice = "images chosen by number"
    for its in runs.values():
        _check_images(images, its)
    classes = [str(one) for one in probs["class"].values]
    columns = min(5, len(images))
    blocks, height = -(-len(images) // columns), 1 + len(runs)
    figure, axes = new_figure(
        f"Density of the true class's softmax over the draws ({choice}; dashed: mean, the predictive probability)",
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
            values = inference_data.draws_of(its, image)[label]
            grid, density = inference_data.density(values)
            axis.fill_between(grid, density, color=f"C{row}", alpha=0.6, linewidth=0)
            axis.axvline(values.mean(), color="0.2", linestyle="--", linewidth=1)
            right = values.mean() > 0.5
            axis.text(
                0.02 if right else 0.98, 0.95, f"{values.mean():.2f}", transform=axis.transAxes, fontsize=8,
                va="top", ha="left" if right else "right",
            )  # fmt: skip
            axis.set(xlim=(0, 1), ylim=(0, 1.05 * density.max()), yticks=[])
            axis.tick_params(labelsize=7, labelbottom=row == len(runs) - 1)
            if column == 0 and run:
                axis.set_ylabel(f"{run}\n({inference_data.draws_in(its)} draws)", fontsize=8, color=f"C{row}")
    return figure


def risk_coverage(groups: Groups, title: str) -> Figure:
    """Error rate among the images kept against the share kept, when the most uncertain are refused first."""
    probs = torch.from_numpy(groups["uncertainty"]["mean_probs"].values)
    labels = torch.from_numpy(groups["observed_data"]["y"].values)
    top, choice = probs.max(1)
    correct = choice == labels
    figure, axis = new_figure(f"Risk against coverage on {title}: refuse the least certain images first", 7, 5, 1, 1)
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
    axis.set(xlabel="coverage: images kept (%)", ylabel="risk: errors among them (%)", xlim=(0, 100))
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8, loc="center left")
    return figure


def _check_images(images: Sequence[int], groups: Groups) -> None:
    known = groups["posterior_predictive"]["obs_id"].values
    if unknown := [image for image in images if image not in known]:
        raise UserError(f"image {unknown[0]} has no draws; the images go from {known.min()} to {known.max()}")
