"""Regression on a table: scikit-learn's diabetes data (442 patients, 10 columns), with a scale predicted for each row.

Prints the scores of the test rows beside ridge regression's RMSE, and draws predicted against observed with 90%
intervals, before and after split-conformal calibration on 80 held-out rows.

    python examples/tabular_regression.py --figure tabular_regression.png
"""

import argparse
from pathlib import Path

import pyro.distributions as dist
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import RidgeCV
from torch import nn

from ppl_bnn import MeanFieldNormal, Model, Normal, bayesian, fit, predict
from ppl_bnn.prediction.conformal import conformal_interval


def data() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Rows and targets for training, calibration and test, standardized by the training rows."""
    table = load_diabetes(scaled=False)
    x, y = torch.as_tensor(table.data).float(), torch.as_tensor(table.target).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    rows = order.split([262, 80, 100])
    of_x, of_y = ((part[rows[0]].mean(0), part[rows[0]].std(0)) for part in (x, y))
    return [(x[at] - of_x[0]) / of_x[1] for at in rows], [(y[at] - of_y[0]) / of_y[1] for at in rows]


def main(arguments: list[str] | None = None) -> None:
    """Train, predict, print the scores, draw the intervals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=400, help="training epochs (default: 400)")
    parser.add_argument("--figure", type=Path, default=None, help="where to draw the intervals (default: nowhere)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    (x, x_held, x_test), (y, y_held, y_test) = data()
    net = bayesian(nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 2)), dist.Normal(0.0, 0.3))
    model = Model(net, Normal("predicted"), num_data=len(x))
    guide = MeanFieldNormal(model, x[:1], y[:1], init_loc="he", init_scale=0.05)
    fit(model, guide, x, y, epochs=options.epochs, batch_size=66, lr=0.003, optimizer="adam", lr_schedule="cosine")
    found, held = predict(model, guide, x_test, y_test), predict(model, guide, x_held, y_held)
    scores = found.scores()
    print({name: round(scores[name], 3) for name in ("nll", "rmse", "crps", "coverage_90", "width_90")})
    ridge = torch.as_tensor(RidgeCV(alphas=(0.1, 1, 10, 100)).fit(x, y).predict(x_test))
    print(f"ridge regression: rmse {(ridge - y_test).square().mean().sqrt():.3f}")
    lower, upper = conformal_interval(*held.interval(0.9), y_held, *found.interval(0.9), level=0.9)
    inside = ((y_test >= lower) & (y_test <= upper)).double().mean()
    print(f"conformal intervals: coverage {inside:.2f}, width {(upper - lower).mean():.3f}")
    if options.figure:
        draw(y_test, found, lower, upper, options.figure)


def draw(y: torch.Tensor, found, lower: torch.Tensor, upper: torch.Tensor, path: Path) -> None:  # type: ignore[no-untyped-def]
    """Predicted against observed, with both intervals."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), sharex=True, sharey=True, layout="constrained")
    pairs = (("90% intervals", found.interval(0.9)), ("after conformal calibration", (lower, upper)))
    for axis, (title, (low, high)) in zip(axes, pairs, strict=True):
        axis.errorbar(y, found.mean, [found.mean - low, high - found.mean], fmt=".", color="#0072B2", ecolor="#56B4E9")
        axis.axline((0, 0), slope=1, color="black", linewidth=1)
        axis.set(title=title, xlabel="observed progression (standardized)")
    axes[0].set_ylabel("predicted")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
