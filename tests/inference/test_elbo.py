"""The objective: its KL against closed form and Monte Carlo, its scaling, and a posterior known exactly."""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoNormal
from pyro.optim import Adam

from ppl_bnn import Classifier, GaussianScaleMixture, KLScaledELBO, MeanFieldNormal, build, kl_by_site

PRIORS = {
    "normal": dist.Normal(0.1, 0.3),
    "laplace": dist.Laplace(0.0, 0.2),
    "student_t": dist.StudentT(3.0, 0.0, 0.2),
    "scale_mixture": GaussianScaleMixture(0.4, 1.0, 0.1),
    "cauchy": dist.Cauchy(0.0, 0.2),
}


def weights_model(prior, size=400):
    """A model with `size` weights under a prior, and a likelihood that does not depend on them."""

    def model():
        pyro.sample("w", prior.expand([size]).to_event(1))

    return model


@pytest.mark.parametrize("name", PRIORS)
def test_kl_agrees_with_quadrature(name):
    prior = PRIORS[name]
    model = weights_model(prior)
    guide = MeanFieldNormal(model, init_loc=0.3, init_scale=0.2, init_jitter=0.5)
    loc, scale = (value.detach().double() for value in guide.loc_scale("w"))
    # KL of each weight by the trapezoid rule on 12 standard deviations either way.
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64).unsqueeze(1)
    q = dist.Normal(loc, scale)
    at = loc + scale * z
    integrand = q.log_prob(at).exp() * (q.log_prob(at) - prior.log_prob(at))
    exact = torch.trapezoid(integrand, at, dim=0).sum().item()
    elbo = KLScaledELBO(7)
    found = []
    for _ in range(300):
        elbo.loss(model, guide)
        found.append(7 * elbo.terms.kl)
    found = torch.tensor(found)
    if name != "cauchy":
        assert found.std() < 1e-3
        assert found.mean().item() == pytest.approx(exact, rel=1e-4 if name == "laplace" else 2e-6)
    else:
        assert found.std() > 0
        assert abs(found.mean().item() - exact) < 5 * found.std().item() / math.sqrt(len(found))
    assert elbo.terms.loss == pytest.approx(elbo.terms.nll + elbo.terms.kl)


def test_the_kl_weight_multiplies_the_kl_in_the_loss_and_its_gradient():
    model = weights_model(dist.Normal(0.0, 1.0))
    guide = MeanFieldNormal(model, init_loc=0.3)
    gradients = {}
    for weight in (0.25, 1.0):
        elbo = KLScaledELBO(10, kl_weight=weight)
        guide.zero_grad()
        elbo.loss_and_grads(model, guide)
        assert elbo.terms.loss == pytest.approx(elbo.terms.nll + weight * elbo.terms.kl)
        gradients[weight] = guide.loc.w.grad.clone()
    # Without data the gradient is the KL's alone: loc / prior variance, per datum.
    torch.testing.assert_close(gradients[1.0], guide.loc.w.detach() / 10)
    torch.testing.assert_close(gradients[0.25], gradients[1.0] / 4)


def test_kl_by_site_adds_up_and_is_the_normal_closed_form():
    model = Classifier(build("bnn-fc", prior=dist.Normal(0.0, 0.5)), 100)
    x, y = torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])
    guide = MeanFieldNormal(model, x, y)
    parts = kl_by_site(model, guide, x, y)
    loc, scale = guide.loc_scale("fc2.weight")
    closed = (math.log(0.5) - scale.log() + (scale**2 + loc**2) / (2 * 0.25) - 0.5).sum().item()
    assert parts["fc2.weight"] == pytest.approx(closed, rel=1e-4)
    elbo = KLScaledELBO(100)
    elbo.loss(model, guide, x, y)
    assert sum(parts.values()) == pytest.approx(100 * elbo.terms.kl, rel=1e-5)


def test_at_weight_one_it_is_pyros_elbo_per_datum():
    x, y = torch.rand(20, 1, 28, 28), torch.randint(0, 10, (20,))
    model = Classifier(build("bnn-fc", prior=dist.Normal(0.0, 0.2)), 200)
    guide = MeanFieldNormal(model, x, y)
    torch.manual_seed(5)
    ours = KLScaledELBO(200).loss(model, guide, x, y)
    torch.manual_seed(5)
    assert ours == pytest.approx(TraceMeanField_ELBO().loss(model, guide, x, y) / 200, rel=1e-5)


