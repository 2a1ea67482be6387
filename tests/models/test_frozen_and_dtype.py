"""Conversion, guide and training keep what is frozen, each module's mode, and the network's dtype."""

import copy

import pyro
import pytest
import torch
from converted_networks import X, Y, sites, trained
from torch import nn

from ppl_bnn import Classifier, GaussianScaleMixture, KLScaledELBO, MeanFieldNormal, bayesian, predict
from ppl_bnn.models import layer_table, parse_prior, site_priors


def backbone_and_head():
    """A frozen backbone with a layer of a kind that cannot be converted, and a head to train."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
            self.cell, self.scale = nn.GRUCell(6, 6), nn.Parameter(torch.ones(6))
            self.hidden, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.hidden(self.cell(self.backbone(x)) * self.scale))

    net = Net()
    for part in (net.backbone, net.cell, net.scale, net.head.bias):
        part.requires_grad_(False)
    return net


def frozen(net):
    return {name: value.clone() for name, value in net.named_parameters() if not value.requires_grad}


@pytest.mark.parametrize("method", ["draws", "layerwise", "moments"])
def test_a_frozen_layer_predicts_with_its_own_weights(method):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    net[0].requires_grad_(False)
    bnn = bayesian(net)
    assert sites(bnn) == ["2.weight"]
    assert [row.kind for row in layer_table(bnn, X)] == ["Linear", "ReLU", "BayesianLinear"]
    guide = MeanFieldNormal(bnn, X, init_loc=net.state_dict(), init_scale=1e-6, init_jitter=0.0)
    found = predict(bnn, guide, X, Y, num_samples=3, method=method, progress=False)
    torch.testing.assert_close(torch.as_tensor(found.probs)[0], net(X).softmax(-1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_what_is_frozen_stays_frozen(optimizer):
    original = backbone_and_head()
    before = frozen(original)
    net = bayesian(original)
    # Random parameters are not trained: their posterior's are.
    assert frozen(net).keys() == before.keys() | {"hidden.weight", "head.weight"}
    assert sites(net) == ["hidden.weight", "head.weight"]
    net.hidden.bias.requires_grad_(False)
    before = frozen(net)
    for run in (lambda: net(X), lambda: copy.deepcopy(net)(X), lambda: trained(net, optimizer=optimizer)):
        run()
        found = frozen(net)
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], before[name]) for name in before)
    assert frozen(copy.deepcopy(net)).keys() == before.keys()


def test_pyros_own_training_leaves_frozen_parameters_frozen():
    net = bayesian(backbone_and_head())
    before = frozen(net)
    model = Classifier(net, 12)
    guide = MeanFieldNormal(model, X, Y)
    guide.loc.hidden.weight.requires_grad_(False)
    of_guide = frozen(guide)
    for _ in range(2):
        pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), KLScaledELBO(12)).step(X, Y)
    for module, was in ((net, before), (guide, of_guide)):
        assert frozen(module).keys() == was.keys()
        assert all(torch.equal(value, was[name]) for name, value in frozen(module).items())


def test_a_frozen_network_has_nothing_to_make_bayesian():
    with pytest.raises(ValueError, match="no parameter to make random, for all of it is frozen"):
        bayesian(nn.Sequential(nn.Linear(4, 3)).requires_grad_(False))


def test_modules_in_evaluation_mode_stay_so():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    net[0].eval()
    net[1].eval()
    modes = [module.training for module in net.modules()]
    bnn = bayesian(net)
    assert [module.training for module in bnn.modules()] == modes
    MeanFieldNormal(Classifier(bnn, 12), X, Y)
    assert [module.training for module in bnn.modules()] == modes


@pytest.fixture(params=[torch.float32, torch.float64], ids=["default-float32", "default-float64"])
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ["plain", "flipout", "groups", "local"])
def test_everything_follows_the_networks_dtype(default_dtype, dtype, estimator):
    priors = {"0.*": parse_prior("student_t(3, 0, 1)"), "2.*": GaussianScaleMixture(0.5, 1.0, 0.1)}
    net = bayesian(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype), priors)
    guide = trained(net, X.to(dtype), estimator=estimator)
    assert {parameter.dtype for module in (net, guide) for parameter in module.parameters()} == {dtype}
    assert {value.dtype for value in guide.draw(0).values()} == {dtype}
    assert {prior.sample().dtype for prior in site_priors(Classifier(net, 12), X.to(dtype), Y).values()} == {dtype}


def test_a_scale_mixture_keeps_the_digits_of_its_tensors():
    scale = torch.tensor(0.1, dtype=torch.float64)
    assert GaussianScaleMixture(0.5, scale, 0.01).scale1 == scale
