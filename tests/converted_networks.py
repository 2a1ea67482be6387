"""Networks that the tests of conversion make Bayesian, and a short training of them."""

import torch
from pyro import poutine
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppl_bnn import Classifier, MeanFieldNormal, fit

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def sites(net, x=X):
    return poutine.trace(net).get_trace(x).stochastic_nodes


def trained(net, x=X, **settings):
    model = Classifier(net, len(x))
    guide = MeanFieldNormal(model, x[:1], Y[:1])
    fit(model, guide, x, Y, epochs=2, batch_size=6, lr=1e-2, progress=False, **settings)
    return guide


class Listed(nn.Module):
    """Layers that the forward pass reaches through a Python list and a dict."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.first, self.rest = [self.a], {"head": self.b}

    def forward(self, x):
        return self.rest["head"](self.first[0](x).relu())


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(input=self.norm(input=self.a(input=x)).relu())


class Recomputed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 3), reentrant

    def forward(self, x):
        return checkpoint(self.b, self.a(x).relu(), use_reentrant=self.reentrant)
