"""Figures of pruning, of one training or of several: what is lost, and which images notice."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ppl_bnn.errors import UserError
from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.predictive import Groups, new_figure, save, show_image

_PANELS = (
    ("accuracy", "accuracy"),
    ("nll", "NLL (nats per datum)"),
    ("ece", "ECE"),
    ("epistemic", "epistemic uncertainty (nats, mean)"),
    ("changed", "answers unlike {base} (%)"),
    ("seconds", "seconds a draw of the whole test set"),
)


def draw_pruning(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Draw ``pruning.png`` of one or several trainings' ``pruning.nc``, and ``pruning_answers.png`` of the first.

    Raises:
        FileError: a result that cannot be read.
        UserError: no path, or results of different data.
    """
    if not paths:
        raise UserError("give at least one pruning.nc")
    loaded = [inference_data.load(path) for path in paths]
    title = str(loaded[0].attrs["title"])
    files = [netcdf.groups_of(idata) for idata in loaded]
    for path, idata, groups in zip(paths, loaded, files, strict=True):
        if idata.attrs["title"] != title or groups["pruning"].sizes["image"] != files[0]["pruning"].sizes["image"]:
            raise UserError(f"{path} has other images than {paths[0]}: {idata.attrs['title']} and {title}")
    runs = [training for groups in files for training in _trainings(groups)]
    if settings := netcdf.read_attrs(paths[0]).get("inputs", {}).get("settings"):
        tuned = f", fine-tuned for {settings['finetune_epochs']} epochs" if settings["finetune_epochs"] else ""
        title = f"{title} by {settings['criterion']} of {settings['structure']}{tuned}"
    return [
        save(pruning_curves(runs, title), folder / "pruning.png"),
        save(changing_answers(runs[0], title), folder / "pruning_answers.png"),
    ]


def pruning_curves(runs: Sequence[Groups], title: str) -> Figure:
    """Accuracy, NLL, ECE, epistemic uncertainty, changed answers and time against the share of weights pruned.

    Of several trainings: each training's points, the mean of the levels that all of them have, and the band from the
    least to the most. Levels that lose more than 10 points of accuracy are left off the scale and named: a network
    pruned to nothing would flatten everything worth seeing.
    """
    values = [_values(groups) for groups in runs]
    best = max(each["accuracy"].max() for each in values)
    off = sorted(
        {
            f"{pruned:.4g}% ({accuracy:.3f})"
            for each in values
            for pruned, accuracy in zip(each["pruned"], each["accuracy"], strict=True)
            if accuracy < best - 0.1
        }
    )
    draws = int(runs[0]["pruning"]["num_samples"][0])
    trainings = f", {len(runs)} trainings: mean, and band from the least to the most" if len(runs) > 1 else ""
    note = f"\noff the scale, pruned (accuracy): {', '.join(off)}" if off else ""
    figure, axes = new_figure(f"Pruning on {title} ({draws} draws a level{trainings}){note}", 12, 7, 2, 3)
    least = max(float(each["pruned"][0]) for each in values)
    base = "the unpruned network's" if least < 0.005 else f"those at {least:.4g}% pruned"
    for axis, (name, label) in zip(axes.ravel(), _PANELS, strict=True):
        _curve(axis, values, name, best)
        axis.set(xlabel="weights pruned (%)", ylabel=label.format(base=base))
        # Stretched towards the end, where everything happens.
        axis.set_xscale("function", functions=(lambda x: -np.log(np.maximum(101 - x, 0.1)), lambda x: 101 - np.exp(-x)))
        axis.set_xticks([0, 50, 80, 90, 95, 98, 99, 100])
        axis.set_xlim(-10, max(float(each["pruned"][each["accuracy"] >= best - 0.1].max()) for each in values) + 0.3)
    return figure


