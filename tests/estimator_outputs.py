"""Outputs of a layer under an estimator, for tests of their moments."""

import torch
from pyro import poutine
from torch import nn

from ppl_bnn import MeanFieldNormal, bayesian
from ppl_bnn.guides import ESTIMATORS


def layer_and_guide(layer, x, *, scale=0.3):
    net = bayesian(nn.Sequential(layer)).double()
    guide = MeanFieldNormal(net, x, init_loc=0.5, init_scale=scale, init_jitter=0.5)
    return net, guide


def outputs(net, guide, x, estimator, draws):
    """One training-style forward pass a draw: the guide is sampled and the network replays it."""
    found = []
    with torch.no_grad():
        for _ in range(draws):
            with ESTIMATORS[estimator]():
                trace = poutine.trace(guide).get_trace(x)
                found.append(poutine.replay(net, trace=trace)(x))
    return torch.stack(found)


LINEAR = (nn.Linear(5, 4), torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double())
CONV = (
    nn.Conv2d(2, 3, 3, padding=1),
    torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(2)).double(),
)
GROUPED = (
    nn.Conv2d(4, 6, 3, padding=1, groups=2),
    torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(3)).double(),
)
