"""Learnt, hierarchical, ARD, horseshoe and pretrained priors: their densities, their KL, and what they find."""

from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from ppl_bnn import Classifier, KLScaledELBO, UserError, bayesian, fit, kl_by_site
from ppl_bnn.guides.normal import FactorizedNormal, softplus
from ppl_bnn.models import (
    ard,
    hierarchical,
    horseshoe,
    learnt_normal,
    parse_prior,
    pretrained_prior,
    site_priors,
)
from ppl_bnn.models.random_network import priors_of


class Regression(nn.Module):
    """y ~ Normal(net(x), 0.5)."""

    def __init__(self, net, num_data):
        super().__init__()
        self.net, self.num_data = net, num_data

    def forward(self, x, y=None):
        outputs = self.net(x).squeeze(-1)
        with pyro.plate("data", self.num_data, subsample=x):
            pyro.sample("y", dist.Normal(outputs, 0.5), obs=y)


def sites_of(prior, layer=None):
    layer = layer or nn.Linear(3, 2)
    shape = [1, layer.in_features] if isinstance(layer, nn.Linear) else [1, layer.in_channels, 9, 9]
    trace = pyro.poutine.trace(bayesian(layer, prior, bayesian_bias=True)).get_trace(torch.zeros(shape))
    return dict(trace.iter_stochastic_nodes())


@pytest.mark.parametrize(
    ("prior", "shapes"),
    [
        (hierarchical(), {"weight_scale": (), "bias_scale": ()}),
        (hierarchical(dist.Gamma(2.0, 3.0), per="unit"), {"weight_scale": (2, 1), "bias_scale": ()}),
        (ard(), {"weight_scale": (1, 3), "bias_scale": ()}),
        (
            horseshoe(0.3),
            {
                "weight_global_scale": (),
                "weight_local_scale": (2, 3),
                "bias_global_scale": (),
                "bias_local_scale": (2,),
            },
        ),
    ],
)
def test_a_weights_prior_is_normal_of_the_drawn_scale(prior, shapes):
    sites = sites_of(prior)
    assert {name: site["value"].shape for name, site in sites.items()} == {**shapes, "weight": (2, 3), "bias": (2,)}
    for name, shape in (("weight", (2, 3)), ("bias", (2,))):
        scale = torch.ones(shape)
        for own in shapes:
            if own.startswith(name):
                scale = scale * sites[own]["value"]
        expected = dist.Normal(0.0, scale).log_prob(sites[name]["value"]).sum()
        torch.testing.assert_close(sites[name]["fn"].log_prob(sites[name]["value"]), expected)


def test_an_input_of_a_convolution_is_a_channel():
    assert sites_of(ard(), nn.Conv2d(3, 4, 5))["weight_scale"]["value"].shape == (1, 3, 1, 1)


def test_the_regularized_horseshoe_is_the_horseshoe_below_its_slab_and_no_wider():
    sites = sites_of(horseshoe(0.5, slab=2.0))
    plain = sites["weight_global_scale"]["value"] * sites["weight_local_scale"]["value"]
    expected = (1 / plain.square() + 1 / 2.0**2).rsqrt()
    torch.testing.assert_close(sites["weight"]["fn"].base_dist.stddev, expected)


class Guide(nn.Module):
    """q(scale) q(weight), log-normal and Normal, with parameters away from the prior's."""

    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(3)
        self.log_loc, self.log_scale = (nn.Parameter(0.3 * torch.randn(shape) + at) for at in (-0.5, -1.0))
        self.loc, self.scale = nn.Parameter(0.5 * torch.randn(2, 3)), nn.Parameter(torch.randn(2, 3) - 1.0)

    def hyper(self):
        return dist.LogNormal(self.log_loc, self.log_scale.exp()).to_event(self.log_loc.dim())

    def forward(self, x):
        pyro.sample("weight_scale", self.hyper())
        pyro.sample("weight", FactorizedNormal(self.loc, self.scale))


