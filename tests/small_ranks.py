"""A small training for tests on several ranks."""

import torch
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian

X = torch.rand(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, 0] > X[:, 1]).long()


def small(net=None, seed=0, num_data=50):
    torch.manual_seed(seed)
    net = net or nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    model = Classifier(bayesian(net), num_data).double()
    return model, MeanFieldNormal(model, X[:1], Y[:1]).double()


def settings(**changes):
    return {"epochs": 3, "batch_size": 8, "lr": 0.01, "estimator": "plain", "progress": False, **changes}


def assert_same(states, tolerance=0.0):
    for other in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)
