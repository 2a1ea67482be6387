"""The study's figure 4: density of one class's softmax from 10 to 1000 draws, of one run or models side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ppl_bnn.errors import UserError
from ppl_bnn.results.figures.layout import Groups, new_figure, probability_axis, save, show_image, wrapped
from ppl_bnn.results.figures.side_by_side import check_images, check_same_images, images_with_draws, load_runs
from ppl_bnn.results.idata import NARROWEST, density, draws_of

DRAWS = (10, 25, 50, 100, 200, 400, 1000)
# The study shows an image of class 2.
_CLASS = 2
_RESAMPLES = 100


def compare_draw_counts(
    results: Sequence[Path],
    path: Path,
    *,
    names: Sequence[str] | None = None,
    image: int | None = None,
    label: int | None = None,
    counts: Sequence[int] = DRAWS,
) -> Path:
    """Draw `densities_by_count` of one or several models' ``predictive.nc`` into `path` (PNG) and return it.

    Args:
        results: one result for each model, all of the same test images.
        names: titles of the panels (default: the runs' names).

    Raises:
        UserError: as `densities_by_count` does; no results, results without draws, or another number of names.
        FileError: a result that cannot be read.
    """
    figure = densities_by_count(load_runs(results, names, kind="predictive"), image=image, label=label, counts=counts)
    return save(figure, path)


def densities_by_count(
    runs: Mapping[str, Groups],
    *,
    image: int | None = None,
    label: int | None = None,
    counts: Sequence[int] = DRAWS,
) -> Figure:
    """Density of one class's softmax for one image: a panel for each run, a curve for each number of draws.

    A curve is of the first so many draws of the run. Counts above the number of draws become one curve of all draws.

    Args:
        runs: {name of a run: its groups}, all of the same images.
        image: number of the test image (default: the first of class 2, the study's, that has draws in all runs).
        label: number of the class whose softmax is drawn (default: the image's true class).
        counts: numbers of draws, each at least 2.

    Raises:
        UserError: runs of different images, no such image or class, no image of class 2 to show, or a wrong count.
    """
    check_same_images(runs)
    first = next(iter(runs.values()))
    labels = first["observed_data"]["y"].values
    classes = [str(name) for name in first["posterior_predictive"]["class"].values]
    if image is None:
        image = next((one for one in images_with_draws(runs) if labels[one] == _CLASS), None)
        if image is None:
            raise UserError(f"no image of class {_CLASS} has draws in every result; give the image's number")
    check_images([image], runs)
    label = int(labels[image]) if label is None else label
    if not 0 <= label < len(classes):
        raise UserError(f"label must be from 0 to {len(classes) - 1}, got {label}")
    if not counts or min(counts) < 2:
        raise UserError(f"counts must be numbers of draws of at least 2, got {list(counts)}")
    figure, axes = new_figure(
        f"Softmax of {classes[label]} for test image #{image} (true class {classes[labels[image]]})\n"
        f"densities by number of draws; kernel standard deviation at least {NARROWEST}",
        1.8 + 4.4 * len(runs),
        4.2,
        1,
        1 + len(runs),
        width_ratios=[1.5, *[4.4] * len(runs)],
    )
    show_image(axes[0], first["constant_data"]["image"].values[image])
    colours = dict(
        zip(sorted(set(counts)), colormaps["viridis_r"](np.linspace(0.05, 1, len(set(counts)))), strict=True)
    )
    for axis, (name, groups) in zip(axes[1:], runs.items(), strict=True):
        values = draws_of(groups, image)[label]
        # The last curve of a run keeps the colour of the least count that it falls short of.
        drawn = {min(count, len(values)): colours[count] for count in sorted(colours, reverse=True)}
        for count in sorted(drawn):
            axis.plot(*density(values[:count]), color=drawn[count], linewidth=1.3, label=f"{count:,}")
        axis.set_title(wrapped(f"{name}: mean {values.mean():.3f} ({len(values):,} draws)", 4, 9), fontsize=9)
        axis.set(xlabel=f"softmax of {classes[label]}", ylabel="density")
        axis.set_ylim(bottom=0)
        probability_axis(axis)
        # Away from the peak.
        side = "upper left" if values.mean() > 0.5 else "upper right"
        axis.legend(title="draws", frameon=False, fontsize=8, title_fontsize=8, loc=side)
    return figure


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
    check_images([image], {title: groups})
    label = int(probs.sel(obs_id=image).std(("chain", "draw")).values.argmax()) if label is None else label
    classes = [str(name) for name in probs["class"].values]
    if not 0 <= label < len(classes):
        raise UserError(f"label must be from 0 to {len(classes) - 1}, got {label}")
    values = draws_of(groups, image)[label]
    together = 2 if sampling == "antithetic" else 1
    counts = [count // together * together for count in DRAWS if count < len(values)] + [len(values)]
    band = "" if sampling == "sobol" else "band: 90% of the densities of resampled draws; "
    columns = min(4, len(counts) + 1)
    rows = -(-(len(counts) + 1) // columns)
    figure, axes = new_figure(
        f"{title}, image #{image} (a {classes[labels[image]]}): density of the softmax of {classes[label]}, by number "
        f"of draws\n({band}dashed: mean; dotted: all draws; kernel standard deviation at least {NARROWEST})",
        3 * columns,
        2.5 * rows + 0.7,
        rows,
        columns,
        squeeze=False,
    )
    flat, random = axes.ravel(), np.random.default_rng(0)
    show_image(flat[0], groups["constant_data"]["image"].values[image])
    whole, top = density(values), 0.0
    for axis, count in zip(flat[1:], counts, strict=False):
        some = values[:count]
        grid, height = density(some)
        axis.plot(grid, height, color="C0")
        highest, mean = float(height.max()), f"mean {some.mean():.3f}"
        if band:
            # A whole number of pairs, where draws come in pairs.
            pairs = some[: count // together * together].reshape(-1, together)
            resampled = [density(random.choice(pairs, len(pairs)).ravel()) for _ in range(_RESAMPLES)]
            low, high = np.quantile([np.interp(grid, *one, left=0, right=0) for one in resampled], (0.05, 0.95), axis=0)
            axis.fill_between(grid, low, high, color="C0", alpha=0.25, linewidth=0)
            highest = float(high.max())
            mean += f" ± {pairs.mean(1).std(ddof=1) / np.sqrt(len(pairs)):.3f}"
        axis.plot(*whole, ":", color="0.3", linewidth=1)
        axis.axvline(some.mean(), color="C1", linestyle="--", linewidth=1)
        axis.set_title(f"{count} draws: {mean}", fontsize=9)
        axis.set_xlabel(f"softmax of {classes[label]}")
        probability_axis(axis)
        # No curve is cut; the band of few draws may be.
        top = max(top, float(height.max()), min(highest, 4 * float(whole[1].max())))
    for axis in flat[1 : 1 + len(counts)]:
        axis.set(ylim=(0, 1.05 * top), yticks=[])
    for axis in flat[1 + len(counts) :]:
        axis.set_axis_off()
    return figure
