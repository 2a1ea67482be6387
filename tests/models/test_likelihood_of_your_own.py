"""A likelihood of a user's own, a zero-inflated Poisson, through everything that takes a likelihood."""

import pyro.distributions as dist
import pytest
import torch
from likelihood_conformance import check_likelihood
from torch import nn

from ppl_bnn import Likelihood, MeanFieldNormal, Model, Poisson, bayesian, fit, predict
from ppl_bnn.errors import UserError
from ppl_bnn.models.likelihoods import Categorical


class ZeroInflatedPoisson(Likelihood):
    """Counts that are 0 with probability sigmoid(outputs[:, 1]), and otherwise Poisson(exp(outputs[:, 0]))."""

    units = "variance of the count"

    def distribution(self, outputs):
        """p(y | outputs [N, 2])."""
        return dist.ZeroInflatedPoisson(outputs[:, 0].exp(), gate_logits=outputs[:, 1])

    def check(self, outputs):
        """Raise UserError unless outputs are [N, 2]."""
        if outputs.shape[1:] != (2,):
            raise UserError(f"ZeroInflatedPoisson needs outputs [N, 2], the network gives {list(outputs.shape)}")
        super().check(outputs)

    def parts(self, outputs):
        """Beside mean and variance the probability of 0, whose average over draws is scored."""
        of = self.distribution(outputs)
        zero = of.log_prob(torch.zeros(len(outputs))).exp()
        return {"mean": of.mean, "variance": of.variance, "zero": zero}

    def scores(self, found):
        """The usual scores, and the Brier score of 'there is none'."""
        zero = found.averages["zero"]
        return {**super().scores(found), "brier_of_zero": float((zero - (found.y == 0).double()).square().mean())}


def data(count=600):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(count, 1, generator=generator) - 1
    counts = torch.poisson((1 + x[:, 0]).exp(), generator=generator)
    return x, counts * (torch.rand(count, generator=generator) > 0.3)


def test_it_keeps_the_contract():
    outputs = 0.5 * torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(0)) + 0.5
    y = torch.tensor([0, 2, 1, 5, 0])
    refused = [(outputs[0], values) for values in (-y - 1, y + 0.5, y[:, None])]
    check_likelihood(ZeroInflatedPoisson(), outputs, y, refused, total_of_draws=lambda samples: samples.double().var(0))


def test_it_is_trained_predicted_and_scored():
    x, y = data()
    torch.manual_seed(0)
    model = Model(bayesian(nn.Linear(1, 2)), ZeroInflatedPoisson(), len(x))
    guide = MeanFieldNormal(model, x[:1], y[:1])
    fit(model, guide, x, y, epochs=60, batch_size=100, lr=3e-2, lr_schedule="cosine", estimator="local", progress=False)
    found = predict(model, guide, x, y, num_samples=100, progress=False)
    truth = 0.7 * (1 + x[:, 0]).exp().double()
    assert (found.mean - truth).abs().max() < 0.8
    zero = 0.3 + 0.7 * (-(1 + x[:, 0]).exp()).exp().double()
    assert (found.averages["zero"] - zero).abs().max() < 0.12
    scores = found.scores()
    assert list(scores)[:2] == ["nll", "rmse"]
    assert scores["brier_of_zero"] == pytest.approx(float((zero * (1 - zero)).mean()), abs=0.03)
    assert 0.85 < scores["coverage_90"] <= 1
    of = dist.ZeroInflatedPoisson((1 + x[:, 0]).exp(), gate=torch.tensor(0.3))
    assert scores["nll"] == pytest.approx(-float(of.log_prob(y).mean()), abs=0.05)
    assert found.std.min() > 0
    assert torch.isfinite(found.quantiles([0.1, 0.9])).all()


def test_what_it_does_not_take_is_refused_by_fit_and_predict():
    x, y = data(20)
    for outputs, values, message in (
        (3, y, r"needs outputs \[N, 2\], the network gives \[2, 3\]"),
        (2, -y - 1, "has the support"),
    ):
        model = Model(bayesian(nn.Linear(1, outputs)), ZeroInflatedPoisson(), 20)
        guide = MeanFieldNormal(model, x[:1], y[:1])
        with pytest.raises(UserError, match=message):
            fit(model, guide, x, values, epochs=1, progress=False)
        with pytest.raises(UserError, match=message):
            predict(model, guide, x, values, num_samples=2, progress=False)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "message"),
    [
        (ZeroInflatedPoisson(), 2, r"no mean and no variance.* at draw 0, whose outputs are from 199.* to 200"),
        (Poisson(), 1, "draw 0 gives infinite means: its weights or outputs overflow"),
    ],
    ids=["no mean", "infinite mean"],
)
def test_a_mean_that_overflows_is_refused_by_the_number_of_its_draw(likelihood, outputs, message):
    x, y = data(20)
    model = Model(bayesian(nn.Linear(1, outputs)), likelihood, 20)
    guide = MeanFieldNormal(model, x[:1], y[:1])
    with torch.no_grad():
        model.net.bias.fill_(200.0)
    with pytest.raises(UserError, match=message):
        predict(model, guide, x, num_samples=2, progress=False)


def test_a_categorical_with_a_distribution_of_its_own_has_its_nll():
    class Cold(Categorical):
        def distribution(self, outputs):
            return super().distribution(4 * outputs)

    outputs, y = torch.tensor([[0.0, 1.0, 0.5], [2.0, 0.0, 1.0]]), torch.tensor([1, 2])
    expected = torch.nn.functional.cross_entropy(4 * outputs, y, reduction="sum")
    torch.testing.assert_close(Cold().nll(outputs, y), expected)
    expected = -(4 * outputs).log_softmax(-1)[[0, 1], y] @ torch.tensor([2.0, 0.5])
    torch.testing.assert_close(Cold().nll(outputs, y, torch.tensor([2.0, 0.5])), expected)
    assert int(Cold().correct(outputs, y)) == 1
