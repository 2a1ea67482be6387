"""Likelihoods run through the contract: Categorical, and a Normal in thirty lines."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from likelihood_conformance import check_likelihood

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, metrics
from ppl_bnn.errors import UserError
from ppl_bnn.models.likelihoods import Categorical, Likelihood

OUTPUTS = 1.5 * torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1, 1, 0])


class Laplace(Likelihood):
    """y ~ Laplace(outputs[:, 0], softplus(outputs[:, 1])): a likelihood of a user's own."""

    def distribution(self, outputs):
        return dist.Laplace(outputs[:, 0], torch.nn.functional.softplus(outputs[:, 1]))


def test_categorical_keeps_the_contract():
    refused = [(OUTPUTS[0], y) for y in (LABELS.float(), LABELS + 1, LABELS[:, None], -100 * LABELS, ["a"])]

    def entropy_of_classes(samples):
        shares = torch.nn.functional.one_hot(samples, 3).double().mean(0)
        return metrics.entropy(shares)

    check_likelihood(Categorical(), OUTPUTS, LABELS.int().numpy(), refused, total_of_draws=entropy_of_classes)


def test_a_likelihood_of_one_method_keeps_the_contract():
    y = torch.linspace(-1, 1, 5)
    outputs = OUTPUTS[..., :2]
    refused = [(outputs[0], values) for values in (y[:, None], y * float("nan"), ["a"] * 5)]
    check_likelihood(Laplace(), outputs, y, refused, total_of_draws=lambda samples: samples.double().var(0))


@pytest.mark.parametrize(
    "labels",
    [LABELS.int(), LABELS.to(torch.uint8), LABELS.numpy(), LABELS.numpy().astype(np.int16), LABELS.tolist()],
    ids=["int32", "uint8", "numpy", "int16", "list"],
)
def test_labels_that_are_unambiguous_are_converted(labels):
    found = Categorical().observed(labels, OUTPUTS[0])
    assert found.dtype == torch.int64
    assert torch.equal(found, LABELS)


class Series:
    """What pandas calls a column."""

    def to_numpy(self):
        return LABELS.numpy()


Series.__module__ = "pandas.core.series"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            LABELS.float(),
            r"dtype float32; expected integer class labels 0\.\.2.*values are from 0 to 2: pass y.long\(\)",
        ),
        (torch.linspace(-3, 5, 5), r"class labels 0\.\.2 of shape \[N\]. Their values are from -3 to 5"),
        (torch.eye(3)[LABELS].long(), r"labels y have shape \[5, 3\].*They look one-hot: pass y.argmax\(-1\)"),
        (LABELS + 1, r"labels y are from 1 to 3; expected integer class labels 0\.\.2 .*: subtract 1"),
        (
            LABELS.index_fill(0, torch.tensor([1]), -100),
            r"labels y are from -100 to 1; expected .* 0\.\.2 .*: drop the examples without a label",
        ),
        (Series(), r"the labels y must be one tensor or numpy array .*got a Series: pass .*y.to_numpy\(\)"),
        ({"y": LABELS}, r"the labels y must be one tensor or numpy array .*got a dict"),
        (["cat", "dog"], r"the labels y is a numpy array of dtype <U3; torch needs numbers"),
    ],
)
def test_what_is_no_class_label_is_refused_by_name(labels, message):
    with pytest.raises(UserError, match=message):
        Categorical().observed(labels, OUTPUTS[0])


def test_a_softmax_over_one_column_is_refused():
    for outputs in (torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 3, 4)):
        with pytest.raises(UserError, match="needs at least 2 outputs, one for each class"):
            Categorical().check(outputs)
    assert isinstance(Classifier(torch.nn.Linear(2, 3), 5).likelihood, Categorical)


def test_outputs_of_tokens_are_refused_by_name_where_the_guide_is_built():
    model = Classifier(bayesian(torch.nn.Linear(4, 3)), 5)
    with pytest.raises(UserError, match=r"gives \[1, 7, 3\].*give class_dim"):
        MeanFieldNormal(model, torch.zeros(1, 7, 4), torch.zeros(1, 7))
