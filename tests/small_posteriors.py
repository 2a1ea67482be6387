"""Small networks with their guides, and their draws by Pyro."""

import torch
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian

X = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(1))


def dense(scale=0.5, *, bayesian_bias=False):
    torch.manual_seed(0)
    net = bayesian(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), bayesian_bias=bayesian_bias)
    return net, MeanFieldNormal(Classifier(net, 30), X[:1], Y[:1], init_loc=1.0, init_scale=scale)


def convolutional():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )
    net = bayesian(nn.Sequential(*layers)).eval()
    net[1].running_var.uniform_(0.5, 2)
    net[1].weight.data[0] = -0.7
    x = torch.randn(6, 1, 6, 6)
    return net, MeanFieldNormal(Classifier(net, 6), x[:1], Y[:1], init_loc="he", init_scale=0.2), x


def by_pyro(net, guide, x, num_samples, seed=0):
    """The guide's draws by Pyro's handlers."""
    from pyro import poutine

    for index in range(num_samples):
        with torch.no_grad(), poutine.condition(data=guide.draw(index, seed=seed)):
            logits = net(x)
        # Not from inside: the handler would be at work while others run.
        yield logits


class Residual(nn.Module):
    """A deterministic layer first, then a random one, then what the deterministic layer gave once more."""

    def __init__(self):
        super().__init__()
        self.fixed, self.first, self.last = nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.fixed(x)
        return self.last(torch.relu(self.first(h)) + h)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() < 1e9 else x


def residual():
    torch.manual_seed(0)
    net = bayesian(Residual()).eval()
    return net, MeanFieldNormal(Classifier(net, 30), X[:1], Y[:1], init_scale=0.5), X
