"""The manifest: every tensor of a checkpoint, once, in the order of the model's modules."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from small_training import X, Y, settings, small
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, fit, prune
from ppl_bnn.inference import checkpoint
from ppl_bnn.inference.manifest import manifest
from ppl_bnn.models.random_network import point_state


def tensors_named(entries):
    return [
        tensor
        for entry in entries
        for tensor in entry.values()
        if str(tensor).startswith(("model.", "guide.", "params."))
    ]


def in_checkpoint(folder):
    found = checkpoint.load(checkpoint.find(folder / "checkpoints")).tensors
    return {name for name in found if name.startswith(("model.", "guide.", "params."))}


def written_by_fit(model, guide, folder, **changes):
    fit(model, guide, X, Y, **settings(epochs=1, **changes), folder=folder)
    content = json.loads((folder / "manifest.json").read_text())
    named = tensors_named(content["parameters"])
    assert len(named) == len(set(named))
    assert set(named) == in_checkpoint(folder)
    return content


def test_fit_writes_bayesian_layers_and_point_estimates_in_one_order(tmp_path):
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model = Classifier(bayesian(net, dist.Normal(0.0, 0.5)), len(X))
    content = written_by_fit(model, MeanFieldNormal(model, X[:2], Y[:2]), tmp_path)
    assert [(entry["name"], entry["kind"]) for entry in content["parameters"]] == [
        ("0.weight", "random"),
        ("net.0.bias", "point estimate"),
        ("net.1.weight", "point estimate"),
        ("net.1.bias", "point estimate"),
        ("net.1.running_mean", "buffer"),
        ("net.1.running_var", "buffer"),
        ("net.1.num_batches_tracked", "buffer"),
        ("3.weight", "random"),
        ("net.3.bias", "point estimate"),
    ]
    first = content["parameters"][0]
    assert first == {
        "name": "0.weight", "kind": "random", "shape": [8, 6], "weights": 48, "prior": "Normal(loc=0, scale=0.5)",
        "loc": "guide.loc.0.weight", "unconstrained_scale": "guide.unconstrained_scale.0.weight",
    }  # fmt: skip
    # As it always was, beside it.
    assert [layer["site"] for layer in content["layers"]] == ["0.weight", "3.weight"]
    assert content["weights"] == 64
    assert content["point_estimates"]["model.net.3.bias"] == [2]


def test_a_pruned_guide_names_its_masks(tmp_path):
    model, guide = small()
    pruned = prune(guide, fraction=0.5).guide
    content = manifest(model, pruned)
    assert content["parameters"][0]["keep"] == "guide.keep.0.weight"
    assert set(tensors_named(content["parameters"])) == {
        *(f"model.{name}" for name in point_state(model)), *(f"guide.{name}" for name in pruned.state_dict()),
    }  # fmt: skip


class Regression(PyroModule):
    """A user's own Pyro model: a random layer, a layer that is none, and a latent noise scale of no module."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 3)
        self.head = PyroModule[nn.Linear](3, 1)
        self.head.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))

    def forward(self, x, y=None):
        noise = pyro.sample("log_noise", dist.Normal(0.0, 1.0))
        mean = self.head(torch.tanh(self.body(x))).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, noise.exp()), obs=y)


def test_a_pyro_model_of_the_users_own(tmp_path):
    model = Regression()
    y = X.sum(1)
    guide = MeanFieldNormal(model, X[:2], y[:2])
    fit(model, guide, X, y, **settings(epochs=1, batch_size=50), folder=tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert [entry["name"] for entry in content["parameters"]] == [
        "body.weight", "body.bias", "head.weight", "head.bias", "log_noise",
    ]  # fmt: skip
    assert set(tensors_named(content["parameters"])) == in_checkpoint(tmp_path)


def test_other_guides_and_values_of_pyro_param_are_named_too(tmp_path):
    model, _ = small()
    content = written_by_fit(model, AutoNormal(model), tmp_path / "auto", estimator="plain")
    assert content["layers"] == []
    kinds = {entry["kind"] for entry in content["parameters"]}
    assert kinds == {"point estimate", "guide"}

    def guide(x, y=None):
        for site, shape in (("0.weight", (8, 6)), ("2.weight", (2, 8))):
            loc = pyro.param(f"{site} loc", torch.zeros(shape))
            pyro.sample(site, dist.Normal(loc, 0.1).to_event(2))

    model, _ = small()
    content = written_by_fit(model, guide, tmp_path / "function", estimator="plain")
    assert content["parameters"][-1] == {
        "name": "2.weight loc", "kind": "pyro.param", "shape": [2, 8], "tensor": "params.2.weight loc",
    }  # fmt: skip


def test_a_training_that_is_refused_leaves_the_manifest(tmp_path):
    fit(*small(), X, Y, **settings(epochs=1), folder=tmp_path)
    (tmp_path / "manifest.json").write_text("as it was")
    with pytest.raises(ValueError, match="holds a training with lr"):
        fit(*small(), X, Y, **settings(epochs=1, lr=0.5), folder=tmp_path)
    assert (tmp_path / "manifest.json").read_text() == "as it was"
