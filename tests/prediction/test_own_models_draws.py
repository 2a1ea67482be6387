"""Draws of a user's own Pyro model are added to, shared out, mirrored and left out as those of any network."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from own_models import CLOUD, FAMILIES, X, drawn, own_model
from ranks import Ranks
from torch import nn

from ppl_bnn import MeanFieldNormal, bayesian, fit, predict

MIXTURE = FAMILIES["a mixture density network"]


def test_draws_are_added_to_and_the_rest_of_an_interrupted_prediction_is_the_same():
    model = own_model(MIXTURE)
    y = drawn(model)
    whole = predict(model, CLOUD, X, y, num_samples=9, progress=False)
    some = predict(model, CLOUD, X, y, num_samples=4, progress=False)
    more = predict(model, CLOUD, X, y, num_samples=9, so_far=some, progress=False)
    assert torch.equal(more.mean, whole.mean)
    assert torch.equal(more.log_likelihood, whole.log_likelihood)
    assert torch.equal(more.samples, whole.samples)


def by_rank(communicator):
    model = own_model(MIXTURE)
    found = predict(model, CLOUD, X, drawn(model), num_samples=5, progress=False, communicator=communicator)
    return {"mean": found.mean, "log_likelihood": found.log_likelihood}


def test_ranks_share_the_draws_out(tmp_path):
    model = own_model(MIXTURE)
    alone = predict(model, CLOUD, X, drawn(model), num_samples=5, progress=False)
    for found in Ranks(tmp_path, 2, by_rank).results():
        assert torch.equal(found["mean"], alone.mean)
        assert torch.equal(found["log_likelihood"], alone.log_likelihood)


def test_a_tolerance_leaves_examples_out_whose_draws_stay_the_same():
    model = own_model(lambda out: dist.Normal(out[:, 0], out[:, 1].exp()))
    y = drawn(model)
    whole = predict(model, CLOUD, X, y, num_samples=100, progress=False)
    found = predict(model, CLOUD, X, y, num_samples=100, tolerance=0.25, progress=False)
    assert 0 < (found.draws == 50).sum() < 30
    torch.testing.assert_close(found.means[50:, found.draws == 100], whole.means[50:, found.draws == 100])
    assert found.log_likelihood[50:, found.draws == 50].isnan().all()
    torch.testing.assert_close(
        found.log_likelihood[50:, found.draws == 100], whole.log_likelihood[50:, found.draws == 100]
    )


def test_antithetic_draws_are_mirror_images():
    torch.manual_seed(0)
    net = bayesian(nn.Linear(4, 6))

    def model(x, y=None):
        loc = net(x)[:, 0]
        with pyro.plate("data", 30, subsample=x):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    guide = MeanFieldNormal(model, X[:1], torch.zeros(1), init_scale=0.5)
    found = predict(model, guide, X, num_samples=6, sampling="antithetic", progress=False)
    centre = X @ guide.loc_scale("weight")[0][0].detach() + net.bias[0].detach()
    torch.testing.assert_close(found.means.unflatten(0, (3, 2)).mean(1), centre.expand(3, 30))


def test_kept_examples_and_no_log_likelihood():
    model = own_model(MIXTURE)
    y = drawn(model)
    whole = predict(model, CLOUD, X, y, num_samples=6, progress=False)
    found = predict(model, CLOUD, X, y, num_samples=6, keep=[3, 5], log_likelihood=False, progress=False)
    assert torch.equal(found.samples, whole.samples[:, [3, 5]])
    assert found.nll == pytest.approx(whole.nll, rel=1e-6)


def test_a_mixture_density_network_is_trained_and_predicted():
    torch.manual_seed(1)
    x = torch.linspace(-1, 1, 200)[:, None]
    y = x[:, 0] * torch.randint(0, 2, (200,)).mul(2).sub(1) * 2 + 0.1 * torch.randn(200)
    net = bayesian(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 6)))

    def model(x, y=None):
        fn = MIXTURE(net(x))
        with pyro.plate("data", 200, subsample=x):
            pyro.sample("y", fn, obs=y)

    guide = MeanFieldNormal(model, x[:1], y[:1])
    fit(model, guide, x, y, epochs=60, batch_size=50, lr=2e-2, kl_weight=0.1, progress=False)
    found = predict(model, guide, x, y, num_samples=50, progress=False)
    # One Normal of the best mean (0) and scale has this NLL.
    single = -dist.Normal(0.0, y.std()).log_prob(y).mean()
    assert found.nll < single - 0.1
