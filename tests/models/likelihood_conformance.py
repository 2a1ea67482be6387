"""What any likelihood must do: run an implementation through `check_likelihood`."""

import math

import pytest
import torch

from ppl_bnn.errors import UserError
from ppl_bnn.prediction.running import Target
from ppl_bnn.prediction.tally import Tally


def check_likelihood(likelihood, outputs, y, refused, *, total_of_draws):
    """Assert the contract of `ppl_bnn.models.likelihoods.Likelihood` by Monte Carlo.

    Args:
        outputs: of S draws and N examples, [S, N, *].
        y: observed values of N examples, as `Likelihood.observed` converts them.
        refused: [(outputs, values)]: values of y that it cannot take beside such outputs.
        total_of_draws: a function of sampled y [M, N, ...] to each example's total uncertainty [N].
    """
    likelihood.check(outputs[0])
    observed = likelihood.observed(y, outputs[0, :2])
    assert isinstance(observed, torch.Tensor)
    for some, values in refused:
        with pytest.raises(UserError):
            likelihood.observed(values, some)
    check_statistics(likelihood, outputs, observed)
    check_samples(likelihood, outputs)
    check_averages(likelihood, outputs, observed)
    check_decomposition(likelihood, outputs, observed, total_of_draws)


def check_statistics(likelihood, outputs, y):
    found = likelihood.statistics(outputs, y)
    for draw, log_likelihood, mean in zip(outputs, found.log_likelihood, found.mean, strict=True):
        of = likelihood.distribution(draw)
        assert of.batch_shape == draw.shape[:1]
        torch.testing.assert_close(log_likelihood, of.log_prob(y), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mean, likelihood.mean(draw), rtol=1e-5, atol=1e-6)
        weights = torch.linspace(0, 2, len(log_likelihood)).to(log_likelihood)
        for own, expected in ((None, log_likelihood), (weights, weights * log_likelihood)):
            torch.testing.assert_close(likelihood.nll(draw, y, own), -expected.sum(), rtol=1e-5, atol=1e-4)
    unlabelled = likelihood.statistics(outputs)
    assert torch.equal(unlabelled.mean, found.mean)
    assert (unlabelled.log_likelihood, unlabelled.score) == (None, None)
    assert found.score.shape == outputs.shape[:1]
    for values in (found.mean, *found.others.values()):
        assert values.shape[:2] == outputs.shape[:2]


def check_samples(likelihood, outputs, count=4000):
    flat = outputs.flatten(0, 1)
    first = likelihood.sample(flat, seed=3)
    state = torch.get_rng_state()
    assert torch.equal(first, likelihood.sample(flat, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, likelihood.sample(flat, seed=4))
    # The mean of samples is the mean.
    one = outputs[:1]
    samples = likelihood.sample(one.expand(count, *one.shape[1:]).flatten(0, 1), seed=1).unflatten(0, (count, -1))
    mean = likelihood.mean(one[0])
    values = samples.double() if mean.dim() == samples.dim() - 1 else one_hot(samples, mean)
    error = values.std(0) / math.sqrt(count) + 1e-3
    assert ((values.mean(0) - mean.double()).abs() < 5 * error).all()


def check_averages(likelihood, outputs, y):
    """The running sums of draws added in parts are the averages, bit for bit as of draws added at once."""
    parts = []
    for cuts in ([len(outputs)], [1, len(outputs) - 1]):
        target = Target(torch.nn.Identity(), likelihood, outputs[0], {})
        tally = Tally(len(outputs), torch.arange(len(y)), len(y), y, target, sampling="independent", method="draws")
        tally.begin(0, len(y))
        for part in outputs.split(cuts):
            tally.add(part)
        parts.append(tally.result())
    found = likelihood.statistics(outputs, y)
    for name, values in {"mean": found.mean, **found.others}.items():
        assert torch.equal(parts[0].averages[name], parts[1].averages[name])
        torch.testing.assert_close(parts[0].averages[name], values.double().mean(0), rtol=1e-6, atol=1e-9)
    scores = parts[0].scores()
    expected = -(torch.logsumexp(found.log_likelihood.double(), 0) - math.log(len(outputs))).mean()
    assert scores["nll"] == pytest.approx(float(expected))


def check_decomposition(likelihood, outputs, y, total_of_draws, repeats=2000):
    found = likelihood.statistics(outputs, y)
    averages = {name: values.double().mean(0) for name, values in {"mean": found.mean, **found.others}.items()}
    averages["spread"] = found.mean.double().var(0, correction=0)
    total, aleatoric, epistemic = likelihood.decompose(averages)
    torch.testing.assert_close(aleatoric + epistemic, total, rtol=1e-6, atol=1e-9)
    assert (epistemic >= 0).all()
    many = outputs.repeat(repeats, *[1] * (outputs.dim() - 1))
    samples = likelihood.sample(many.flatten(0, 1), seed=2).unflatten(0, (len(many), -1))
    torch.testing.assert_close(total_of_draws(samples), total, rtol=0.1, atol=0.02)
    # Draws that agree leave nothing epistemic.
    alike = {name: values[0].double() for name, values in {"mean": found.mean, **found.others}.items()}
    alike["spread"] = torch.zeros_like(alike["mean"])
    assert likelihood.decompose(alike)[2].abs().max() < 1e-5


def one_hot(samples, like):
    return torch.nn.functional.one_hot(samples, like.shape[-1]).double()
