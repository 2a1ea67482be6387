"""Real numbers: Normal and StudentT in all their forms."""

import math

import pyro.distributions as dist
import pytest
import torch
from likelihood_conformance import check_likelihood
from scipy import stats

from ppl_bnn.errors import UserError
from ppl_bnn.models.likelihoods import Normal, StudentT

OUTPUTS = torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(0))
Y = torch.linspace(-2, 2, 5)


def variance(samples):
    return samples.double().var(0)


def refused(outputs):
    return [(outputs[0], values) for values in (Y[:, None], Y * float("nan"), ["a"] * 5, Y / 0)]


@pytest.mark.parametrize("scale", [0.7, "learnt", "predicted", torch.tensor(0.5)])
@pytest.mark.parametrize("family", [Normal, StudentT])
def test_numbers_keep_the_contract(family, scale):
    # df 8: the variance of a variance of 4 degrees of freedom is infinite.
    how = {"df": 8.0} if family is StudentT else {}
    outputs = OUTPUTS if scale == "predicted" else OUTPUTS[..., :1]
    likelihood = family(scale=scale, start=0.6, **how).requires_grad_(False)
    check_likelihood(likelihood, outputs, Y.double().numpy(), refused(outputs), total_of_draws=variance)


@pytest.mark.parametrize("family", [Normal, StudentT])
def test_several_numbers_with_a_scale_each_are_independent(family):
    scale = torch.tensor([0.5, 2.0])
    found = family(scale=scale).distribution(OUTPUTS[0])
    assert (found.batch_shape, found.event_shape) == ((5,), (2,))
    y = torch.stack([Y, -Y], 1)
    each = [family(scale=float(scale[at])).distribution(OUTPUTS[0][:, at]).log_prob(y[:, at]) for at in range(2)]
    torch.testing.assert_close(found.log_prob(y), sum(each))


def test_student_t_is_scipys():
    found = StudentT(5.0, 0.7).distribution(OUTPUTS[0][:, 0])
    theirs = stats.t(5, OUTPUTS[0][:, 0].double(), 0.7)
    torch.testing.assert_close(found.log_prob(Y).double(), torch.as_tensor(theirs.logpdf(Y)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.variance.double(), torch.as_tensor(theirs.var()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("df", [2, 1.0, math.inf, math.nan, "4"])
def test_a_student_t_without_variance_is_refused(df):
    with pytest.raises(UserError, match="df must be above 2"):
        StudentT(df)


def test_what_is_no_scale_is_refused():
    for scale in (0.0, -1.0, math.nan, "predict", torch.tensor([1.0, 0.0])):
        with pytest.raises(UserError, match="scale must be"):
            Normal(scale)
    with pytest.raises(UserError, match="the prior of noise_scale needs positive support"):
        Normal(dist.Normal(0, 1))
    with pytest.raises(UserError, match=r"'predicted' needs two output columns for each number, \[N, 2 D\].*\[5, 3\]"):
        Normal("predicted").check(torch.zeros(5, 3))
