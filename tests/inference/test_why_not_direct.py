"""What needs Pyro's messages in a training step trains with them, and the log says why."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from small_training import X, Y, settings, small
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, Model, bayesian, fit, prune
from ppl_bnn.errors import UserError
from ppl_bnn.inference.direct import DirectELBO, why_not_direct
from ppl_bnn.models.likelihoods import Normal

HOW = {"num_particles": 1, "params": {}, "observed": ["y"]}


def model_with(likelihood=None, prior=None):
    net = bayesian(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), prior)
    if likelihood is None:
        return Classifier(net, len(X))
    return Model(nn.Sequential(net, nn.Linear(2, 1), nn.Flatten(0)), likelihood, len(X))


class Own(Classifier):
    def forward(self, x, y=None):
        return super().forward(2 * x, y)


def hyper(site, shape):
    return dist.Normal(0.0, pyro.sample("width", dist.HalfNormal(1.0)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: model_with(Normal(dist.HalfNormal(1.0))), "noise_scale"),
        (lambda: model_with(prior=hyper), "width"),
        (lambda: Own(bayesian(nn.Linear(6, 2)), len(X)), "Own"),
    ],
)
def test_what_needs_pyro_says_why_and_trains(make, words):
    model = make()
    y = Y.float() if isinstance(model.likelihood, Normal) else Y
    guide = MeanFieldNormal(model, X[:2], y[:2])
    assert words in why_not_direct(model, guide, **HOW)
    history = fit(model, guide, X, y, **settings(epochs=2, estimator="plain"))
    assert history[1]["loss"] < history[0]["loss"]


def test_handlers_pruned_guides_and_several_draws_need_pyro():
    model, guide = small()
    assert not why_not_direct(model, guide, **HOW)
    assert "draws" in why_not_direct(model, guide, **{**HOW, "num_particles": 2})
    assert "pyro.param" in why_not_direct(model, guide, **{**HOW, "params": {"a": torch.ones(1)}})
    assert "pruned" in why_not_direct(model, prune(guide, fraction=0.5).guide, **HOW)
    assert "sites" in why_not_direct(model, guide, **{**HOW, "observed": ["y", "z"]})
    guide.forward = guide.forward
    assert "MeanFieldNormal" in why_not_direct(model, guide, **HOW)
    del guide.forward
    handle = model.register_forward_pre_hook(lambda module, inputs: None)
    assert "Classifier" in why_not_direct(model, guide, **HOW)
    handle.remove()
    hook = guide.loc.get_parameter("0.weight").register_hook(lambda gradient: None)
    assert "hook" in why_not_direct(model, guide, **HOW)
    hook.remove()
    with poutine.trace():
        assert "TraceMessenger" in why_not_direct(model, guide, **HOW)


def test_a_handler_around_fit_sees_every_site():
    class Seen(Messenger):
        def _pyro_post_sample(self, msg):
            names.append(msg["name"])

    names, (model, guide) = [], small()
    with Seen():
        fit(model, guide, X, Y, **settings(epochs=1))
    # In the two looks at the door too.
    assert names.count("y") >= 7
    assert names.count("2.weight") >= 2 * 7


def test_no_message_is_sent_in_a_step(monkeypatch):
    model, guide = small()
    sent = []
    original = pyro.poutine.runtime.apply_stack
    monkeypatch.setattr(pyro.poutine.runtime, "apply_stack", lambda msg: sent.append(msg["name"]) or original(msg))
    elbo = DirectELBO(model, guide, len(X))
    elbo.completed(elbo.add(X, Y, kl_weight=1.0), 1.0)
    assert sent == []


class Observing(nn.Module):
    """A network that observes something of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, x):
        outputs = self.linear(x)
        with pyro.plate("own", len(X), subsample=x):
            pyro.factor("small", -outputs.square().sum(-1))
        return outputs


def test_what_a_network_observes_counts():
    found = []
    for part in (1, 2):
        torch.manual_seed(0)
        model = Classifier(bayesian(Observing() if part == 1 else nn.Sequential(nn.Linear(6, 2))), len(X))
        guide = MeanFieldNormal(model, X[:2], Y[:2])
        found.append(fit(model, guide, X, Y, **settings(epochs=1, estimator="plain"))[0]["nll"])
    assert found[0] > found[1] + 0.01


@pytest.mark.parametrize("change", ["freeze", "move"])
def test_a_parameter_that_is_changed_in_a_callback_is_refused_by_name(change):
    model, guide = small()

    def stop():
        loc = guide.loc.get_parameter("2.weight")
        loc.requires_grad_(False) if change == "freeze" else guide.double().float()
        return False

    with pytest.raises(UserError, match="frozen, moved or converted"):
        fit(model, guide, X, Y, **settings(), should_stop=stop)


def test_a_compiled_network_stays_compiled():
    model, guide = small()
    kept = model.net._compiled_call_impl = model.net._call_impl
    fit(model, guide, X, Y, **settings(epochs=1, compile=True))
    assert model.net._compiled_call_impl is kept
