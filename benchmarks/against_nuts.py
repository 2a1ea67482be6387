"""Compares the mean-field posterior's predictive with that of a long NUTS run of the same model.

Two problems: a sine with a gap in its inputs (a network 1-16-1 with tanh, every weight and bias random, known noise of
0.1), and logistic regression of two overlapping classes in the plane. The table has, for regions of inputs, the root
mean square difference of the predictive's means (NUTS minus mean field) and both standard deviations of the function
(of the class probability for the second problem), averaged over the region.

    python benchmarks/against_nuts.py                  # about 25 minutes on one core
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor, nn

from ppl_bnn import Bernoulli, MeanFieldNormal, Model, Normal, bayesian, fit, predict
from ppl_bnn.guides import StoredPosterior


def sine() -> tuple[Model, Tensor, Tensor, dict[str, Tensor]]:
    """Forty numbers on both sides of a gap, and inputs by region."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.linspace(-3, -1, 20), torch.linspace(1, 3, 20)]).unsqueeze(1)
    y = (1.5 * x).sin().squeeze(1) + 0.1 * torch.randn(40, generator=generator)
    net = bayesian(
        nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)), dist.Normal(0.0, 1.0), bayesian_bias=True
    )
    regions = {
        "data": torch.cat([torch.linspace(-3, -1, 21), torch.linspace(1, 3, 21)]),
        "gap": torch.linspace(-0.8, 0.8, 17),
        "outside": torch.cat([torch.linspace(-5, -3.5, 16), torch.linspace(3.5, 5, 16)]),
    }
    return Model(net, Normal(0.1), 40), x, y, {name: at.unsqueeze(1) for name, at in regions.items()}


def classes() -> tuple[Model, Tensor, Tensor, dict[str, Tensor]]:
    """Logistic regression of 60 points of two classes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    x = torch.randn(60, 2, generator=generator) + torch.where(y == 1, 0.8, -0.8).unsqueeze(1)
    net = bayesian(nn.Sequential(nn.Linear(2, 1, bias=False)), dist.Normal(0.0, 2.0))
    far = torch.tensor([[4.0, 4.0], [-4.0, -4.0], [4.0, -4.0], [-4.0, 4.0]])
    return Model(net, Bernoulli(), 60), x, y.float(), {"data": x, "outside": far}


def by_nuts(model: Model, x: Tensor, y: Tensor, samples: int, warmup: int, seed: int) -> StoredPosterior:
    """Samples of two chains."""
    draws = []
    for chain in range(2):
        pyro.set_rng_seed(seed + chain)
        kernel = NUTS(model, target_accept_prob=0.9, max_tree_depth=8)
        mcmc = MCMC(kernel, num_samples=samples, warmup_steps=warmup, disable_progbar=True)
        mcmc.run(x, y)
        draws.append(mcmc.get_samples())
    joined = {site: torch.cat([chain[site] for chain in draws]) for site in draws[0]}
    return StoredPosterior(joined, num_chains=2)


def by_mean_field(model: Model, x: Tensor, y: Tensor, epochs: int) -> MeanFieldNormal:
    """The guide after full-batch training, its learning rate decaying to 0."""
    guide = MeanFieldNormal(model, x[:1], y[:1], init_loc=0.5, init_scale=0.05)
    fit(
        model, guide, x, y, epochs=epochs, batch_size=len(x), lr=0.01, optimizer="adam", lr_schedule="cosine",
        num_particles=4, progress=False,
    )  # fmt: skip
    return guide


def spread(found: object) -> Tensor:
    """Standard deviation of E[y | draw] over draws, [N, ...]."""
    return found.averages["spread"].sqrt()  # type: ignore[attr-defined]


def main(arguments: list[str] | None = None) -> None:
    """Print a table; draw the sine's bands with --figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="NUTS samples of each of two chains (default: 2000)")
    parser.add_argument("--warmup", type=int, default=1000, help="NUTS warm-up steps (default: 1000)")
    parser.add_argument("--epochs", type=int, default=20_000, help="steps of the mean-field training (default: 20000)")
    parser.add_argument("--figure", type=Path, default=None, help="where to draw the bands of the sine")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print("| problem | region | RMS difference of means | std, NUTS | std, mean field | seconds, NUTS | mean field |")
    print("| --- " * 7 + "|")
    problems: dict[str, Callable] = {"sine with a gap": sine, "logistic regression": classes}
    for name, problem in problems.items():
        model, x, y, regions = problem()
        started = time.perf_counter()
        exact = by_nuts(model, x, y, options.samples, options.warmup, seed=1)
        middle = time.perf_counter()
        guide = by_mean_field(model, x, y, options.epochs)
        seconds = middle - started, time.perf_counter() - middle
        for region, inputs in regions.items():
            nuts = predict(model, exact, inputs, num_samples=2 * options.samples, method="draws", progress=False)
            ours = predict(model, guide, inputs, num_samples=4000, method="draws", progress=False)
            difference = (nuts.mean - ours.mean).square().mean().sqrt()
            print(
                f"| {name} | {region} | {difference:.3f} | {spread(nuts).mean():.3f} | {spread(ours).mean():.3f} "
                f"| {seconds[0]:.0f} | {seconds[1]:.0f} |"
            )
        found = predict(model, exact, x, num_samples=2 * options.samples, method="draws", progress=False)
        parts = found.means.unflatten(0, (2, -1)).mean(1)
        print(f"{name}: the two chains' means of the function differ by {float((parts[0] - parts[1]).abs().max()):.3f}")
        if options.figure and name.startswith("sine"):
            draw(model, exact, guide, x, y, options.figure)


def draw(model: Model, exact: StoredPosterior, guide: MeanFieldNormal, x: Tensor, y: Tensor, path: Path) -> None:
    """Both posteriors' functions: mean and two standard deviations."""
    import matplotlib.pyplot as plt

    at = torch.linspace(-5, 5, 201).unsqueeze(1)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, (title, posterior, draws) in zip(
        axes, (("NUTS", exact, exact.num_draws), ("mean field", guide, 4000)), strict=True
    ):
        found = predict(model, posterior, at, num_samples=draws, method="draws", progress=False)
        mean, std = found.mean, spread(found)
        axis.fill_between(
            at[:, 0], mean - 2 * std, mean + 2 * std, color="#0072B2", alpha=0.25, label="±2 standard deviations"
        )
        axis.plot(at[:, 0], mean, color="#0072B2", label="mean of the function")
        axis.plot(x[:, 0], y, ".", color="black", label="data")
        axis.set(title=title, xlabel="x", ylim=(-4, 4))
    axes[0].set_ylabel("y")
    axes[0].legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