@pytest.mark.parametrize("where", ["likelihood", "everything"])
@pytest.mark.parametrize("handler", [{"scale": 0.1}, {"mask": torch.tensor(False)}], ids=["scale", "mask"])
def test_scales_and_masks_count_as_in_pyros_elbo(handler, where):
    x, y = torch.rand(20, 5), torch.randint(0, 3, (20,))

    def weighted(function=None):
        if "scale" in handler:
            return poutine.scale(function, **handler)
        return poutine.mask(function, **handler)

    def model(x, y):
        logits = x @ pyro.sample("w", dist.Normal(0.0, 0.2).expand([5, 3]).to_event(2))
        with pyro.plate("data", 20), weighted() if where == "likelihood" else nullcontext():
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = MeanFieldNormal(model, x, y)
    pair = (model, guide) if where == "likelihood" else (weighted(model), weighted(guide))
    found = []
    for elbo, num_data in ((KLScaledELBO(20), 1), (TraceMeanField_ELBO(), 20)):
        torch.manual_seed(5)
        found.append(elbo.loss(*pair, x, y) / num_data)
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("batch", [1, 4, 10, 20])
def test_the_loss_does_not_depend_on_the_batch_size(batch):
    """With the same weights, the mean loss over the batches of an epoch is that of the whole data at once."""
    x, y = torch.rand(20, 1, 28, 28).double(), torch.randint(0, 10, (20,))
    model = Classifier(build("bnn-fc", prior=dist.Normal(0.0, 0.2)).double(), 20)
    guide = MeanFieldNormal(model, x, y)
    elbo = KLScaledELBO(20, kl_weight=0.7)

    def loss(rows):
        torch.manual_seed(3)
        return elbo.loss(model, guide, x[rows], y[rows])

    batches = torch.arange(20).split(batch)
    assert sum(map(loss, batches)) / len(batches) == pytest.approx(loss(torch.arange(20)), rel=1e-10)


def test_gradients_accumulate_to_the_whole_batchs():
    x, y = torch.rand(8, 1, 28, 28).double(), torch.randint(0, 10, (8,))
    model = Classifier(build("bnn-fc").double(), 8)
    guide = MeanFieldNormal(model, x, y)

    def gradient(groups):
        guide.zero_grad()
        for rows in groups:
            torch.manual_seed(3)
            KLScaledELBO(8).loss_and_grads(model, guide, x[rows], y[rows])
        return guide.loc.fc1.weight.grad / len(groups)

    torch.testing.assert_close(gradient(torch.arange(8).split(2)), gradient([torch.arange(8)]))


def test_more_particles_average_the_likelihood_and_count_the_kl_once():
    x, y = torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])
    model = Classifier(build("bnn-fc"), 4)
    guide = MeanFieldNormal(model, x, y)
    one, many = KLScaledELBO(4), KLScaledELBO(4, num_particles=50)
    singles = []
    for _ in range(200):
        one.loss(model, guide, x, y)
        singles.append(one.terms.nll)
    singles = torch.tensor(singles)
    many.loss(model, guide, x, y)
    assert many.terms.kl == pytest.approx(one.terms.kl, rel=1e-5)
    assert abs(many.terms.nll - singles.mean().item()) < 5 * singles.std().item() * math.sqrt(1 / 200 + 1 / 50)


def test_bayesian_linear_regression_recovers_the_exact_posterior():
    """y = X w + noise with an orthogonal design: the posterior factorizes, so mean field can be exact."""
    generator = torch.Generator().manual_seed(0)
    n, d, noise, prior_scale = 200, 4, 0.5, 2.0
    x, _ = torch.linalg.qr(torch.randn(n, d, generator=generator).double())
    x = x * math.sqrt(n)
    y = x @ torch.tensor([1.0, -2.0, 0.0, 0.5]).double() + noise * torch.randn(n, generator=generator).double()

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(d).double(), prior_scale).to_event(1))
        with pyro.plate("data", n, subsample=x):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    precision = torch.diagonal(x.T @ x) / noise**2 + 1 / prior_scale**2
    exact_loc, exact_scale = (x.T @ y) / noise**2 / precision, precision.rsqrt()
    guide = MeanFieldNormal(model, x, y, init_scale=0.1)
    svi = SVI(model, guide, Adam({"lr": 0.02}), loss=KLScaledELBO(n, num_particles=4))
    average = []
    for step in range(2500):
        svi.step(x, y)
        if step >= 1500:
            average.append([value.detach().clone() for value in guide.loc_scale("w")])
    loc, scale = (torch.stack(values).mean(0) for values in zip(*average, strict=True))
    assert ((loc - exact_loc) / exact_scale).abs().max() < 0.1
    torch.testing.assert_close(scale, exact_scale, rtol=0.05, atol=0)


