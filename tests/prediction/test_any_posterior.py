"""A posterior of twenty lines, with and without a bound on its draws, through everything that takes a posterior."""

import pytest
import torch
from small_posteriors import Residual, X, Y, by_pyro, dense
from torch import nn
from weight_clouds import Cloud, StoredCloud

from ppl_bnn import Images, MeanFieldNormal, bayesian, predict, predictor, prune, to_inference_data
from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Posterior
from ppl_bnn.prediction.log_density import train_log_likelihood
from ppl_bnn.prediction.onnx import export
from ppl_bnn.results.idata import load
from ppl_bnn.results.netcdf import save


def network():
    """With batch norm of negative and positive factors behind a random layer, which is folded into it."""
    torch.manual_seed(0)
    net = bayesian(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))).eval()
    net[1].running_mean.uniform_(-0.3, 0.3)
    net[1].running_var.uniform_(0.5, 2)
    net[1].weight.data[0] = -0.7
    return net, {"0.weight": torch.Size((8, 5)), "3.weight": torch.Size((3, 8))}


@pytest.fixture(params=["unbounded", "stored"])
def posterior(request):
    net, shapes = network()
    return net, Cloud(shapes) if request.param == "unbounded" else StoredCloud(shapes, 12)


def probs_by_pyro(net, posterior, x, count):
    return torch.stack(list(by_pyro(net, posterior, x, count))).softmax(-1)


@pytest.mark.parametrize("method", ["auto", "draws"])
@pytest.mark.parametrize("x", [X, X[:1]], ids=["30", "1"])
def test_it_predicts(posterior, method, x):
    net, cloud = posterior
    found = predict(net, cloud, x, Y[: len(x)], num_samples=12, method=method, progress=False)
    torch.testing.assert_close(found.probs, probs_by_pyro(net, cloud, x, 12), rtol=1e-4, atol=1e-5)
    assert (found.method, found.compact) == ("draws", False)
    assert 0 < found.uncertainties()[2].mean() < 1


def test_draws_are_added_and_shared_out(posterior):
    net, cloud = posterior
    once = predict(net, cloud, X, Y, num_samples=12, progress=False)
    some = predict(net, cloud, X, Y, num_samples=5, progress=False)
    assert torch.equal(
        predict(net, cloud, X, Y, num_samples=12, progress=False, so_far=some).mean_probs, once.mean_probs
    )


def test_its_own_batch_norm_statistics(posterior):
    net, cloud = posterior
    own = predict(net, cloud, X, Y, num_samples=3, norm_inputs=X[:20], progress=False)
    assert not torch.allclose(own.probs, predict(net, cloud, X, Y, num_samples=3, progress=False).probs, atol=1e-3)


def test_it_answers_requests(posterior):
    net, cloud = posterior
    probs, entropy = predictor(net, cloud, X[:2], num_samples=12)(X[:2])
    expected = probs_by_pyro(net, cloud, X[:2], 12)
    torch.testing.assert_close(probs, expected.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, torch.special.entr(expected).sum(-1).mean(0), rtol=1e-4, atol=1e-5)


def test_a_network_that_cannot_be_traced_predicts_too():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            return self.layer(x) if x.sum() < 1e9 else x

    net, cloud = bayesian(Branches()), Cloud({"layer.weight": torch.Size((3, 5))})
    found = predict(net, cloud, X, Y, num_samples=3, progress=False)
    torch.testing.assert_close(found.probs, probs_by_pyro(net, cloud, X, 3), rtol=1e-4, atol=1e-5)


def test_its_predictive_is_saved_without_signal_to_noise_ratios(posterior, tmp_path):
    net, cloud = posterior
    images = Images(torch.zeros(30, 1, 1, 5).byte(), Y, ("a", "b", "c"), "five numbers", "test")
    idata = to_inference_data(predict(net, cloud, X, Y, num_samples=6, progress=False), images, guide=cloud)
    save(idata, tmp_path / "cloud.nc")
    found = load(tmp_path / "cloud.nc")
    assert found.posterior_predictive["probs"].shape == (1, 6, 30, 3)
    assert "layers" not in (found.groups() if callable(found.groups) else found.groups)
    assert found.attrs["compact"] == "no"


