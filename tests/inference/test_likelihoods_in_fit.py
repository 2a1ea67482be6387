"""What `fit` makes of the observed values, and what it refuses, for every likelihood that comes with the library."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from ppl_bnn import (
    Bernoulli,
    Categorical,
    MeanFieldNormal,
    Model,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
    bayesian,
    fit,
)
from ppl_bnn.errors import UserError
from ppl_bnn.inference.elbo import KLScaledELBO

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
COUNTS = torch.arange(12) % 4
SETTINGS = {"epochs": 2, "batch_size": 4, "lr": 1e-2, "progress": False}


def small(likelihood, y, outputs=3, net=None):
    model = Model(bayesian(net or nn.Linear(4, outputs)), likelihood, 12)
    return model, MeanFieldNormal(model, X[:2], torch.as_tensor(y)[:2])


class Tokens(nn.Module):
    """[N, 4] -> [N, 2, 3]."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x):
        return self.layer(x).unflatten(1, (2, 3))


@pytest.mark.parametrize(
    ("likelihood", "outputs", "y"),
    [
        (Normal(), 1, COUNTS),
        (StudentT(), 1, COUNTS.double()),
        (Normal("predicted"), 2, COUNTS.float()),
        (Bernoulli(), 1, COUNTS > 1),
        (Bernoulli(), 1, (COUNTS > 1).numpy()),
        (Bernoulli(), 2, torch.stack([COUNTS > 1, COUNTS > 2], 1).byte()),
        (Poisson(), 1, COUNTS.int()),
        (NegativeBinomial(), 1, COUNTS),
        (NegativeBinomial("predicted"), 2, COUNTS.numpy()),
        (Categorical(class_weights=[1.0, 2.0, 0.5]), 3, COUNTS % 3),
        (Categorical(ignore_index=3), 3, COUNTS),
        (Categorical(soft_labels=True), 3, torch.full((12, 3), 1 / 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_it_trains_on_what_the_likelihood_takes(likelihood, outputs, y):
    model, guide = small(likelihood, y, outputs)
    history = fit(model, guide, X, y, **SETTINGS)
    assert all(math.isfinite(record["loss"]) for record in history)


def test_labels_of_tokens_train_and_an_example_without_labels_moves_nothing():
    y = torch.stack([COUNTS % 3, (COUNTS + 1) % 3], 1)
    ignored = torch.full_like(y, -100)
    results = []
    for labels in (ignored, torch.where(torch.arange(12)[:, None] < 6, y, -100)):
        torch.manual_seed(0)
        model, guide = small(Categorical(class_dim=-1, ignore_index=-100), y, net=Tokens())
        history = fit(model, guide, X, labels, **SETTINGS)
        results.append(history[-1]["nll"])
    assert results[0] == 0
    assert results[1] > 0


@pytest.mark.parametrize(
    ("likelihood", "outputs", "y", "message"),
    [
        (Poisson(), 1, -COUNTS, "targets y are from -3 to 0; a Poisson likelihood has the support"),
        (Bernoulli(), 1, COUNTS, "targets y are from 0 to 3; a Bernoulli likelihood has the support"),
        (Normal(), 1, COUNTS[:, None].float(), r"targets y have shape \[12, 1\].*pass y.squeeze\(-1\)"),
        (Normal(), 1, COUNTS / 0, "targets y must be finite"),
        (Normal("predicted"), 3, COUNTS.float(), "needs two output columns"),
        (Categorical(ignore_index=-100), 3, COUNTS, r"labels y are from 0 to 3; expected .* 0\.\.2 or -100"),
        (Categorical(ignore_index=-100), 3, COUNTS - 1, r"labels y are from -1 to 2; expected .* 0\.\.2 or -100"),
        (Categorical(soft_labels=True), 3, torch.ones(12, 3), "probabilities that add up to 1"),
        (Categorical(soft_labels=True), 3, COUNTS % 3, r"targets y have shape \[12\].*expects \[N, 3\]"),
        (Categorical(class_weights=[1.0, 2.0]), 3, COUNTS % 3, "2 class_weights, and the network has 3 classes"),
        (Categorical(class_dim=2), 3, COUNTS % 3, r"class_dim is 2, and the network gives \[2, 3\]"),
        (
            Categorical(),
            3,
            COUNTS - 100,
            r"drop the examples .* or ignore one number: Categorical\(ignore_index=-100\)",
        ),
    ],
)
def test_what_it_does_not_take_is_refused_in_one_line(likelihood, outputs, y, message):
    with pytest.raises(UserError, match=message) as refused:
        fit(*small(likelihood, y, outputs), X, y, **SETTINGS)
    assert "\n" not in str(refused.value)


class Binary:
    """Examples whose labels are not as the likelihood takes them."""

    def __len__(self):
        return 12

    def take(self, rows):
        return X[rows], COUNTS[rows] > 1

    def fingerprint(self):
        return ""


def test_labels_of_examples_are_converted_batch_by_batch():
    y, losses = COUNTS > 1, []
    for data in ((X, y), (Binary(),)):
        torch.manual_seed(0)
        losses.append([row["loss"] for row in fit(*small(Bernoulli(), y, 1), *data, **SETTINGS)])
    assert losses[0] == losses[1]


def test_the_loss_of_weighted_and_ignored_labels_is_the_sum_over_those_that_count():
    """Not by the fast path of plain labels."""
    weights = torch.tensor([1.0, 2.0, 0.5])
    net = nn.Linear(4, 3)
    model = Model(net, Categorical(ignore_index=-1, class_weights=weights), 12)
    y = torch.where(COUNTS == 3, -1, COUNTS)
    logs = net(X).log_softmax(1)
    expected = -sum(weights[label] * logs[row, label] for row, label in enumerate(y.tolist()) if label >= 0) / 12
    found = KLScaledELBO(12).differentiable_loss(model, lambda x, y: None, X, y)
    torch.testing.assert_close(found, expected)
    # A batch of 6 stands for all 12.
    half = KLScaledELBO(12).differentiable_loss(model, lambda x, y: None, X[:6], y[:6])
    part = -sum(weights[label] * logs[row, label] for row, label in enumerate(y[:6].tolist()) if label >= 0) / 6
    torch.testing.assert_close(half, part)


def test_a_random_noise_scale_is_given_to_the_check():
    model = Model(bayesian(nn.Linear(4, 1)), Normal(dist.LogNormal(0.0, 1.0)), 12)
    history = fit(model, AutoNormal(model), X, COUNTS, **SETTINGS)
    assert math.isfinite(history[-1]["loss"])
