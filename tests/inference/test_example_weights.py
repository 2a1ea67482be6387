"""Example weights multiply log likelihoods: by closed form, through shuffling, ranks and resuming."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from ranks import Ranks
from small_ranks import assert_same
from small_training import state
from torch import nn

from ppl_bnn import Categorical, Classifier, MeanFieldNormal, Model, Normal, bayesian, fit
from ppl_bnn.data import TensorExamples
from ppl_bnn.errors import Interrupted, UserError
from ppl_bnn.inference import data_parallel
from ppl_bnn.inference.elbo import KLScaledELBO
from ppl_bnn.inference.example_weights import ExampleWeights

X = torch.randn(13, 4, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(13) % 3
WEIGHTS = torch.rand(13, generator=torch.Generator().manual_seed(1)) * 2
SETTINGS = {"epochs": 3, "batch_size": 4, "lr": 1e-2, "estimator": "plain", "progress": False}


def small(seed=0, count=13):
    torch.manual_seed(seed)
    model = Classifier(bayesian(nn.Linear(4, 3)), count).double()
    return model, MeanFieldNormal(model, X[:2], Y[:2]).double()


def trained(weights=WEIGHTS, x=X, y=Y, **changes):
    model, guide = small(count=len(x))
    history = fit(model, guide, x, y, weights=weights, **{**SETTINGS, **changes})
    return state(model, guide), history


@pytest.mark.parametrize("likelihood", [Categorical(), Categorical(class_weights=[1.0, 2.0, 3.0])])
def test_the_loss_is_the_weighted_sum_divided_by_the_number_of_examples(likelihood):
    net = nn.Linear(4, 3).double()
    model = Model(net, likelihood, 13)
    with ExampleWeights(WEIGHTS[:6]):
        found = KLScaledELBO(13).differentiable_loss(model, lambda x, y: None, X[:6], Y[:6])
    each = likelihood.distribution(net(X[:6])).log_prob(Y[:6])
    torch.testing.assert_close(found, -(each * WEIGHTS[:6]).sum() / 6)


def test_sites_of_pixels_and_sites_that_are_not_of_examples():
    def model(x, y):
        pyro.sample("whole", dist.Normal(torch.zeros(5), 1.0), obs=torch.ones(5))
        with pyro.plate("data", 13, subsample=x, dim=-2), pyro.plate("pixels", 4, dim=-1):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    x, y = X[:6], X[1:7]
    with ExampleWeights(WEIGHTS[:6]):
        found = KLScaledELBO(13).differentiable_loss(model, lambda x, y: None, x, y)
    whole = dist.Normal(torch.zeros(5), 1.0).log_prob(torch.ones(5)).sum()
    pixels = (dist.Normal(x, 1.0).log_prob(y) * WEIGHTS[:6, None]).sum() * 13 / 6
    torch.testing.assert_close(found, -(whole + pixels) / 13)


def test_weights_of_1_are_no_weights():
    weighted, plain = trained(torch.ones(13)), trained(None)
    assert_same([weighted[0], plain[0]], tolerance=1e-12)
    assert weighted[1][-1]["loss"] == pytest.approx(plain[1][-1]["loss"], rel=1e-5)


def test_a_weight_of_2_is_the_example_twice_and_a_weight_of_0_none():
    """The maximum-likelihood mean and scale of a Normal, whose closed forms are weighted moments."""
    y = torch.tensor([0.0, 1.0, 5.0, 100.0])
    model = Model(Constant(), Normal(start=2.0), 4)
    weights = [2.0, 1.0, 1.0, 0.0]
    fit(model, lambda x, y: None, torch.zeros(4, 1), y, weights=weights, epochs=3000, lr=2e-2, batch_size=4,
        lr_schedule="cosine", progress=False)  # fmt: skip
    copies = torch.tensor([0.0, 0.0, 1.0, 5.0])
    assert model.net.loc.item() == pytest.approx(float(copies.mean()), abs=1e-3)
    scale = model.likelihood.noise.split(torch.zeros(4), None)[1]
    assert scale.item() == pytest.approx(float(copies.std(correction=0)), rel=1e-3)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.loc + 0 * x[:, 0]


def test_weights_go_with_their_examples_through_shuffling():
    """Examples without weight are not there, whatever their labels."""
    weights = (torch.arange(13) % 2).float()
    other = torch.where(weights > 0, Y, (Y + 1) % 3)
    assert_same([trained(weights)[0], trained(weights, y=other)[0]])
    assert not torch.equal(trained(weights)[0]["loc.weight"], trained(weights, y=(Y + 1) % 3)[0]["loc.weight"])


@pytest.mark.parametrize("kind", [list, np.asarray, lambda values: torch.tensor(values).double()])
def test_weights_of_any_kind_and_examples_of_any_kind(kind):
    weights = kind(WEIGHTS.tolist())
    expected = trained()[0]
    assert_same([trained(weights)[0], expected])
    model, guide = small()
    fit(model, guide, TensorExamples(X, Y), weights=weights, **SETTINGS)
    assert_same([state(model, guide), expected])


def test_an_interrupted_training_resumes_with_its_weights_and_no_others(tmp_path):
    expected = trained()[0]
    steps = iter([False] * 5 + [True])
    with pytest.raises(Interrupted):
        trained(folder=tmp_path, should_stop=lambda: next(steps))
    for others in (None, WEIGHTS.flip(0)):
        with pytest.raises(UserError, match=r"holds a training with weights '.*', this one has"):
            trained(others, folder=tmp_path)
    assert_same([trained(folder=tmp_path)[0], expected])


def test_a_training_without_weights_does_not_resume_with_some(tmp_path):
    steps = iter([False] * 5 + [True])
    with pytest.raises(Interrupted):
        trained(None, folder=tmp_path, should_stop=lambda: next(steps))
    with pytest.raises(UserError, match="holds a training with weights None, this one has"):
        trained(folder=tmp_path)


def by_rank(communicator, own):
    data_parallel.rank_seed = lambda seed, rank: seed
    model, guide = small(seed=communicator.rank)
    weights = WEIGHTS + communicator.rank * own
    fit(model, guide, X, Y, weights=weights, **SETTINGS, communicator=communicator)
    return state(model, guide)


def test_ranks_make_the_update_of_one(tmp_path):
    found = Ranks(tmp_path, 2, by_rank, 0.0).results()
    assert_same(found)
    assert_same([trained(batch_size=8)[0], found[0]], tolerance=1e-12)


def test_ranks_with_other_weights_are_refused(tmp_path):
    outcomes = Ranks(tmp_path, 2, by_rank, 1.0)
    with pytest.raises(Exception, match="settings, inputs or labels"):
        outcomes.results()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (WEIGHTS[:12], r"one number for each of the 13 examples, \[13\]; got shape \[12\]"),
        (WEIGHTS[:, None], r"got shape \[13, 1\]"),
        (-WEIGHTS, "finite, at least 0, and not all 0; got -"),
        (WEIGHTS * 0, "not all 0; got 0 to 0"),
        (WEIGHTS * math.nan, "must be finite"),
        ("heavy", "weights must be one tensor or numpy array"),
    ],
)
def test_what_is_no_weight_is_refused(weights, message):
    with pytest.raises(UserError, match=message):
        trained(weights)


def test_a_model_whose_site_is_not_of_examples_is_refused():
    def model(x, y):
        loc = pyro.param("loc", torch.zeros(()))
        pyro.sample("y", dist.Normal(loc, 1.0).expand([13]).to_event(1), obs=Y.float())

    with pytest.raises(UserError, match="no observed site has these in its first batch dimension"):
        fit(model, lambda x, y: None, X, Y.float(), weights=WEIGHTS, epochs=1, batch_size=13, progress=False)
