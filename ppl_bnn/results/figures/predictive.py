"""The figures, each drawn from the InferenceData of `predictive.nc` and `pruning.nc` alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ppl_bnn import metrics
from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.layout import Groups, new_figure, noun, save, show_image
from ppl_bnn.results.figures.pruning_densities import density_under_pruning


def draw_figures(predictive: Path, pruning: Path | None, folder: Path) -> list[Path]:
    """Draw every figure the results allow into `folder` as PNG and return their paths.

    Without labels there is no reliability, and without images of one label each no certainty.

    Args:
        predictive, pruning: ``predictive.nc``, and ``pruning.nc`` or None where nothing was pruned.

    Raises:
        FileError: a result that cannot be read.
        OSError: a figure that cannot be written.
    """
    drawings: dict[str, tuple[Callable[[Groups, str], Figure], Any]] = {}
    predicted = inference_data.load(predictive)
    groups = netcdf.groups_of(predicted)
    if "training" in groups:
        drawings["training"] = (training_curves, predicted)
    if "observed_data" in groups:
        drawings["reliability"] = (reliability_diagram, predicted)
        if "image" in groups.get("constant_data", {}) and groups["uncertainty"]["total"].ndim == 1:
            drawings["certainty"] = (most_and_least_certain, predicted)
    if "layers" in groups:
        drawings["snr"] = (snr_histograms, predicted)
    if pruning is not None:
        swept = inference_data.load(pruning)
        drawings["pruning_density"] = (density_under_pruning, swept)
    paths = []
    for name, (draw, idata) in drawings.items():
        paths.append(save(draw(netcdf.groups_of(idata), str(idata.attrs["title"])), folder / f"{name}.png"))
    return paths


def training_curves(groups: Groups, title: str) -> Figure:
    """Loss, NLL and weighted KL in nats per datum, and accuracy where there are classes, against epoch."""
    history = groups["training"]
    classes = "accuracy" in history and bool(np.isfinite(history["accuracy"]).any())
    figure, axes = new_figure(f"Training on {title}", 10 if classes else 5.5, 4, 1, 2 if classes else 1, squeeze=False)
    left = axes[0, 0]
    epochs = history["epoch"].values
    weighted = history["loss"] - history["nll"]
    for name, values in (("loss", history["loss"]), ("NLL", history["nll"]), ("kl_weight x KL", weighted)):
        if float(values.max()) > 0:
            left.plot(epochs, values, label=name)
    # Densities of numbers may be above 1, and a loss below 0.
    scale = "log" if classes or min(float(history[name].min()) for name in ("loss", "nll")) > 0 else "linear"
    left.set(xlabel="epoch", ylabel="nats per datum", yscale=scale)
    left.legend(frameon=False)
    if classes:
        axes[0, 1].plot(epochs, history["accuracy"], color="C2")
        axes[0, 1].set(xlabel="epoch", ylabel="training accuracy (one draw a step)")
    return figure


def reliability_diagram(groups: Groups, title: str) -> Figure:
    """Accuracy against confidence of the averaged predictive in 15 equal bins, with the share of examples in each.

    Of several labels an example (pixels) all are pooled, without those that are no class: ignored ones.
    """
    probs = torch.from_numpy(groups["uncertainty"]["mean_probs"].values).flatten(0, -2)
    labels = torch.from_numpy(groups["observed_data"]["y"].values).flatten()
    known = (labels >= 0) & (labels < probs.shape[1])
    probs, labels = probs[known], labels[known]
    confidence, correct, count = (values.numpy() for values in metrics.reliability(probs, labels))
    bins = len(count)
    ece = metrics.ece(probs, labels)
    figure, (above, below) = new_figure(
        f"Reliability on {title}: ECE {ece:.4f}", 5.5, 6.5, 2, 1, height_ratios=(3, 1), sharex=True
    )
    left = np.arange(bins) / bins
    above.bar(
        left,
        np.nan_to_num(correct),
        1 / bins,
        align="edge",
        color="C0",
        alpha=0.6,
        edgecolor="white",
        label="accuracy in the bin",
    )
    above.plot(confidence, correct, "o", color="C1", markersize=4, label="accuracy at the mean confidence")
    above.plot([0, 1], [0, 1], "--", color="0.4", linewidth=1, label="perfect calibration")
    above.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1))
    above.legend(frameon=False, loc="upper left")
    below.bar(left, count / count.sum(), 1 / bins, align="edge", color="0.6", edgecolor="white")
    below.set(xlabel="confidence (top probability)", ylabel=f"share of {noun(groups)}", yscale="log")
    return figure


def most_and_least_certain(groups: Groups, title: str, *, count: int = 6) -> Figure:
    """The images with the least and the most total uncertainty, each with its class probabilities.

    Bars are the averaged predictive, lines the interval that holds 90% of the draws.
    """
    total = groups["uncertainty"]["total"].values
    order = np.argsort(total, kind="stable")
    chosen = [*order[:count], *order[::-1][:count]]
    split = str(groups["constant_data"]["split"].values[0])
    figure, axes = new_figure(
        f"{title}: the most certain (rows 1-2) and the least certain (rows 3-4) {split} images\n"
        "bars: averaged predictive (green: the true class); lines: 90% of the draws; "
        "uncertainty: total / epistemic, in nats",
        2 * count,
        8.5,
        4,
        count,
        height_ratios=(1.2, 1, 1.2, 1),
    )
    classes = [str(name) for name in groups["posterior_predictive"]["class"].values]
    for position, index in enumerate(chosen):
        row, column = 2 * (position // count), position % count
        probs = inference_data.draws_of(groups, int(index))
        epistemic = float(groups["uncertainty"]["epistemic"][int(index)])
        label = int(groups["observed_data"]["y"][int(index)])
        show_image(axes[row, column], groups["constant_data"]["image"][int(index)].values)
        axes[row, column].set_title(f"#{index}: {classes[label]}\n{total[index]:.2g} / {epistemic:.2g}", fontsize=8)
        mean = groups["uncertainty"]["mean_probs"][int(index)].values
        low, high = np.quantile(probs, (0.05, 0.95), axis=1)
        bars, places = axes[row + 1, column], np.arange(len(classes))
        bars.bar(places, mean, color=["C2" if place == label else "C0" for place in places], alpha=0.6)
        bars.vlines(places, low, high, color="0.2", linewidth=1.2)
        bars.set(ylim=(0, 1.02), xticks=places)
        bars.set_xticklabels(classes, rotation=0 if max(map(len, classes)) == 1 else 90, fontsize=7)
        bars.tick_params(axis="y", labelsize=7, labelleft=column == 0)
    return figure


def snr_histograms(groups: Groups, title: str) -> Figure:
    """Distribution of the weights' signal-to-noise ratio |loc| / scale, in each layer and in the whole network."""
    layers = groups["layers"]
    names = [str(name) for name in layers["layer"].values]
    panels = [*((name, layers["snr_histogram"].sel(layer=name)) for name in names)]
    panels.append(("whole network", layers["snr_histogram"].sum("layer")))
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(
        f"Signal-to-noise ratio of the weights ({title}); the first bar holds all below; dashed: the default threshold",
        3.4 * columns,
        2.8 * rows + 0.6,
        rows,
        columns,
    )
    centres = layers["log10_snr"].values
    width = centres[1] - centres[0]
    flat = np.atleast_1d(axes).ravel()
    for axis, (name, counts) in zip(flat, panels, strict=False):
        values = counts.values
        axis.bar(
            10**centres, values / values.sum(), 10 ** (centres + width / 2) - 10 ** (centres - width / 2), color="C0"
        )
        axis.axvline(10.0, color="C3", linewidth=1, linestyle="--")
        axis.set(title=f"{name}: {int(values.sum()):,} weights", xlabel="|loc| / scale", ylabel="share")
        axis.set(xscale="log", yscale="log")
        axis.title.set_fontsize(9)
    for axis in flat[len(panels) :]:
        axis.set_axis_off()
    return figure
