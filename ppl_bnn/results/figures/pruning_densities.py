"""The study's figure 9: predictive densities at several levels of pruning, networks side by side."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure, SubFigure

from ppl_bnn.errors import UserError
from ppl_bnn.results.figures.layout import Groups, probability_axis, save, show_image, wrapped
from ppl_bnn.results.figures.side_by_side import (
    check_images,
    check_same_images,
    first_of_each_class,
    images_with_draws,
    load_runs,
)
from ppl_bnn.results.idata import NARROWEST, density, draws_in

LEVELS = (0.0, 25.0, 50.0, 70.0, 90.0)


def compare_pruning_densities(
    results: Sequence[Path],
    path: Path,
    *,
    images: Sequence[int] | None = None,
    levels: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> Path:
    """Draw `densities_under_pruning` of one or several networks' ``pruning.nc`` into `path` (PNG) and return it.

    Args:
        results: one result for each network, all of the same test images.
        images: numbers of the test images (default: of each class the first with draws in all results).
        levels: percentages of weights pruned; the level nearest to each is drawn (default: 0, 25, 50, 70 and 90).
        names: of the networks (default: the runs' names).

    Raises:
        UserError: results of different images, results without draws, an image without draws in one of them, a
            percentage outside 0 to 100, or another number of names.
        FileError: a result that cannot be read.
    """
    runs = load_runs(results, names, kind="pruning")
    choice = "images chosen by number"
    if images is None:
        labels = next(iter(runs.values()))["observed_data"]["y"].values
        images, choice = _one_a_class(images_with_draws(runs), labels), "of each class the first image with draws"
        if not images:
            raise UserError("the results kept draws of no common image; prune again with the same images to keep")
    levels = LEVELS if levels is None else levels
    title = f"Density of the true class's softmax, by share of weights pruned ({choice})"
    return save(densities_under_pruning(runs, title, images=images, levels=levels), path)


def density_under_pruning(groups: Groups, title: str) -> Figure:
    """`densities_under_pruning` of one network at every level.

    The image shown is the one of its class with draws that has the most epistemic uncertainty at the first level.
    """
    epistemic = groups["pruning"]["epistemic"].isel(level=0).values
    kept = sorted(images_with_draws({title: groups}), key=lambda image: -epistemic[image])
    title = f"{title}: density of the true class's softmax, by share of weights pruned"
    title += " (of each class the image with the most epistemic uncertainty)"
    return densities_under_pruning({"": groups}, title, images=_one_a_class(kept, groups["observed_data"]["y"].values))


def densities_under_pruning(
    runs: Mapping[str, Groups], title: str, *, images: Sequence[int], levels: Sequence[float] | None = None
) -> Figure:
    """A block of panels for each network, a panel for each image: densities of its true class's softmax by level.

    The levels lie below one another, the least pruned on top, each density scaled to its own peak. The labels are the
    shares that were pruned in fact. Of merged trainings they are the means, and the draws are those of all trainings.

    Args:
        runs: {name of a network: its groups}, all of the same images.
        images: numbers of the test images.
        levels: percentages of weights pruned; the level nearest to each is drawn (default: every level).

    Raises:
        UserError: runs of different images, an image without draws in one of them, or a percentage outside 0 to 100.
    """
    check_same_images(runs)
    check_images(images, runs)
    if levels is not None and (not levels or not all(0 <= level <= 100 for level in levels)):
        raise UserError(f"levels must be percentages of weights pruned, from 0 to 100, got {list(levels)}")
    chosen = [_levels_of(groups, levels) for groups in runs.values()]
    columns = min(len(images), 5 if len(runs) == 1 else 2)
    rows = math.ceil(len(images) / columns)
    most = max(len(shares) for shares in chosen)
    width = 2.7 * columns * len(runs)
    figure = Figure(figsize=(width, 0.33 * (most + 2.2) * rows + 1.4), layout="constrained")
    title = f"{title}\neach density scaled to its peak; kernel standard deviation at least {NARROWEST}"
    figure.suptitle(wrapped(title, width, 10), fontsize=10)
    blocks = figure.subfigures(1, len(runs), squeeze=False)[0]
    for block, (name, groups), shares in zip(blocks, runs.items(), chosen, strict=True):
        name = f"{name}: {draws_in(groups):,} draws" if name else f"{draws_in(groups):,} draws"
        block.suptitle(wrapped(name, 2.7 * columns, 10), fontsize=10)
        _draw_block(block, groups, images, shares, rows, columns)
    return figure


def _draw_block(
    block: SubFigure, groups: Groups, images: Sequence[int], shares: Mapping[int, float], rows: int, columns: int
) -> None:
    probs, labels = groups["posterior_predictive"]["probs"], groups["observed_data"]["y"].values
    classes = [str(name) for name in probs["class"].values]
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(shares)))
    baselines = np.arange(len(shares))[::-1]
    axes = block.subplots(rows, columns, squeeze=False).ravel()
    for place, (axis, image) in enumerate(zip(axes, images, strict=False)):
        label = int(labels[image])
        for level, baseline, colour in zip(shares, baselines, colours, strict=True):
            values = probs.sel(obs_id=image).isel({"level": level, "class": label}).values.ravel()
            # Merged trainings that differ in their number of draws are filled up with NaN.
            grid, height = density(values[~np.isnan(values)])
            top = baseline + 0.9 * height / height.max()
            axis.fill_between(grid, baseline, top, facecolor=(*colour[:3], 0.75), edgecolor=colour, linewidth=0.6)
            axis.axhline(baseline, color="0.8", linewidth=0.5, zorder=0)
        axis.set_title(f"#{image}: {classes[label]}", fontsize=9)
        names = [f"{100 * share:.4g}%" for share in shares.values()]
        axis.set_yticks(baselines, names if place % columns == 0 else [""] * len(names))
        axis.set_ylim(-0.05, len(shares) + 2)
        axis.tick_params(labelsize=7)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        probability_axis(axis)
        above = 2 / (len(shares) + 2)
        shown = axis.inset_axes((0.3, 1 - 0.97 * above, 0.4, 0.97 * above))
        show_image(shown, groups["constant_data"]["image"].values[image])
    for axis in axes[len(images) :]:
        axis.set_axis_off()


def _levels_of(groups: Groups, levels: Sequence[float] | None) -> dict[int, float]:
    """{position of a level: its share of weights pruned}, the least first."""
    shares = groups["pruning"]["pruned_fraction"]
    # Merged results have the levels of each training.
    found = shares.mean("chain").values if "chain" in shares.dims else shares.values
    order = [int(place) for place in np.argsort(found, kind="stable")]
    if levels is not None:
        nearest = {int(np.abs(100 * found - level).argmin()) for level in levels}
        order = [place for place in order if place in nearest]
    return {place: float(found[place]) for place in order}


def _one_a_class(images: Sequence[int], labels: np.ndarray) -> list[int]:
    return [image for _, image in sorted(first_of_each_class(images, labels).items())]
