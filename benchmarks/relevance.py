"""Compares priors by whether they find the relevant inputs of a linear regression under mean field.

Twenty inputs, of which three matter, 100 rows, noise of 1. The table has the root mean square error of the weights'
posterior means for each seed and, for the first seed, the prior's scale of the least relevant input and the largest of
the others.

    python benchmarks/relevance.py
"""

import argparse

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_bnn import MeanFieldNormal, Model, Normal, ard, bayesian, fit, horseshoe, learnt_normal
from ppl_bnn.guides import median_latents
from ppl_bnn.models import site_priors

PRIORS = {
    "normal(0, 1)": dist.Normal(0.0, 1.0),
    "ard()": ard(),
    "horseshoe(0.05)": horseshoe(0.05),
    "regularized_horseshoe(0.05, 2)": horseshoe(0.05, slab=2.0),
    'learnt_normal(0.5, per="input")': learnt_normal(0.5, per="input"),
}
WEIGHTS = torch.tensor([2.0, -1.5, 1.0] + 17 * [0.0])


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs [100, 20] and targets [100]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(100, 20, generator=generator)
    return x, x @ WEIGHTS + torch.randn(100, generator=generator)


def found(name: str, seed: int, epochs: int) -> tuple[float, Tensor]:
    """The error of the weights' means, and the prior's scale of each input, [20]."""
    x, y = data(seed)
    torch.manual_seed(seed)
    model = Model(bayesian(nn.Sequential(nn.Linear(20, 1, bias=False)), PRIORS[name]), Normal(1.0), len(x))
    guide = MeanFieldNormal(model, x[:1], y[:1])
    fit(
        model, guide, x, y, epochs=epochs, batch_size=100, lr=0.02, optimizer="adam", lr_schedule="cosine",
        estimator="local", seed=seed, progress=False,
    )  # fmt: skip
    loc = guide.loc_scale("0.weight")[0].detach()[0]
    prior = site_priors(model, x[:1], y[:1], given=median_latents(model, guide, x[:1], y[:1]))["0.weight"]
    return float((loc - WEIGHTS).square().mean().sqrt()), prior.stddev.detach().expand(1, 20)[0]


def main(arguments: list[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1500, help="training steps, one batch each (default: 1500)")
    parser.add_argument("--seeds", type=int, default=3, help="number of data sets (default: 3)")
    options = parser.parse_args(arguments)
    print(
        "| prior | error of the weights' means | scale, least relevant | largest of the others |\n" + "| --- " * 4 + "|"
    )
    for name in PRIORS:
        errors, scales = zip(*(found(name, seed, options.epochs) for seed in range(options.seeds)), strict=True)
        relevant, others = scales[0][:3].min(), scales[0][3:].max()
        print(f"| `{name}` | {', '.join(f'{error:.3f}' for error in errors)} | {relevant:.2f} | {others:.2f} |")


if __name__ == "__main__":
    main()
