"""Models that the tests of fit's check at the door train, and how a refusal is asserted."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, fit

Y = torch.arange(60) % 3
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))[Y] * 3
TARGETS = X.sum(1).sin()


class Heads(nn.Module):
    """A network with a second head: reached in training mode alone, or never."""

    def __init__(self, reached):
        super().__init__()
        self.body, self.head, self.extra, self.reached = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3), reached

    def forward(self, x):
        h = self.body(x).relu()
        return self.head(h) + self.extra(h) if self.reached and self.training else self.head(h)


class Bias(nn.Module):
    """Logits that are one random vector plus a layer of point estimates."""

    def __init__(self, prior=None):
        super().__init__()
        self.net, self.prior = nn.Linear(4, 3), prior or dist.Normal(0.0, 1.0).expand([3]).to_event(1)

    def forward(self, x, y=None):
        logits = self.net(x) + pyro.sample("b", self.prior)
        with pyro.plate("data", 60, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def layers(*between, outputs=3):
    return nn.Sequential(nn.Linear(4, 8), *between, nn.ReLU(), nn.Linear(8, outputs))


def classifier(net=None, *, num_data=60, seed=0, **keywords):
    torch.manual_seed(seed)
    model = Classifier(bayesian(net or layers(), **keywords), num_data)
    return model, MeanFieldNormal(model, X[:2].to(torch.get_default_dtype()), Y[:2], init_loc="he", init_scale=0.02)


class Regression(nn.Module):
    """y ~ Normal(net(x), scale), written as its user likes: `observe` has the plate and the site."""

    def __init__(self, observe, outputs=1):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.observe = bayesian(layers(outputs=outputs)), observe

    def forward(self, x, y=None):
        return self.observe(self.net(x), x, y)


def regression(observe, y, outputs=1):
    model = Regression(observe, outputs)
    return model, MeanFieldNormal(model, X[:1], y[:1], init_scale=0.02)


def settings(**changes):
    return {"epochs": 2, "batch_size": 20, "lr": 0.01, "progress": False, **changes}


def everything(model, guide):
    """All that a refusal must leave as it was."""
    modules = [part for part in (model, guide) if isinstance(part, nn.Module)]
    tensors = [value for part in modules for value in (*part.parameters(), *part.buffers())]
    store = pyro.get_param_store()
    return {
        "values": [value.detach().clone() for value in tensors],
        "frozen": [value.requires_grad for value in tensors],
        "gradients": [value.grad is None for value in tensors],
        "modes": [module.training for part in modules for module in part.modules()],
        "store": {name: value.detach().clone() for name, value in store.items()},
        "random": torch.get_rng_state(),
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) or bool((one.isnan() == other.isnan()).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def refused(match, model, guide, x=X, y=Y, **changes):
    before, steps = everything(model, guide), []
    with pytest.raises(ValueError, match=match) as error:
        fit(model, guide, x, y, **settings(**changes), should_stop=lambda: bool(steps.append(1)))
    assert type(error.value).__name__ == "UserError"
    assert "\n" not in str(error.value)
    assert not steps
    assert same(before, everything(model, guide))


def parameters(model, guide):
    return [value.detach().clone() for part in (model, guide) for value in part.state_dict().values()]
