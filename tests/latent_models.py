"""Models with latents of every kind of support, local latents, and small data for them."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from ppl_bnn import bayesian

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
Y = X.sum(1) + 0.3 * torch.randn(40, generator=torch.Generator().manual_seed(1))
WEIGHTS = {"0.weight": torch.Size((6, 2)), "2.weight": torch.Size((1, 6))}
LATENTS = {
    "sigma": dist.Gamma(3.0, 6.0),
    "gain": dist.Normal(1.0, 0.1),
    "mixing": dist.Dirichlet(torch.ones(3)),
    "0.weight.share": dist.Beta(2.0, 2.0).expand([3]).to_event(1),
    "level": dist.HalfCauchy(1.0).expand([2]),
    "level.shift": dist.Uniform(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0])),
}


class Regression(nn.Module):
    """A Bayesian network whose outputs, and their noise, depend on latents; two of them lie in a plate."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = bayesian(nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)))

    def forward(self, x, y=None):
        draw = {site: pyro.sample(site, LATENTS[site]) for site in ("sigma", "gain", "mixing", "0.weight.share")}
        with pyro.plate("levels", 2, dim=-1):
            draw |= {site: pyro.sample(site, LATENTS[site]) for site in ("level", "level.shift")}
        offset = draw["mixing"][..., 0] - draw["0.weight.share"][..., 1] + draw["level.shift"][..., :1]
        mean = self.net(x).squeeze(-1) * draw["gain"] + 0.1 * offset * draw["level"][..., 1:]
        with pyro.plate("data", 40, subsample=x):
            return pyro.sample("y", dist.Normal(mean, draw["sigma"]), obs=y)


class Noise(nn.Module):
    """A Bayesian network and a noise scale, no plate but the data's."""

    def __init__(self, prior=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = bayesian(nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)))
        self.prior = LATENTS["sigma"] if prior is None else prior

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", self.prior)
        mean = self.net(x).squeeze(-1)
        with pyro.plate("data", 40, subsample=x):
            return pyro.sample("y", dist.Normal(mean, sigma), obs=y)


class AutoEncoder(nn.Module):
    """A VAE whose decoder has random weights: y_i ~ Normal(net(z_i), sigma), z_i ~ Normal(0, 1)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = bayesian(nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 2)))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
        data = pyro.plate("data", 40, subsample=x)
        with data:
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        # Outside the plate: inside, each example would have weights of its own.
        mean = self.net(z)
        with data:
            return pyro.sample("y", dist.Normal(mean, sigma).to_event(1), obs=y)
