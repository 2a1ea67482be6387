"""Counts: how many bicycles are hired an hour? A negative binomial likelihood against a Poisson one.

The counts are made by a known process with a daily rhythm and more variance than a Poisson distribution has. The
Poisson network is overconfident; the negative binomial one learns the overdispersion. The figure has both predictive
intervals and both calibrations.

    python examples/counts.py --figure counts.png
"""

import argparse
from pathlib import Path

import pyro.distributions as dist
import torch
from torch import nn

from ppl_bnn import MeanFieldNormal, Model, NegativeBinomial, Poisson, bayesian, fit, predict
from ppl_bnn.number_metrics import LEVELS, observed_shares


def data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hours of the day [count, 1] and the bicycles hired [count]."""
    generator = torch.Generator().manual_seed(seed)
    hour = 24 * torch.rand(count, 1, generator=generator)
    rate = (2.5 + 1.2 * (2 * torch.pi * (hour[:, 0] - 9) / 24).cos() + 0.5 * (4 * torch.pi * hour[:, 0] / 24).sin()).exp()
    rate = rate * (0.4 * torch.randn(count, generator=generator)).exp()
    return hour, torch.poisson(rate, generator=generator)


def features(hour: torch.Tensor) -> torch.Tensor:
    """The time on the clock's circle, [N, 2]."""
    return torch.cat([(torch.pi * hour / 12).sin(), (torch.pi * hour / 12).cos()], 1)


def main(arguments: list[str] | None = None) -> None:
    """Train both, print their scores, draw intervals and calibration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=300, help="training epochs (default: 300)")
    parser.add_argument("--figure", type=Path, default=None, help="where to draw (default: nowhere)")
    options = parser.parse_args(arguments)
    (hour, y), (hour_test, y_test) = data(500, 0), data(500, 1)
    x, found = features(hour), {}
    for likelihood in (Poisson(), NegativeBinomial()):
        torch.manual_seed(0)
        net = bayesian(nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1)), dist.Normal(0.0, 1.0))
        model = Model(net, likelihood, num_data=len(x))
        guide = MeanFieldNormal(model, x[:1], y[:1], init_loc="he", init_scale=0.05)
        fit(model, guide, x, y, epochs=options.epochs, batch_size=100, lr=0.01, optimizer="adam", lr_schedule="cosine")
        name = type(likelihood).__name__
        found[name] = predict(model, guide, features(hour_test), y_test, num_samples=1000)
        scores = found[name].scores()
        print(name, {key: round(scores[key], 3) for key in ("nll", "rmse", "crps", "coverage_90", "quantile_error")})
    if options.figure:
        draw(hour_test, y_test, found, options.figure)


def draw(hour: torch.Tensor, y: torch.Tensor, found: dict, path: Path) -> None:
    """Intervals against the hour for each likelihood, and how often y lies below each quantile."""
    import matplotlib.pyplot as plt

    order = hour[:, 0].argsort()
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.3), layout="constrained")
    for axis, (name, one) in zip(axes, found.items(), strict=False):
        low, high = (part[order] for part in one.interval(0.9))
        axis.fill_between(hour[order, 0], low, high, color="#56B4E9", alpha=0.5, label="90% interval")
        axis.plot(hour[order, 0], one.mean[order], color="#0072B2", label="mean")
        axis.plot(hour[:, 0], y, "k.", markersize=2, label="test data")
        axis.set(title=name, xlabel="hour", ylabel="bicycles an hour")
        axes[2].plot(LEVELS, observed_shares(*one.pit), label=name)
    axes[0].legend(fontsize="small")
    axes[2].axline((0, 0), slope=1, color="black", linewidth=1)
    axes[2].set(title="calibration", xlabel="predicted quantile", ylabel="share of test data below")
    axes[2].legend(fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
