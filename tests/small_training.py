"""A training of a small network on 50 examples, and what it leaves."""

import torch
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian
from ppl_bnn.models.random_network import point_state

X = torch.rand(50, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > X[:, 1]).long()


def small(deterministic=False, seed=0, prior=None):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    model = Classifier(net if deterministic else bayesian(net, prior), len(X))
    return model, MeanFieldNormal(model, X[:1], Y[:1])


def settings(**changes):
    return {"epochs": 4, "batch_size": 8, "lr": 0.01, "estimator": "flipout", "progress": False, **changes}


def state(model, guide):
    parts = {**{f"m.{k}": v for k, v in point_state(model).items()}, **guide.state_dict()}
    return {name: value.clone() for name, value in parts.items()}


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def timeless(history):
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in history]
