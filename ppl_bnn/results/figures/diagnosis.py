"""The figure of `inference.diagnosis`: each layer's scale, KL, signal-to-noise ratio and share of idle weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ppl_bnn.inference.diagnosis import LayerPosterior, verdict
from ppl_bnn.results.figures.layout import logarithmic_axis, save


def draw_posterior(layers: Sequence[LayerPosterior], title: str, path: Path) -> None:
    """Draw four panels with a row for each layer, the first layer on top, and write them as PNG."""
    names, rows = [layer.site for layer in layers], np.arange(len(layers))[::-1]
    figure = Figure(figsize=(14, 1.9 + 0.3 * len(layers)), layout="constrained")
    figure.suptitle(f"{title}\n{_wrapped(verdict(layers))}", fontsize=9)
    axes = figure.subplots(1, 4, sharey=True)
    for axis, now, before, label in (
        (axes[0], "scale", "initial_scale", "scale (geometric mean)"),
        (axes[1], "kl", "initial_kl", "KL (nats a weight)"),
    ):
        start, end = (np.array([getattr(layer, name) for layer in layers]) for name in (before, now))
        axis.hlines(rows, start, end, color="0.75", linewidth=2)
        axis.plot(start, rows, "o", color="C0", markerfacecolor="white", label="at the start")
        axis.plot(end, rows, "o", color="C0", label="now")
        logarithmic_axis(axis, label)
        least, most = min(start.min(), end.min()), max(start.max(), end.max())
        # At least a factor of four, so that what has hardly moved looks it.
        axis.set_xlim(least / 1.3, max(1.3 * most, 4 * least))
    low, middle, high = np.array([layer.snr for layer in layers]).clip(1e-4).T
    axes[2].hlines(rows, low, high, color="C1", linewidth=4, alpha=0.5, label="5% to 95%")
    axes[2].plot(middle, rows, "o", color="C1", label="median")
    logarithmic_axis(axes[2], "signal-to-noise ratio |loc| / scale")
    for offset, name, label, colour in (
        (0.2, "at_prior", "at the prior", "C2"),
        (-0.2, "nearly_deterministic", "nearly deterministic", "C3"),
    ):
        axes[3].barh(rows + offset, [100 * getattr(layer, name) for layer in layers], 0.38, color=colour, label=label)
    axes[3].set(xlim=(0, 100), xlabel="share of the weights (%)")
    axes[0].set_yticks(rows, names)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2)
    save(figure, path)


def _wrapped(text: str) -> str:
    return text.replace(". ", ".\n")
