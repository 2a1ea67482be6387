"""Examples for networks that tests make Bayesian, their sites, and a short training of them."""

import torch
from pyro import poutine

from ppl_bnn import Classifier, MeanFieldNormal, fit

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def sites(net, x=X):
    return poutine.trace(net).get_trace(x).stochastic_nodes


def trained(net, x=X, **settings):
    model = Classifier(net, len(x))
    guide = MeanFieldNormal(model, x[:1], Y[:1])
    fit(model, guide, x, Y, epochs=2, batch_size=6, lr=1e-2, progress=False, **settings)
    return guide
