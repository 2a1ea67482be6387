"""Steps without Pyro's messages compute what they compute with them."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppl_bnn import MeanFieldNormal, Model, bayesian
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.guides.estimators import Estimator, Uses, local
from ppl_bnn.inference.direct import DirectELBO
from ppl_bnn.inference.elbo import KLScaledELBO
from ppl_bnn.inference.objective import ThroughPyro
from ppl_bnn.models import GaussianScaleMixture
from ppl_bnn.models.likelihoods import Categorical, Normal, Poisson, StudentT
from ppl_bnn.models.random_network import point_parameters

N = 12


class Sentences(nn.Module):
    """An embedding, a recurrent layer, and a weight that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 4), nn.LSTM(4, 4, batch_first=True)
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        hidden = self.lstm(self.embed(tokens))[0][:, -1]
        return self.head(torch.tanh(hidden @ self.mix) @ self.mix)


class InParts(nn.Module):
    """A network whose first part is computed again in back-propagation."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(checkpoint(self.first, x, use_reentrant=False))


def dense():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def images():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


NETWORKS = {
    "dense": (dense, (6,), None),
    "images": (images, (1, 6, 6), None),
    "sentences": (Sentences, (5,), 20),
    "recomputed": (InParts, (6,), None),
}
PRIORS = {
    "normal": dist.Normal(0.0, 0.5),
    "shifted": {"*": dist.Normal(0.2, 0.5)},
    "by layer": lambda site, shape: dist.Normal(0.0, 0.3 if "head" in site or "4" in site else 1.0),
    "by weight": lambda site, shape: dist.Normal(torch.linspace(-1, 1, shape.numel()).view(shape), 0.7),
    "heavy": dist.StudentT(2.0, 0.0, 0.1),
    "learnt": dist.Normal(0.0, nn.Parameter(torch.tensor(0.4))),
    "mixture": GaussianScaleMixture(0.5, 1.0, 0.05),
    "laplace": dist.Laplace(0.0, 0.3),
}


def both(network, prior="normal", likelihood=None, change=lambda model, guide: None):
    """Model, guide and data, twice the same."""
    make, shape, words = NETWORKS[network]
    torch.manual_seed(0)
    x = torch.randint(words, (N, *shape)) if words else torch.randn(N, *shape)
    likelihood = likelihood or Categorical()
    y = torch.rand(N) if not isinstance(likelihood, Categorical) else torch.randint(3, (N,))
    net = make()
    if not isinstance(likelihood, Categorical):
        net = nn.Sequential(net, nn.Linear(3, 1), nn.Flatten(0))
        y = y.round() if isinstance(likelihood, Poisson) else y
    model = Model(bayesian(net, PRIORS[prior]), likelihood, 100)
    guide = MeanFieldNormal(model, x[:2], y[:2], init_scale=0.2)
    change(model, guide)
    pairs = [(model, guide), copy.deepcopy((model, guide))]
    return pairs, x, y


def gradients(model, guide):
    named = [*point_parameters(model).items(), *guide.named_parameters()]
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def compare(pairs, x, y, estimator="plain", weights=None, kl_weight=0.5):
    """Gradients and terms of both, of the same noise."""
    found = []
    for direct, (model, guide) in enumerate(pairs):
        own = ESTIMATORS[estimator]()
        if isinstance(own, Estimator):
            with torch.no_grad(), Uses() as uses:
                poutine.replay(model, trace=poutine.trace(guide).get_trace(x, y))(x, y)
            own.plain_sites = uses.plain_sites
        if direct:
            objective = DirectELBO(model, guide, 100, own if isinstance(own, Estimator) else None)
        else:
            objective = ThroughPyro(model, guide, KLScaledELBO(100), own)
        torch.manual_seed(7)
        with objective, pyro.validation_enabled(False):
            numbers = objective.completed(objective.add(x, y, kl_weight=kl_weight, weights=weights), kl_weight)
        if direct and objective.flat is not None:
            objective.flat.give_gradients()
        found.append((numbers, gradients(model, guide)))
    (expected, one), (numbers, other) = found
    assert numbers[:3] == pytest.approx(expected[:3], rel=1e-5)
    assert numbers.correct == pytest.approx(expected.correct, nan_ok=True)
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=2e-4, atol=2e-6, msg=name)
    return numbers


@pytest.fixture(autouse=True)
def same_noise_of_outputs(monkeypatch):
    # `local` has another seed for its outputs where no seeds of weights were drawn before.
    monkeypatch.setattr(local, "standard_normal", torch.ones_like)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_gives_the_same_gradients(network, estimator):
    compare(*both(network), estimator=estimator)


@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_gives_the_same_gradients(prior):
    compare(*both("images", prior))


@pytest.mark.parametrize(
    "likelihood",
    [Normal(0.3), Normal("learnt"), StudentT(4.0, "learnt"), Poisson()],
    ids=lambda one: type(one).__name__,
)
def test_every_likelihood_gives_the_same_gradients(likelihood):
    compare(*both("dense", likelihood=likelihood))


@pytest.mark.parametrize("likelihood", [Categorical(), Normal(0.3)], ids=["classes", "numbers"])
def test_weights_of_examples_give_the_same_gradients(likelihood):
    compare(*both("dense", likelihood=likelihood), weights=torch.linspace(0, 2, N))


@pytest.mark.parametrize("frozen", ["loc.0.weight", "unconstrained_scale.4.weight", "both"])
def test_frozen_parameters_stay_without_gradients(frozen):
    def freeze(model, guide):
        for name in ("loc.0.weight", "unconstrained_scale.0.weight") if frozen == "both" else (frozen,):
            guide.get_parameter(name).requires_grad_(False)

    pairs, x, y = both("images", change=freeze)
    compare(pairs, x, y)
    assert all(guide.get_parameter(frozen).grad is None for _, guide in pairs if frozen != "both")


def test_channels_last_gives_the_same_gradients():
    def change(model, guide):
        for part in (model, guide):
            part.to(memory_format=torch.channels_last)

    pairs, x, y = both("images", change=change)
    compare(pairs, x.contiguous(memory_format=torch.channels_last), y, estimator="groups")
    weight = pairs[1][1].loc.get_parameter("0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_double_precision_gives_the_same_gradients():
    pairs, x, y = both("dense", change=lambda model, guide: (model.double(), guide.double()))
    compare(pairs, x.double(), y)


def test_parameters_in_other_memory_formats_are_paired_by_their_places():
    def change(model, guide):
        loc = guide.loc.get_parameter("0.weight")
        loc.data = loc.detach().contiguous(memory_format=torch.channels_last)

    compare(*both("images", change=change))
