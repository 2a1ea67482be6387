"""The step for a loop of one's own is the step of `fit`, whole and in halves."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from ranks import Ranks
from small_training import X, Y, assert_same_state, settings, small, state
from torch import nn

from ppl_bnn import Classifier, GroupedFlips, MeanFieldNormal, Model, Normal, TrainingStep, bayesian, fit
from ppl_bnn.data.examples import batches
from ppl_bnn.errors import Diverged, UserError
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.inference.data_parallel import rank_seed


def own_loop(model, guide, epochs=3, kl_weight=0.5, **how):
    """What `fit` does, in a loop of one's own."""
    step = TrainingStep(model, guide, X[:2], Y[:2], num_data=len(X), **how)
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(rank_seed(0, 0))
        for epoch in range(epochs):
            for rows in batches(len(X), 8, epoch=epoch, seed=0):
                losses.append(step(X[rows], Y[rows], kl_weight=kl_weight).loss * len(rows))
    step.release()
    return [sum(losses[at : at + 7]) / len(X) for at in range(0, 7 * epochs, 7)]


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "ivon", "torch.optim:SGD"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_loop_of_ones_own_is_bitwise_fit(estimator, optimizer):
    model, guide = small()
    how = {"estimator": estimator, "optimizer": optimizer, "lr": 0.01, "clip_norm": 1.0}
    history = fit(model, guide, X, Y, **settings(epochs=3, kl_weight=0.5, **how))
    expected = state(model, guide)
    model, guide = small()
    losses = own_loop(model, guide, **how)
    assert losses == pytest.approx([row["loss"] for row in history], rel=1e-12)
    assert_same_state(expected, state(model, guide))


@pytest.mark.parametrize("num_particles", [1, 2])
def test_through_pyro_too(num_particles):
    how = {"estimator": "groups", "num_particles": num_particles, "lr": 0.01}
    model, guide = small()
    if num_particles == 1:
        model.register_forward_hook(lambda module, inputs, output: None)
    fit(model, guide, X, Y, **settings(epochs=3, kl_weight=0.5, **how))
    expected = state(model, guide)
    model, guide = small()
    if num_particles == 1:
        model.register_forward_hook(lambda module, inputs, output: None)
    own_loop(model, guide, **how)
    assert_same_state(expected, state(model, guide))


def test_halves_are_the_whole():
    found = []
    for halves in (False, True):
        model, guide = small()
        step = TrainingStep(model, guide, X[:2], Y[:2], num_data=50, estimator=GroupedFlips(2))
        torch.manual_seed(3)
        for _ in range(4):
            if halves:
                part = step.gradients(X, Y, kl_weight=0.3)
                terms = step.update()
                assert terms.nll == part.nll
            else:
                terms = step(X, Y, kl_weight=0.3)
        step.release()
        found.append((terms, state(model, guide)))
    assert found[0][0] == found[1][0]
    assert_same_state(found[0][1], found[1][1])
    assert terms.loss == pytest.approx(terms.nll + 0.3 * terms.kl)
    assert terms.correct == int(terms.correct)


def test_values_of_pyro_param_are_trained_and_in_the_callers_store():
    def model(x, y=None):
        bias = pyro.param("bias", torch.tensor(1.0), constraint=dist.constraints.positive)
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 50, subsample_size=len(x)):
            return pyro.sample("y", dist.Normal(x[:, 0] * weight, bias), obs=y)

    pyro.clear_param_store()
    guide = pyro.infer.autoguide.AutoNormal(model)
    step = TrainingStep(model, guide, X[:2], X[:2, 0], num_data=50, lr=0.05, estimator="plain")
    losses = [step(X, X[:, 0]).loss for _ in range(200)]
    assert sum(losses[-20:]) < sum(losses[:20]) - 10
    assert float(pyro.param("bias").detach()) < 0.3


def test_inputs_of_several_tensors():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, a, b):
            return self.layer(a + b).squeeze(-1)

    torch.manual_seed(0)
    model = Model(bayesian(Two()), Normal(0.1), 50)
    x, y = {"a": X[:, :3], "b": X[:, 3:]}, X.sum(1)
    guide = MeanFieldNormal(model, x, y)
    step = TrainingStep(model, guide, x, y, num_data=50, lr=0.05)
    losses = [step(x, y).loss for _ in range(100)]
    assert losses[-1] < losses[0] / 10


def test_batches_need_not_divide_the_number_of_data():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model = Classifier(bayesian(net), 50)
    guide = MeanFieldNormal(model, X[:2], Y[:2])
    # fit would have a last batch of one example; which batches come is the loop's.
    step = TrainingStep(model, guide, X[:7], Y[:7], num_data=50, lr=0.05)
    losses = [step(X[:49], Y[:49], kl_weight=0.1).loss for _ in range(50)]
    assert losses[-1] < losses[0]


def test_weights_of_the_examples_count():
    model, guide = small()
    step = TrainingStep(model, guide, X[:2], Y[:2], num_data=50)
    torch.manual_seed(0)
    one = step.gradients(X, Y).nll
    torch.manual_seed(0)
    model, guide = small()
    step = TrainingStep(model, guide, X[:2], Y[:2], num_data=50)
    torch.manual_seed(0)
    assert step.gradients(X, Y, weights=torch.full((50,), 2.0)).nll == pytest.approx(2 * one, rel=1e-5)


def test_what_goes_wrong_is_told_and_moves_nothing():
    model, guide = small()
    step = TrainingStep(model, guide, X[:2], Y[:2], num_data=50)
    with pytest.raises(UserError, match="update needs gradients"):
        step.update()
    with pytest.raises(UserError, match="kl_weight must be positive and finite, got 0"):
        step(X, Y, kl_weight=0.0)
    step(X, Y)
    before = state(model, guide)
    with pytest.raises(Diverged, match="nothing was updated"):
        step(X * math.nan, Y)
    assert_same_state(before, state(model, guide))
    assert math.isfinite(step(X, Y).loss)
    with pytest.raises(UserError, match="the guide has no site"):
        TrainingStep(model, small(deterministic=True)[1], X[:2], Y[:2], num_data=50)
    for wrong, message in (({"epochs": 3}, "no setting 'epochs'; it has lr, "), ({"lr": -1.0}, "lr must be positive")):
        with pytest.raises(UserError, match=message):
            TrainingStep(model, guide, X[:2], Y[:2], num_data=50, **wrong)


def test_after_release_each_parameter_has_its_own_memory():
    model, guide = small()
    step = TrainingStep(model, guide, X[:2], Y[:2], num_data=50)
    step(X, Y)
    step.release()
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in guide.parameters())


def on_ranks(communicator):
    from small_ranks import X, Y, small

    model, guide = small()
    step = TrainingStep(model, guide, X[:2], Y[:2], num_data=50, lr=0.01, estimator="plain", communicator=communicator)
    torch.manual_seed(communicator.rank)
    rows = torch.arange(40).tensor_split(2)[communicator.rank]
    for number in range(6):
        if number % 2:
            for few in rows.split(5):
                step.gradients(X[few], Y[few], share=len(few) / len(rows))
            step.update()
        else:
            step(X[rows], Y[rows])
    return state(model, guide)


def test_ranks_average_their_gradients(tmp_path):
    one, other = Ranks(tmp_path, 2, on_ranks).results()
    assert_same_state(one, other)