def estimates(total, guide, count):
    """Value and gradient of `count` calls of `total`, {name: [count, ...]} of the value and each parameter."""
    found = {"value": [], **{name: [] for name, _ in guide.named_parameters()}}
    for _ in range(count):
        value = total()
        found["value"].append(value.detach())
        for (name, _), gradient in zip(
            guide.named_parameters(), torch.autograd.grad(value, list(guide.parameters())), strict=True
        ):
            found[name].append(gradient)
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.parametrize("per", ["layer", "input"])
@pytest.mark.parametrize("hyper_prior", [dist.LogNormal(-1.0, 0.7), dist.HalfCauchy(0.4)])
def test_the_kl_and_its_gradient_are_unbiased(hyper_prior, per):
    # Of a drawn scale the weights' KL is in closed form; on average it is the KL of all sites together.
    layer = bayesian(nn.Linear(3, 2), hierarchical(hyper_prior, per=per)).double()
    guide = Guide(() if per == "layer" else (1, 3)).double()
    elbo, x = KLScaledELBO(1), torch.zeros(1, 3, dtype=torch.double)

    def ours():
        # There is no observed site: the loss is the KL.
        return elbo.differentiable_loss(layer, guide, x)

    def brute(draws=400):
        q = guide.hyper()
        scale = q.rsample((draws,))
        weight = dist.Normal(guide.loc, softplus(guide.scale)).rsample((draws,))
        log_q = q.log_prob(scale) + dist.Normal(guide.loc, softplus(guide.scale)).log_prob(weight).sum((1, 2))
        each = hyper_prior.log_prob(scale)
        log_p = each if per == "layer" else each.sum((1, 2))
        wide = scale.view(-1, 1, 1) if per == "layer" else scale
        return (log_q - log_p - dist.Normal(0.0, wide).log_prob(weight).sum((1, 2))).mean()

    torch.manual_seed(0)
    found, expected = estimates(ours, guide, 1500), estimates(brute, guide, 300)
    for name, values in found.items():
        error = (values.var(0) / len(values) + expected[name].var(0) / len(expected[name])).sqrt()
        z = (values.mean(0) - expected[name].mean(0)) / error
        assert z.abs().max() < 4.5, (name, z)
    # Less is left to chance than one draw of everything leaves.
    assert found["value"].std() < 0.8 * expected["value"].std() * 400**0.5


def test_the_kl_of_each_site_is_given_the_drawn_scale():
    layer = bayesian(nn.Linear(3, 2), hierarchical(0.4)).double()
    guide = Guide(()).double()
    with torch.no_grad():
        # So narrow that the draw is the median.
        guide.log_scale.fill_(-20.0)
    scale = guide.log_loc.detach().exp()
    q = dist.Normal(guide.loc, softplus(guide.scale))
    expected = torch.distributions.kl_divergence(q, dist.Normal(0.0, scale)).sum()
    found = kl_by_site(layer, guide, torch.zeros(1, 3, dtype=torch.double))
    assert found["weight"] == pytest.approx(float(expected.detach()), rel=1e-6)


def relevance(prior, *, seed=0, num_data=100):
    """Posterior means of 20 weights of which 3 are relevant, their true values, and the scales of their priors."""
    torch.manual_seed(seed)
    x, truth = torch.randn(num_data, 20), torch.zeros(20)
    truth[[2, 7, 11]] = torch.tensor([1.5, -1.0, 0.5])
    y = x @ truth + 0.5 * torch.randn(num_data)
    model = Regression(bayesian(nn.Linear(20, 1), prior), num_data)
    guide = AutoNormal(model, init_scale=0.05)
    guide(x, y)
    fit(model, guide, x, y, epochs=800, batch_size=num_data, lr=0.02, lr_schedule="cosine", progress=False)
    median = guide.median()
    given = {name: value for name, value in median.items() if name != "weight"}
    scales = site_priors(model, x[:1], y[:1], given=given)["weight"].base_dist.stddev.expand(1, 20)
    return median["weight"].detach()[0], truth, scales[0]


@cache
def ridge():
    """The posterior means under the prior Normal(0, 1)."""
    return relevance(dist.Normal(0.0, 1.0))[0]


