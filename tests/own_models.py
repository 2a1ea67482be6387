"""Pyro models of a user's own around `bayesian(net)`: what they say about y, and one run of them."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn
from weight_clouds import Cloud

from ppl_bnn import bayesian

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
CLOUD = Cloud({"weight": torch.Size((6, 4))})


def covariance(out):
    factor = out[:, 2:6].unflatten(1, (2, 2))
    return factor @ factor.mT + torch.eye(2)


def factor(out):
    scales = torch.diag_embed(out[:, 2:4].exp())
    return scales + torch.diag_embed(out[:, 4:5], offset=-1)


# What a model says about y, given the network's outputs [n, 6].
FAMILIES = {
    "Normal": lambda out: dist.Normal(out[:, 0], out[:, 1].exp()),
    "one scale for all": lambda out: dist.Normal(out[:, 0], 0.5),
    "a vector": lambda out: dist.Normal(out[:, :3], out[:, 3:].exp()).to_event(1),
    "a matrix": lambda out: dist.Laplace(out.unflatten(1, (2, 3)), 1.0).to_event(2),
    "expanded": lambda out: dist.Normal(0.0, 1.0).expand([len(out)]),
    "masked": lambda out: dist.Normal(out[:, 0], 1.0).mask(out[:, 1] > 0),
    "StudentT": lambda out: dist.StudentT(5.0, out[:, 0], out[:, 1].exp()),
    "Gamma": lambda out: dist.Gamma(out[:, 0].exp(), out[:, 1].exp()),
    "Beta": lambda out: dist.Beta(out[:, 0].exp(), out[:, 1].exp()),
    "LogNormal": lambda out: dist.LogNormal(out[:, 0], 0.3),
    "VonMises": lambda out: dist.VonMises(out[:, 0], out[:, 1].exp()),
    "Poisson": lambda out: dist.Poisson(out[:, 0].exp()),
    "Binomial of logits": lambda out: dist.Binomial(10, logits=out[:, 0]),
    "Binomial of probs": lambda out: dist.Binomial(10, out[:, 0].sigmoid()),
    "BetaBinomial": lambda out: dist.BetaBinomial(out[:, 0].exp(), out[:, 1].exp(), total_count=7),
    "NegativeBinomial": lambda out: dist.NegativeBinomial(3.0, logits=out[:, 0]),
    "zero-inflated": lambda out: dist.ZeroInflatedPoisson(out[:, 0].exp(), gate_logits=out[:, 1]),
    "zero-inflated by probs": lambda out: dist.ZeroInflatedPoisson(out[:, 0].exp(), gate=out[:, 1].sigmoid()),
    "Multinomial": lambda out: dist.Multinomial(5, logits=out[:, :3]),
    "Dirichlet": lambda out: dist.Dirichlet(out[:, :3].exp()),
    "MultivariateNormal by scale_tril": lambda out: dist.MultivariateNormal(out[:, :2], scale_tril=factor(out)),
    "MultivariateNormal by covariance": lambda out: dist.MultivariateNormal(out[:, :2], covariance(out)),
    "a mixture density network": lambda out: dist.MixtureSameFamily(
        dist.Categorical(logits=out[:, :2]), dist.Normal(out[:, 2:4], out[:, 4:].exp())
    ),
    "a mixture of vectors": lambda out: dist.MixtureSameFamily(
        dist.Categorical(probs=out[:, 4:].softmax(1)), dist.Normal(out[:, :4].unflatten(1, (2, 2)), 1.0).to_event(1)
    ),
    "a mixture of multivariate normals": lambda out: dist.MixtureSameFamily(
        dist.Categorical(logits=out[:, 4:]), dist.MultivariateNormal(out[:, :4].unflatten(1, (2, 2)), torch.eye(2))
    ),
    "Bernoulli": lambda out: dist.Bernoulli(logits=out[:, 0]),
    "Bernoulli of probs": lambda out: dist.Bernoulli(out[:, 0].sigmoid()),
    "several Bernoulli": lambda out: dist.Bernoulli(logits=out[:, :3]).to_event(1),
    "one Bernoulli in a vector": lambda out: dist.Bernoulli(logits=out[:, :1]).to_event(1),
    "Categorical": lambda out: dist.Categorical(logits=out),
    "Categorical of probs": lambda out: dist.Categorical(out.softmax(1)),
    "tokens": lambda out: dist.Categorical(logits=out.unflatten(1, (2, 3))).to_event(1),
}


def own_model(family, count=30):
    torch.manual_seed(0)
    net = bayesian(nn.Linear(4, 6))

    def model(x, y=None):
        fn = family(net(x))
        with pyro.plate("data", count, subsample=x):
            pyro.sample("y", fn, obs=y)

    return model


def site_by_pyro(model, draw, *args, site="y"):
    with torch.no_grad(), poutine.trace() as recorded, poutine.condition(data=dict(draw)):
        model(*args)
    return recorded.trace.nodes[site]


def drawn(model, seed=9):
    """Observed values: one sample of the model itself."""
    torch.manual_seed(seed)
    return site_by_pyro(model, CLOUD.draw(99), X)["value"]
