"""Figures of pruning, of one network or several, each trained once or more: what is lost, and which images notice."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ppl_bnn.results.figures.layout import Groups, new_figure, save, show_image
from ppl_bnn.results.figures.networks import legend_name, read_networks, trainings_note
from ppl_bnn.results.figures.side_by_side import first_of_each_class

_PANELS = (
    ("accuracy", "accuracy"),
    ("nll", "NLL (nats per datum)"),
    ("ece", "ECE"),
    ("epistemic", "epistemic uncertainty (nats, mean)"),
    ("changed", "answers unlike {base} (%)"),
    ("seconds", "seconds a draw of the whole test set"),
)


def draw_pruning(results: Sequence[Path] | Mapping[str, Sequence[Path]], folder: Path) -> list[Path]:
    """Draw ``pruning.png`` of ``pruning.nc`` files, a curve for each network, and of images ``pruning_answers.png``.

    The answers are those of the first network.

    Args:
        results: the files, grouped into networks as `read_networks` says, or {name: the files of its trainings}.

    Raises:
        FileError: a result that cannot be read.
        UserError: no path, or results of different data.
    """
    title, networks = read_networks(results)
    name, trainings = next(iter(networks.items()))
    of_first = f"{name}, {title}" if len(networks) > 1 else title
    paths = [save(pruning_curves(networks, title), folder / "pruning.png")]
    if "image" in trainings[0].get("constant_data", {}):
        paths.append(save(changing_answers(trainings[0], of_first), folder / "pruning_answers.png"))
    return paths


def pruning_accuracy(results: Mapping[str, Sequence[Path]], path: Path) -> Path:
    """Draw `accuracy_curves` of networks' ``pruning.nc`` into `path` (PNG) and return it.

    Args:
        results: {name of a network: the files of its trainings}; a merged file holds several. They may have different
            numbers of test images, which the legend then names.

    Raises:
        FileError: a result that cannot be read.
        UserError: no path, or results of different data.
    """
    title, networks = read_networks(results, same_number=False)
    counts = {name: trainings[0]["pruning"].sizes["image"] for name, trainings in networks.items()}
    if len(set(counts.values())) > 1:
        networks = {f"{name} ({counts[name]:,} images)": trainings for name, trainings in networks.items()}
    return save(accuracy_curves(networks, title), path)


def accuracy_curves(networks: Mapping[str, Sequence[Groups]], title: str) -> Figure:
    """Test accuracy against the percentage of weights pruned, both linear, every level down to the collapse.

    Args:
        networks: {name: its trainings}. Of several trainings: points of each, the mean at the levels that all of them
            have, and the band from the least to the most.
    """
    figure, axis = new_figure(f"Test accuracy under pruning, {title}{trainings_note(networks)}", 7, 4.6, 1, 1)
    for colour, (name, trainings) in enumerate(networks.items()):
        _curve(axis, [_values(groups) for groups in trainings], "accuracy", f"C{colour}", name)
    axis.set(xlabel="weights pruned (%)", ylabel="test accuracy", xlim=(-2, 102), ylim=(0, 1.02))
    axis.set_xticks(range(0, 101, 10))
    axis.grid(axis="y", color="0.9", linewidth=0.8)
    axis.legend(frameon=False, loc="lower left")
    return figure


def pruning_curves(networks: Mapping[str, Sequence[Groups]], title: str) -> Figure:
    """Accuracy, NLL, ECE, epistemic uncertainty, changed answers and time against the share of weights pruned.

    A curve for each network. Of several trainings: each training's points, the mean of the levels that all of them
    have, and the band from the least to the most. Levels that lose more than 10 points of their training's best
    accuracy are left off the scale and named: a network pruned to nothing would flatten everything worth seeing.

    Args:
        networks: {name: its trainings}.
    """
    values = {name: [_values(groups) for groups in trainings] for name, trainings in networks.items()}
    shown = {
        name: [_where(each, each["accuracy"] >= each["accuracy"].max() - 0.1) for each in trainings]
        for name, trainings in values.items()
    }
    names = networks if len(networks) > 1 else [""]
    off = [text for name, each in zip(names, values.values(), strict=True) if (text := _off_the_scale(each, name))]
    draws = {int(groups["pruning"]["num_samples"][0]) for trainings in networks.values() for groups in trainings}
    counts = " or ".join(map(str, sorted(draws)))
    note = f"\noff the scale, pruned (accuracy): {'; '.join(off)}" if off else ""
    title = f"Pruning on {title} ({counts} draws a level{trainings_note(networks)}){note}"
    figure, axes = new_figure(title, 12, 7.4, 2, 3)
    every = [each for trainings in shown.values() for each in trainings]
    least, most = (choose(float(each["pruned"][at]) for each in every) for choose, at in ((max, 0), (max, -1)))
    base = "the unpruned network's" if least < 0.005 else f"those at {least:.4g}% pruned"
    for axis, (quantity, label) in zip(axes.ravel(), _PANELS, strict=True):
        for colour, (name, trainings) in enumerate(shown.items()):
            _curve(axis, trainings, quantity, f"C{colour}", name)
            first = np.mean([each[quantity][0] for each in trainings])
            axis.axhline(float(first), color=f"C{colour}" if len(shown) > 1 else "0.6", linewidth=1, linestyle="--")
        axis.set_xlabel("weights pruned (%)", fontsize=9)
        axis.set_ylabel(label.format(base=base), fontsize=9)
        if quantity in ("seconds", "changed", "ece"):
            axis.set_ylim(bottom=0)
        # Stretched towards the end, where everything happens.
        axis.set_xscale("function", functions=(lambda x: -np.log(np.maximum(101 - x, 0.1)), lambda x: 101 - np.exp(-x)))
        axis.set_xticks([0, 50, 80, 90, 95, 98, 99, 100])
        axis.set_xlim(-10, most + 0.3)
    if len(networks) > 1:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), frameon=False, ncols=4, loc="outside lower center")
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
        "epistemic": levels["epistemic"].values.reshape(len(answers), -1).mean(1),
        "changed": 100 * (answers != answers[0]).reshape(len(answers), -1).mean(1),
        "seconds": levels["seconds"].values / levels["num_samples"].values,
    }


def _off_the_scale(trainings: Sequence[Mapping[str, np.ndarray]], name: str) -> str:
    found: dict[str, list[float]] = {}
    for each in trainings:
        left_off = _where(each, each["accuracy"] < each["accuracy"].max() - 0.1)
        for pruned, accuracy in zip(left_off["pruned"], left_off["accuracy"], strict=True):
            found.setdefault(f"{pruned:.4g}%", []).append(float(accuracy))
    texts = []
    for level, accuracies in found.items():
        ends = sorted({f"{accuracy:.3f}" for accuracy in (min(accuracies), max(accuracies))})
        texts.append(f"{level} ({' to '.join(ends)})")
    return f"{name} {', '.join(texts)}".strip() if texts else ""


def _where(values: Mapping[str, np.ndarray], chosen: np.ndarray) -> dict[str, np.ndarray]:
    return {name: of_levels[chosen] for name, of_levels in values.items()}


def _curve(axis: Axes, trainings: Sequence[Mapping[str, np.ndarray]], quantity: str, colour: str, name: str) -> None:
    points = [
        {round(float(pruned), 2): float(value) for pruned, value in zip(each["pruned"], each[quantity], strict=True)}
        for each in trainings
    ]
    if len(points) == 1:
        axis.plot(
            list(points[0]),
            list(points[0].values()),
            "o-",
            color=colour,
            markersize=4,
            label=legend_name(name, trainings),
        )
        return
    common = sorted(set.intersection(*(set(own) for own in points)))
    for own in points:
        # Without levels in common there is no mean to connect them.
        axis.plot(list(own), list(own.values()), "." if common else ".-", color=colour, markersize=4)
    together = np.array([[own[pruned] for pruned in common] for own in points])
    if common:
        axis.fill_between(common, together.min(0), together.max(0), color=colour, alpha=0.2, linewidth=0)
    axis.plot(common, together.mean(0), color=colour, label=legend_name(name, trainings))


def _one_of_a_class(candidates: np.ndarray, loss: np.ndarray, labels: np.ndarray, count: int) -> list[int]:
    most_first = candidates[np.argsort(-loss[candidates], kind="stable")]
    return list(first_of_each_class(most_first, labels).values())[:count]