def test_it_is_exported(posterior, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    net, cloud = posterior
    export(tmp_path / "cloud.onnx", net, cloud, X[:2], num_samples=3, each_draw=True)
    session = ort.InferenceSession(tmp_path / "cloud.onnx", providers=["CPUExecutionProvider"])
    mean, each = (torch.from_numpy(value) for value in session.run(None, {"x": X.numpy()}))
    expected = probs_by_pyro(net, cloud, X, 3)
    torch.testing.assert_close(each, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(mean, expected.mean(0), rtol=0, atol=1e-5)


def test_more_draws_than_are_stored_are_refused_before_any_work(tmp_path, monkeypatch):
    net, shapes = network()
    stored = StoredCloud(shapes, 12)
    monkeypatch.setattr(StoredCloud, "draw", lambda *arguments, **keywords: pytest.fail("a draw was made"))
    message = "num_samples is 13, and StoredCloud has 12 stored draws: take at most 12"
    with pytest.raises(UserError, match=message):
        predict(net, stored, X, Y, num_samples=13, progress=False)
    with pytest.raises(UserError, match=message):
        predictor(net, stored, X, num_samples=13)
    pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match=message):
        export(tmp_path / "x.onnx", net, stored, X, num_samples=13)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "layerwise"},
            "method layerwise needs a posterior with loc_scale; Cloud has none: use method draws",
        ),
        ({"method": "moments"}, "method moments needs a posterior with loc_scale; Cloud has none: use method draws"),
        ({"sampling": "antithetic"}, "sampling antithetic needs a posterior with .*; Cloud has none"),
        ({"sampling": "sobol"}, "sampling sobol needs a posterior with loc_scale"),
        ({"compact": "yes"}, "compact 'yes' needs a posterior with loc_scale"),
        ({"compact": "perhaps"}, "compact must be one of auto, yes, no; got 'perhaps'"),
    ],
)
def test_what_needs_a_capability_says_so(settings, message):
    net, shapes = network()
    with pytest.raises(UserError, match=message):
        predict(net, Cloud(shapes), X, Y, num_samples=4, progress=False, **settings)


def test_pruning_and_densities_say_what_they_need():
    from ppl_bnn import Classifier

    net, shapes = network()
    with pytest.raises(UserError, match="pruning needs a posterior with loc_scale; Cloud has none"):
        prune(Cloud(shapes), fraction=0.5)
    with pytest.raises(UserError, match="the training log likelihood needs a posterior with log_prob; Cloud has none"):
        train_log_likelihood(Classifier(net, 30), Cloud(shapes), X, Y, progress=False)


class DrawsAlone:
    """Another posterior's draws, and none of its capabilities."""

    def __init__(self, guide):
        self.guide, self.sites = guide, guide.sites

    def draw(self, index, *, seed=0):
        return self.guide.draw(index, seed=seed)


@pytest.mark.parametrize("make", [dense, "residual", "batch norm"])
def test_draws_are_the_same_with_and_without_noise(make):
    if callable(make):
        net, guide = make()
    else:
        net = bayesian(Residual()).eval() if make == "residual" else network()[0]
        guide = MeanFieldNormal(net, X[:1], init_scale=0.4)
    assert isinstance(DrawsAlone(guide), Posterior)
    by_noise, by_draw = (
        predict(net, one, X, Y, num_samples=6, seed=2, method="draws", progress=False).probs
        for one in (guide, DrawsAlone(guide))
    )
    torch.testing.assert_close(by_noise, by_draw, rtol=1e-4, atol=1e-6)