def test_elbo_refuses():
    with pytest.raises(ValueError, match="num_data"):
        KLScaledELBO(0)
    with pytest.raises(ValueError, match="num_particles"):
        KLScaledELBO(1, num_particles=0)


def test_a_site_that_only_the_guide_has_is_named():
    def model(x, y):
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    def guide(x, y):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="the guide samples 'w', which is no latent site of the model"):
        KLScaledELBO(1).loss(model, guide, torch.zeros(2), torch.zeros(2))


def regression_of_positive_rates(x, y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0).expand([3]).to_event(1))
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ (rate * w), 1.0), obs=y)


@pytest.mark.parametrize("kind", [AutoNormal, AutoLowRankMultivariateNormal, AutoDelta])
def test_auxiliary_sites_count_as_in_pyros_elbo(kind):
    """On average: where a KL or an entropy has a closed form, ours has less noise. Densities of transforms count."""
    x, y = torch.randn(20, 3), torch.randn(20)
    guide = kind(regression_of_positive_rates)
    guide(x, y)
    elbo = KLScaledELBO(20)
    ours = torch.tensor([elbo.loss(regression_of_positive_rates, guide, x, y) for _ in range(1000)])
    theirs = torch.tensor([Trace_ELBO().loss(regression_of_positive_rates, guide, x, y) / 20 for _ in range(1000)])
    tolerance = 4 * math.hypot(ours.std().item(), theirs.std().item()) / math.sqrt(1000)
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=max(tolerance, 1e-5))
    parts = kl_by_site(regression_of_positive_rates, guide, x, y)
    assert {"rate", "w"} <= parts.keys()


def test_a_site_that_is_an_auxiliary_draw_as_it_is_has_the_closed_form():
    model = weights_model(PRIORS["normal"])
    theirs, ours = AutoNormal(model, init_scale=0.2), MeanFieldNormal(model, init_scale=0.2, init_jitter=0.0)
    theirs()
    with torch.no_grad():
        theirs.locs.w.copy_(ours.loc_scale("w")[0])
    elbo, found = KLScaledELBO(7), []
    for guide in (theirs, theirs, ours):
        elbo.loss(model, guide)
        found.append(elbo.terms.kl)
    assert found[0] == found[1] == pytest.approx(found[2], rel=1e-5)
    assert kl_by_site(model, theirs).keys() == {"w"}


def test_a_guides_plates_scale_its_sites():
    def model(x, y):
        with pyro.plate("data", 20, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(x, y):
        with pyro.plate("data", 20, subsample=x):
            pyro.sample("z", dist.Normal(0.3, 0.5))

    elbo, x = KLScaledELBO(20), torch.randn(4)
    elbo.loss(model, guide, x, x)
    one = torch.distributions.kl_divergence(dist.Normal(0.3, 0.5), dist.Normal(0.0, 1.0)).item()
    assert elbo.terms.kl == pytest.approx(one, rel=1e-5)


def test_svi_over_a_store_that_holds_another_modules_parameters_is_refused():
    """The second run of a notebook's cell: the optimizer would be given the tensors of the first."""
    x, y = torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])
    for run in range(2):
        model = Classifier(build("bnn-fc"), 4)
        guide = MeanFieldNormal(model, x, y)
        svi = SVI(model, guide, Adam({"lr": 0.01}), KLScaledELBO(4))
        before = guide.loc_scale("fc1.weight")[0].detach().clone()
        if run == 0:
            svi.step(x, y)
            assert not torch.equal(before, guide.loc_scale("fc1.weight")[0])
            continue
        with pytest.raises(ValueError, match=r"another tensor than the module's under .* pyro.clear_param_store\(\)"):
            svi.step(x, y)
    pyro.clear_param_store()
    svi.step(x, y)
    assert not torch.equal(before, guide.loc_scale("fc1.weight")[0])
