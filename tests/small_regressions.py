"""Small fitted models of numbers, counts and labels of yes or no, with the data they were fitted to."""

import pyro.distributions as dist
import torch
from torch import nn

from ppl_bnn import MeanFieldNormal, Model, bayesian, fit
from ppl_bnn.models.likelihoods import Likelihood, Normal


class Counts(Likelihood):
    """y ~ Poisson(exp(outputs))."""

    def distribution(self, outputs):
        return dist.Poisson(outputs.squeeze(1).exp())


class YesNo(Likelihood):
    """y ~ Bernoulli(logits=outputs), a label for each column; the mean tells everything."""

    drawn = False
    units = "nats"

    def distribution(self, outputs):
        return dist.Bernoulli(logits=outputs).to_event(1)

    def decompose(self, averages):
        total = sum(torch.special.entr(p) for p in (averages["mean"], 1 - averages["mean"]))
        return total, total, torch.zeros_like(total)

    def scores(self, found):
        return {"nll": found.nll}


def regression(kind="numbers", *, count=60, columns=1, seed=0, epochs=40, dtype=torch.float32):
    """(model, posterior, x [N, columns], y): a sine of the first column with noise, or counts, or two labels of it."""
    torch.manual_seed(seed)
    x = torch.rand(count, columns, dtype=dtype) * 4 - 2
    wave = x[:, 0].sin()
    outputs, likelihood, y = {
        "numbers": lambda: (1, Normal(0.3), wave + 0.3 * torch.randn(count, dtype=dtype)),
        "pairs": lambda: (2, Normal(0.3), torch.stack([wave, -wave], 1) + 0.3 * torch.randn(count, 2, dtype=dtype)),
        "counts": lambda: (1, Counts(), torch.poisson((wave + 1).exp())),
        "labels": lambda: (2, YesNo(), torch.stack([wave > 0, wave < 0.5], 1).to(dtype)),
    }[kind]()
    net = bayesian(nn.Sequential(nn.Linear(columns, 8), nn.ReLU(), nn.Linear(8, outputs)).to(dtype))
    model = Model(net, likelihood, count)
    guide = MeanFieldNormal(model, x[:1], y[:1], init_loc="he", init_scale=0.05)
    fit(model, guide, x, y, epochs=epochs, lr=2e-2, progress=False)
    return model, guide, x, y
