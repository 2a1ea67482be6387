"""Layerwise draws: the distribution of weight draws for each example, and when they are chosen."""

import math

import pytest
import torch
from small_posteriors import Branches, X, Y, by_pyro, convolutional, dense, residual
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, build, predict
from ppl_bnn.prediction.layerwise import layerwise
from ppl_bnn.prediction.methods import Prepared, cheapest, prepared_network
from ppl_bnn.prediction.plain import plain
from ppl_bnn.prediction.predictive import draw_outputs


@pytest.mark.parametrize(
    "make", [dense, lambda: dense(bayesian_bias=True), convolutional, residual], ids=["fc", "bias", "conv", "residual"]
)
def test_layerwise_has_the_same_distribution_for_each_example(make):
    net, guide, x = (*make(), X)[:3]
    count = 1500
    probs = [
        torch.stack(list(draw_outputs(net, guide, x, num_samples=count, method=method))).softmax(-1).double()
        for method in ("draws", "layerwise")
    ]
    for of in (lambda p: p, torch.square, lambda p: (p > 0.5).double(), lambda p: p * p.roll(1, -1)):
        ours, other = (of(p) for p in probs)
        error = ((ours.var(0) + other.var(0)) / count).sqrt() + 1e-4
        z = (ours.mean(0) - other.mean(0)) / error
        # 90 correlated numbers: |z| above 4.5 has a probability of 0.0006 in all.
        assert z.abs().max() < 4.5


def test_layerwise_examples_are_drawn_apart():
    net, guide = dense()
    logits = torch.stack(list(draw_outputs(net, guide, X[:1].expand(2, 5), num_samples=2000, method="layerwise")))
    correlation = torch.corrcoef(logits[:, :, 0].T)[0, 1]
    assert abs(correlation) < 4 / math.sqrt(2000)


def test_layerwise_draws_depend_on_seed_and_block_alone():
    net, guide = dense()
    blocks = layerwise(net, guide, X, seed=1)
    assert blocks.size > 1
    late, early = blocks.logits(3, 1.0), blocks.logits(0, 1.0)
    assert torch.equal(early, layerwise(net, guide, X, seed=1).logits(0, 1.0))
    assert not torch.equal(early, late)
    assert not torch.equal(early, layerwise(net, guide, X, seed=2).logits(0, 1.0))


def test_a_dense_layer_that_sees_parts_of_an_example_is_not_drawn_layerwise():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.last = nn.Linear(5, 4), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.part(x.view(-1, 5)).view(-1, 8))

    x = torch.randn(4, 2, 5)
    net = bayesian(Parts())
    guide = MeanFieldNormal(Classifier(net, 4), x[:1], Y[:1], init_scale=0.5)
    # One weight draw for both parts: with equal parts the two halves of the hidden layer are equal too.
    x[:, 1] = x[:, 0]
    draws = torch.stack(list(draw_outputs(net, guide, x, num_samples=1000, method="layerwise")))
    expected = torch.stack(list(by_pyro(net, guide, x, 3000, seed=1)))
    torch.testing.assert_close(draws.std(0), expected.std(0), rtol=0.12, atol=0)


def test_the_method_is_chosen_by_random_numbers():
    net, guide = dense()
    # 64 weights, 11 units.
    assert [cheapest(plain(net), guide, X[:count]) for count in (1, 5, 6)] == ["layerwise", "layerwise", "draws"]
    net = bayesian(Branches())
    guide = MeanFieldNormal(Classifier(net, 30), X[:1], Y[:1])
    assert prepared_network(net, guide, X[:1], "auto", "independent", None) == Prepared(None, "draws")
    with pytest.raises(ValueError, match=r"layerwise needs a traced network.*use the method draws"):
        predict(net, guide, X, Y, method="layerwise", progress=False)
    net = bayesian(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten()))
    x = torch.rand(2, 1, 3, 3)
    guide = MeanFieldNormal(Classifier(net, 2), x, Y[:2])
    with pytest.raises(ValueError, match="layerwise needs a dense random layer"):
        predict(net, guide, x, Y[:2], method="layerwise", progress=False)


@pytest.mark.parametrize("name", ["lenet", "bnn-fc", "resnet18"])
def test_the_networks_predict_by_either_method(name):
    shape = (3, 32, 32) if name == "resnet18" else (1, 28, 28)
    net, x = build(name).eval(), torch.rand(2, *shape)
    guide = MeanFieldNormal(Classifier(net, 2), x, Y[:2], init_loc="he", init_scale=0.01)
    for method in ("draws", "layerwise"):
        found = predict(net, guide, x, Y[:2], num_samples=2, method=method, progress=False)
        assert found.probs.isfinite().all()
        assert found.method == method
