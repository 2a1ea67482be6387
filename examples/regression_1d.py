"""1-D regression with uncertainty bands: a sine with a gap in its inputs.

The noise scale is a random variable with a prior, fitted beside the weights. The figure has the mean, the 90% interval
of new observations and the 90% band of the function alone. Between and beyond the data the bands should widen;
mean field widens them too little (docs/regression.md compares it with NUTS).

    python examples/regression_1d.py --figure regression_1d.png
"""

import argparse
from pathlib import Path

import pyro.distributions as dist
import torch
from torch import nn

from ppl_bnn import MeanFieldNormal, Model, Normal, bayesian, fit, predict


def data(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two hundred noisy values of a sine, none for x between -1 and 1."""
    x = torch.cat([torch.linspace(-3, -1, 100), torch.linspace(1, 3, 100)]).unsqueeze(1)
    return x, (1.5 * x).sin().squeeze(1) + 0.1 * torch.randn(200, generator=generator)


def main(arguments: list[str] | None = None) -> None:
    """Train, predict, print the scores, draw the bands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6000, help="training steps, one batch each (default: 6000)")
    parser.add_argument("--figure", type=Path, default=None, help="where to draw the bands (default: nowhere)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    x, y = data(torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    net = bayesian(net, dist.Normal(0.0, 1.0), bayesian_bias=True)
    model = Model(net, Normal(dist.LogNormal(-2.0, 1.0)), num_data=len(x))
    guide = MeanFieldNormal(model, x[:1], y[:1], init_loc=0.5, init_scale=0.05)
    fit(
        model, guide, x, y, epochs=options.epochs, batch_size=200, lr=0.02, optimizer="adam", lr_schedule="cosine",
        num_particles=2,
    )  # fmt: skip
    at = torch.linspace(-4, 4, 161).unsqueeze(1)
    found = predict(model, guide, at, num_samples=1000)
    scores = predict(model, guide, x, y, num_samples=1000).scores()
    print({name: round(scores[name], 4) for name in ("nll", "rmse", "crps", "coverage_90")})
    noise = torch.stack([guide.draw_latents(index)["noise_scale"] for index in range(1000)])
    print(f"noise scale {noise.mean():.3f} ± {noise.std():.3f} (true: 0.1)")
    if options.figure:
        draw(x, y, at, found, options.figure)


def draw(x: torch.Tensor, y: torch.Tensor, at: torch.Tensor, found, path: Path) -> None:  # type: ignore[no-untyped-def]
    """Data, mean and both bands."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    line = at[:, 0]
    axis.fill_between(line, *found.interval(0.9), color="#56B4E9", alpha=0.35, label="90% of new observations")
    axis.fill_between(line, *found.interval(0.9, of="mean"), color="#0072B2", alpha=0.45, label="90% of the function")
    axis.plot(line, found.mean, color="#0072B2", label="mean")
    axis.plot(x[:, 0], y, "k.", label="data")
    axis.set(xlabel="x", ylabel="y", ylim=(-4, 4))
    axis.legend(loc="upper center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
