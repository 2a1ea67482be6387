"""Learnt priors: which tensors of a prior are trained, and how they are kept."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from prior_models import learnt_of, parameter, scales
from pyro.infer import SVI
from ranks import Ranks
from small_training import X, Y, assert_same_state, settings, small, state
from torch import nn

from ppl_bnn import GaussianScaleMixture, KLScaledELBO, UserError, bayesian, fit
from ppl_bnn.errors import Interrupted
from ppl_bnn.inference import checkpoint, data_parallel
from ppl_bnn.models import (
    hierarchical,
    layer_table,
    learnt_normal,
)


@pytest.mark.parametrize(
    ("prior", "names"),
    [
        (dist.Normal(0.0, parameter()), ["weight_prior_unconstrained_scale"]),
        (dist.Normal(torch.zeros(()), parameter()).expand([1]), ["weight_prior_unconstrained_scale"]),
        (dist.Normal(parameter(), parameter()), ["weight_prior_loc", "weight_prior_unconstrained_scale"]),
        (dist.StudentT(4.0, 0.0, parameter()), ["weight_prior_unconstrained_scale"]),
        (GaussianScaleMixture(parameter(0.5), 1.0, 0.1), ["weight_prior_unconstrained_weight"]),
    ],
)
def test_a_tensor_that_two_layers_share_is_one_parameter_that_training_moves(prior, names):
    model, guide = small(prior=prior)
    learnt = learnt_of(model)
    assert [name.rpartition(".")[2] for name in learnt] == names
    assert all(model.net[0]._parameters[name] is model.net[2]._parameters[name] for name in names)
    before = [value.detach().clone() for value in learnt.values()]
    fit(model, guide, X, Y, **settings())
    assert all(not torch.equal(*pair) for pair in zip(before, learnt.values(), strict=True))


def test_the_learnt_scale_is_the_best_for_the_posterior_it_is_the_prior_of():
    # d KL / d scale = 0 where scale^2 is the mean of loc^2 + scale_q^2 over all the weights that share it.
    model, guide = small(prior=learnt_normal(0.5, per="network"))
    for value in guide.parameters():
        value.requires_grad_(False)
    fit(model, guide, X, Y, **settings(epochs=300, lr=0.03, batch_size=50, lr_schedule="cosine"))
    squares = torch.cat([sum(part.square() for part in guide.loc_scale(site)).flatten() for site in guide.sites])
    for scale in scales(model):
        torch.testing.assert_close(scale, squares.mean().sqrt(), rtol=1e-3, atol=0)


def test_a_scale_stays_positive_however_it_is_pushed():
    model, guide = small(prior=learnt_normal(0.1))
    # Weights of almost 0 pull it towards 0.
    with torch.no_grad():
        for part in (guide.loc, guide.unconstrained_scale):
            for value in part.parameters():
                value.fill_(-8.0 if part is guide.unconstrained_scale else 0.0)
    for value in guide.parameters():
        value.requires_grad_(False)
    fit(model, guide, X, Y, **settings(epochs=60, lr=0.5))
    assert all(0 < scale < 0.01 for scale in scales(model))


@pytest.mark.parametrize(
    ("per", "shapes"),
    [
        ("layer", [(), ()]),
        ("network", [()]),
        ("input", [(1, 6), (1, 8)]),
        ("unit", [(8, 1), (2, 1)]),
        ("weight", [(8, 6), (2, 8)]),
    ],
)
def test_a_learnt_scale_is_of_what_it_says(per, shapes):
    model, guide = small(prior=learnt_normal(0.2, per=per))
    assert [value.shape for value in learnt_of(model).values()] == shapes
    fit(model, guide, X, Y, **settings(epochs=1))
    assert all(not torch.allclose(value, torch.tensor(0.2).log()) for value in learnt_of(model).values())


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "ivon"])
def test_a_learnt_prior_trains_under_every_optimizer(optimizer):
    model, guide = small(prior=learnt_normal(0.3))
    before = [value.detach().clone() for value in learnt_of(model).values()]
    losses = [row["loss"] for row in fit(model, guide, X, Y, **settings(optimizer=optimizer, epochs=20))]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(*pair) for pair in zip(before, learnt_of(model).values(), strict=True))


def test_pyros_own_svi_trains_a_learnt_prior():
    model, guide = small(prior=learnt_normal(0.3))
    before = [value.detach().clone() for value in learnt_of(model).values()]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), KLScaledELBO(len(X)))
    for _ in range(3):
        svi.step(X, Y)
    assert all(not torch.equal(*pair) for pair in zip(before, learnt_of(model).values(), strict=True))


def test_a_checkpoint_has_what_was_learnt_and_a_prior_of_another_kind_is_named(tmp_path):
    model, guide = small(prior=learnt_normal(0.3))
    fit(model, guide, X, Y, **settings(), folder=tmp_path)
    found = checkpoint.load(checkpoint.find(tmp_path / "checkpoints"))
    assert found.meta["priors"] == {f"net.{n}.weight": "Normal(loc=0, scale=learnt)" for n in (0, 2)}
    other, its_guide = small(prior=learnt_normal(0.3), seed=4)
    checkpoint.restore(found, model=other, guide=its_guide)
    assert scales(other) == scales(model)
    with pytest.raises(UserError, match=r"another prior: 'net.0.weight': saved Normal\(loc=0, scale=learnt\), now"):
        checkpoint.restore(found, model=small()[0], guide=its_guide)


def test_copies_and_moves_keep_a_learnt_prior_whole():
    model, _ = small(prior=learnt_normal(0.3, per="network"))
    twin = copy.deepcopy(model).double()
    (value,) = learnt_of(twin).values()
    assert value.dtype == torch.double
    assert twin.net[2]._parameters["weight_prior_unconstrained_scale"] is value
    with torch.no_grad():
        value.fill_(math.log(2.0))
    assert scales(twin) == [2.0, 2.0]
    torch.testing.assert_close(scales(model), [torch.tensor(0.3)] * 2)
    draws = [twin(X.double()) for _ in range(2)]
    assert draws[0].dtype == torch.double
    assert not torch.equal(*draws)


def test_the_layer_table_counts_what_a_prior_has():
    plain, learnt, drawn = (
        sum(row.trainable for row in layer_table(bayesian(nn.Linear(6, 8), prior), X))
        for prior in (None, learnt_normal(0.1), hierarchical(1.0, per="input"))
    )
    assert learnt == plain + 1
    assert drawn == plain + 2 * 6


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (
            lambda: dist.Normal(0.0, parameter().exp()),
            "Normal with a tensor that is computed from a trainable one",
        ),
        (lambda: dist.StudentT(parameter().exp(), 0.0, 1.0), "is a StudentT with a tensor that is computed"),
        (
            lambda: dist.MultivariateNormal(nn.Parameter(torch.zeros(6)), torch.eye(6)),
            "MultivariateNormal with a tensor",
        ),
        (
            lambda: dist.Normal(0.0, nn.Parameter(torch.tensor(-1.0)), validate_args=False),
            "learnt scale that starts at -1",
        ),
        (lambda: learnt_normal(0.0), "scale must be positive and finite, got 0.0"),
        (lambda: learnt_normal(0.1, per="row"), "per must be one of layer, input, unit, weight; got 'row'"),
        (lambda: lambda site, shape: 3, "must be a Pyro distribution, got int"),
    ],
)
def test_what_cannot_be_learnt_is_refused_in_one_line(prior, message):
    with pytest.raises(UserError, match=message) as error:
        bayesian(nn.Linear(6, 8), prior())
    assert "\n" not in str(error.value)


def train_on_a_rank(communicator, per):
    model, guide = small(prior=learnt_normal(0.3, per=per))
    data_parallel.rank_seed = lambda seed, rank: seed
    fit(model.double(), guide.double(), X.double(), Y, **settings(estimator="plain"), communicator=communicator)
    return state(model, guide)


@pytest.mark.parametrize("per", ["network", "input"])
def test_ranks_learn_one_prior(tmp_path, per):
    found = Ranks(tmp_path, 2, train_on_a_rank, per).results()
    assert_same_state(*found)
    model, guide = small(prior=learnt_normal(0.3, per=per))
    fit(model.double(), guide.double(), X.double(), Y, **settings(estimator="plain", batch_size=16))
    for name, value in state(model, guide).items():
        torch.testing.assert_close(value, found[0][name], rtol=0, atol=1e-12)


def test_an_interrupted_training_resumes_bitwise_with_what_its_prior_learnt(tmp_path):
    model, guide = small(prior=learnt_normal(0.3, per="input"))
    fit(model, guide, X, Y, **settings(), folder=tmp_path / "whole")
    asked = iter(range(1, 1000))
    other = small(prior=learnt_normal(0.3, per="input"))
    with pytest.raises(Interrupted):
        fit(*other, X, Y, **settings(), folder=tmp_path / "cut", should_stop=lambda: next(asked) >= 10)
    other = small(prior=learnt_normal(0.3, per="input"), seed=5)
    fit(*other, X, Y, **settings(), folder=tmp_path / "cut")
    assert_same_state(state(model, guide), state(*other))