def changing_answers(groups: Groups, title: str, *, count: int = 5) -> Figure:
    """The images that notice pruning first: class probabilities of the averaged predictive over the levels.

    Upper row: those whose right answer becomes wrong, the largest loss of confidence in it first; lower row: those
    that keep it and lose the most. One image of a class in a row, at levels within 10 points of the best accuracy.
    """
    levels = _by_fraction(groups)
    accuracy = levels["accuracy"].values
    shown = np.flatnonzero(accuracy >= accuracy.max() - 0.1)
    probs = levels["mean_probs"].values[shown]
    labels = groups["observed_data"]["y"].values
    answers = probs.argmax(-1)
    true = np.take_along_axis(probs, labels[None, :, None], 2)[:, :, 0]
    right = answers[0] == labels
    wrong_at_last = answers[-1] != labels
    loss = true[0] - true[-1]
    rows = [
        _one_of_a_class(np.flatnonzero(right & turned), loss, labels, count)
        for turned in (wrong_at_last, ~(answers != labels).any(0))
    ]
    percent = 100 * levels["pruned_fraction"].values[shown]
    turning = int((right & wrong_at_last).sum())
    figure, axes = new_figure(
        f"{title}: class probabilities as pruning grows; red: the answer is wrong\n"
        f"above: right at first, wrong at {percent[-1]:.4g}% pruned ({turning} of {len(labels):,} images do that); "
        "below: always right, the largest loss of confidence",
        2.5 * count + 0.6,
        8.6,
        4,
        count,
        height_ratios=(1, 1.9, 1, 1.9),
    )
    classes = [str(name) for name in levels["class"].values]
    names = [f"{value:.3g}" for value in percent]
    for row, chosen in enumerate(rows):
        for column in range(count):
            above, below = axes[2 * row, column], axes[2 * row + 1, column]
            if column >= len(chosen):
                above.set_axis_off()
                below.set_axis_off()
                continue
            index = int(chosen[column])
            show_image(above, groups["constant_data"]["image"][index].values)
            above.set_title(
                f"#{index}: {classes[labels[index]]}\np(true) {true[0, index]:.2f} to {true[-1, index]:.2f}", fontsize=8
            )
            below.imshow(probs[:, index].T, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            wrong = answers[:, index] != labels[index]
            places = np.arange(len(percent))
            below.plot(places[~wrong], answers[~wrong, index], "o", color="white", markeredgecolor="0.2", markersize=5)
            below.plot(places[wrong], answers[wrong, index], "o", color="C3", markeredgecolor="white", markersize=6)
            below.set_xticks(places, names, fontsize=7, rotation=90 if len(names) > 6 else 0)
            below.set_yticks(np.arange(len(classes)), classes if column == 0 else [], fontsize=7)
            below.set_xlabel("weights pruned (%)", fontsize=7)
            if column == 0:
                below.set_ylabel("class", fontsize=7)
            below.spines[:].set_visible(False)
    return figure


def _trainings(groups: Groups) -> list[Groups]:
    # Merged results have a chain for each training.
    levels = groups["pruning"]
    chains = (
        [levels.isel(chain=chain) for chain in range(levels.sizes["chain"])] if "chain" in levels.dims else [levels]
    )
    return [{**groups, "pruning": chain} for chain in chains]


def _by_fraction(groups: Groups) -> xr.Dataset:
    # The level that others are compared with comes first; in merged results levels at a threshold do.
    levels = groups["pruning"]
    return levels.isel(level=np.argsort(levels["pruned_fraction"].values, kind="stable"))


def _values(groups: Groups) -> dict[str, np.ndarray]:
    levels = _by_fraction(groups)
    answers = levels["mean_probs"].values.argmax(-1)
    return {
        "pruned": 100 * levels["pruned_fraction"].values,
        **{name: levels[name].values for name in ("accuracy", "nll", "ece")},
        "epistemic": levels["epistemic"].values.mean(1),
        "changed": 100 * (answers != answers[0]).mean(1),
        "seconds": levels["seconds"].values / levels["num_samples"].values,
    }


def _curve(axis: Axes, values: Sequence[dict[str, np.ndarray]], name: str, best: float) -> None:
    points = [
        {round(float(pruned), 2): float(each[name][at]) for at, pruned in enumerate(each["pruned"])
         if each["accuracy"][at] >= best - 0.1}
        for each in values
    ]  # fmt: skip
    alone = len(points) == 1
    for own in points:
        axis.plot(list(own), list(own.values()), "o-" if alone else ".", color="C0", markersize=4)
    if not alone and (common := sorted(set.intersection(*(set(own) for own in points)))):
        together = np.array([[own[pruned] for pruned in common] for own in points])
        axis.fill_between(common, together.min(0), together.max(0), color="C0", alpha=0.2, linewidth=0)
        axis.plot(common, together.mean(0), color="C0")
    first = float(np.mean([next(iter(own.values())) for own in points]))
    axis.axhline(first, color="0.6", linewidth=1, linestyle="--")
    if name in ("seconds", "changed", "ece"):
        axis.set_ylim(bottom=0)


def _one_of_a_class(candidates: np.ndarray, loss: np.ndarray, labels: np.ndarray, count: int) -> list[int]:
    chosen: dict[int, int] = {}
    for index in candidates[np.argsort(-loss[candidates], kind="stable")]:
        chosen.setdefault(int(labels[index]), int(index))
    return list(chosen.values())[:count]
