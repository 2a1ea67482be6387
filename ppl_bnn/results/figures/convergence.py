"""The figure of the predictive's Monte Carlo error."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ppl_bnn.results.figures.layout import save


def draw_convergence(rows: Sequence[Mapping[str, float]], title: str, path: Path, *, word: str = "images") -> None:
    """Draw the error against the number of draws, and NLL with its Monte Carlo error, from `convergence`'s rows.

    Args:
        word: for the examples.

    Raises:
        OSError: the figure cannot be written.
    """
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    draws = columns["draws"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"Monte Carlo error on {title}")
    left, right = figure.subplots(1, 2)
    left.plot(draws, columns["error"], "o-", label="measured: groups of draws")
    left.plot(draws, columns["standard_error"], "--", label="standard error of one group")
    left.plot(draws, columns["worst"], ":", label=f"its largest over {word}")
    left.set(xscale="log", yscale="log", xlabel="draws", ylabel="error of the top class's mean probability")
    left.legend(frameon=False)
    right.errorbar(draws, columns["nll"], yerr=2 * np.nan_to_num(columns["nll_error"]), fmt="o-", capsize=3)
    right.set(xscale="log", xlabel="draws", ylabel="NLL, nats per datum\n(bars: 2 standard deviations)")
    save(figure, path)