@pytest.mark.parametrize(
    "prior",
    [ard(), horseshoe(0.05), horseshoe(0.05, slab=2.0), learnt_normal(0.5, per="input")],
    ids=lambda p: str(p)[:20],
)
def test_the_relevant_inputs_are_found(prior):
    found, truth, scales = relevance(prior)
    plain = ridge()
    assert scales[truth != 0].min() > 1.5 * scales[truth == 0].max()
    assert (found - truth).norm() < 0.95 * (plain - truth).norm()
    # What is relevant hardly shrinks, what is not does.
    assert ((found - plain)[truth != 0].abs() < 0.05).all()
    assert found[truth == 0].norm() < 0.9 * plain[truth == 0].norm()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learnt_normal(0.1)", "Normal(loc=0, scale=learnt)"),
        ("hierarchical(1)", "hierarchical(HalfCauchy(scale=1), per=layer)"),
        ("hierarchical(gamma(2, 20))", "hierarchical(Gamma(concentration=2, rate=20), per=layer)"),
        (" ard( half_cauchy(0.5) ) ", "hierarchical(HalfCauchy(scale=0.5), per=input)"),
        ("ard(log_normal(-2, 1))", "hierarchical(LogNormal(loc=-2, scale=1), per=input)"),
        ("hierarchical(half_normal(0.5))", "hierarchical(HalfNormal(scale=0.5), per=layer)"),
        ("horseshoe(0.1)", "horseshoe(scale=0.1, slab=none, per=weight)"),
        ("regularized_horseshoe(0.1, 2)", "horseshoe(scale=0.1, slab=2, per=weight)"),
    ],
)
def test_a_configuration_names_them(text, words):
    mapped = bayesian(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), parse_prior({"0.*": text, "*": "normal(0, 1)"}))
    assert priors_of(mapped) == {"0.weight": words, "1.weight": "Normal(loc=0, scale=1)"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ard(half_couchy(1))", r"hyper-prior 'half_couchy\(1\)' is not understood; write one of half_cauchy\(scale\)"),
        ("ard(gamma(1))", r"hyper-prior 'gamma\(1\)' has 1 arguments; write gamma\(concentration, rate\)"),
        ("hierarchical(-1)", r"is outside its family's range"),
        ("horseshoe(0.1, 2)", r"has 2 arguments; write horseshoe\(scale\)"),
        ("learnt_normal(0)", "is outside its family's range"),
        ("learnt_normal(half_cauchy(1))", "is not understood"),
        ("ard(half_cauchy(0))", r"hyper-prior 'half_cauchy\(0\)' is outside its family's range"),
    ],
)
def test_a_configuration_that_is_wrong_is_refused_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse_prior(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hierarchical(dist.Normal(0.0, 1.0)), "a hyper-prior of a scale is one distribution over the positive"),
        (lambda: hierarchical(dist.HalfCauchy(torch.ones(3))), r"of shape \[3\]"),
        (lambda: horseshoe(-1.0), "scale must be positive and finite, got -1.0"),
        (lambda: horseshoe(1.0, slab=0.0), "slab must be positive and finite, got 0.0"),
        (lambda: ard(0), "scale must be positive and finite, got 0"),
        (lambda: hierarchical(per="row"), "per must be one of layer, input, unit, weight; got 'row'"),
        (lambda: pretrained_prior(nn.Linear(3, 2), 0.0), "scale must be positive"),
        (
            lambda: bayesian(nn.Linear(3, 3), pretrained_prior(nn.Linear(3, 2), 0.1)),
            r"needs weights of shape \[3, 3\] for site 'weight', got \[2, 3\]",
        ),
        (
            lambda: bayesian(nn.Sequential(nn.Linear(3, 3)), pretrained_prior(nn.Linear(3, 3), 0.1)),
            r"for site '0.weight', got none",
        ),
    ],
)
def test_what_is_no_such_prior_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("as_state", [False, True])
def test_the_weights_of_a_trained_network_are_a_priors_mean(as_state):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    source = net.state_dict() if as_state else net
    model = Classifier(bayesian(net, pretrained_prior(source, 0.05), bayesian_bias=True), 10)
    trained = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        net[0].weight.zero_()
    priors = site_priors(model, torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))
    assert priors.keys() == trained.keys()
    for site, prior in priors.items():
        torch.testing.assert_close(prior.base_dist.mean, trained[site])
        assert (prior.base_dist.stddev == 0.05).all()
