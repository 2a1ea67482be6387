"""A variational autoencoder whose decoder's weights are random: local latents in a plate beside global ones.

The data are scikit-learn's 1,797 digits of 8x8 pixels. The guide computes each example's z from its pixels and has a
mean-field Normal over the weights. The figure has test digits, their reconstructions, and where the draws disagree.

    python examples/vae.py --figure vae.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ppl_bnn import MeanFieldNormal, bayesian, fit, predict

LATENTS = 8


class Decoder(nn.Module):
    """p(x, z, w): pixels are 0 or 1."""

    def __init__(self, num_data: int) -> None:
        super().__init__()
        self.num_data = num_data
        self.net = bayesian(nn.Sequential(nn.Linear(LATENTS, 64), nn.ReLU(), nn.Linear(64, 64)), dist.Normal(0.0, 1.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", self.num_data, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENTS]).to_event(1))
        logits = self.net(z)
        with pyro.plate("pixels", self.num_data, subsample=x):
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=y)


class Guide(nn.Module):
    """q(z | x) q(w): an encoder, and a mean-field Normal."""

    def __init__(self, model: Decoder, x: Tensor) -> None:
        super().__init__()
        self.num_data = model.num_data
        self.weights = MeanFieldNormal(model, x[:1], x[:1], init_loc="he", init_scale=0.02)
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2 * LATENTS))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        self.weights(x, y)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", self.num_data, subsample=x):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def main(arguments: list[str] | None = None) -> None:
    """Train, reconstruct test digits, draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--figure", type=Path, help="where to draw the digits (default: nowhere)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    x, x_test, _ = (torch.as_tensor(load_digits().data) > 7).float().split([1500, 10, 287])
    guide = Guide(model := Decoder(len(x)), x)
    fit(model, guide, x, x, epochs=options.epochs, batch_size=100, lr=0.003, optimizer="adam")
    found = predict(model, guide, x_test, x_test, num_samples=200)
    print(f"test digits, given q(z | x): {found.nll:.2f} nats each")
    if options.figure:
        rows = {"digits": x_test, "mean": found.mean, "disagreement": found.averages["spread"].sqrt()}
        figure, axes = plt.subplots(3, 10, figsize=(9, 3), layout="constrained")
        for line, (name, images) in zip(axes, rows.items(), strict=True):
            for axis, image in zip(line, images, strict=True):
                axis.imshow(image.reshape(8, 8).numpy(), cmap="gray_r")
                axis.set(xticks=[], yticks=[], ylabel=name if axis is line[0] else "")
        figure.savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
