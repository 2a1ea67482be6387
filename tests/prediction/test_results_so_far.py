"""Earlier draws, kept positions and requests of another shape are checked before they are used."""

import pytest
import torch
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, predict, predictor, prune

X, Y = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def network(*layers, x=X):
    net = bayesian(nn.Sequential(*(layers or (nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))))
    return net, MeanFieldNormal(Classifier(net, 12), x[:1], Y[:1])


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"method": "layerwise"}, {"method": "draws"}, "so_far has method 'layerwise', and this call 'draws'"),
        ({"method": "moments"}, {"method": "draws"}, "so_far has method 'moments'"),
        ({}, {"sampling": "antithetic"}, "so_far has sampling 'independent', and this call 'antithetic'"),
        ({"y": (Y + 1) % 3}, {}, "so_far has other labels, or keeps other examples"),
        ({"keep": torch.arange(3)}, {}, "so_far has other labels, or keeps other examples"),
    ],
)
def test_draws_that_were_made_otherwise_are_not_added_to(before, after, message):
    net, guide = network()
    usual = {"y": Y, "method": "draws", "progress": False}
    found = predict(net, guide, X, num_samples=4, **{**usual, **before})
    with pytest.raises(ValueError, match=message):
        predict(net, guide, X, num_samples=8, so_far=found, **{**usual, **after})


def test_examples_to_keep_are_positions_or_a_mask():
    net, guide = network()
    whole = predict(net, guide, X, Y, num_samples=3, progress=False)
    mask = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor([2, 7]), True)
    for keep in (mask, [2, 7], torch.tensor([2, 7])):
        found = predict(net, guide, X, Y, num_samples=3, keep=keep, progress=False)
        assert found.kept.tolist() == [2, 7]
        torch.testing.assert_close(found.probs, whole.probs[:, [2, 7]], rtol=0, atol=0)
    for keep in ([12], [-1], [0.5], mask[:5], torch.tensor([[1]])):
        with pytest.raises(ValueError, match="keep must be positions"):
            predict(net, guide, X, Y, num_samples=3, keep=keep, progress=False)


@pytest.mark.parametrize("width", [1, 3, 100])
def test_a_predictor_of_a_pruned_posterior_refuses_requests_of_another_shape(width):
    x = torch.rand(12, 64)
    net, guide = network(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 3), x=x)
    answer = predictor(net, prune(guide, fraction=0.97).guide, x, num_samples=10)
    answer(x[:2])
    with pytest.raises(ValueError, match=rf"made for inputs \[64\], got \[{width}\]"):
        answer(torch.rand(2, width))


@pytest.mark.parametrize("method", ["draws", "layerwise", "moments"])
def test_batch_norm_over_another_dimension_is_refused_by_every_method(method):
    x = torch.rand(12, 4, 8)
    net, guide = network(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3), x=x)
    with pytest.raises(ValueError, match="batch norm"):
        predict(net, guide, x, Y, num_samples=3, method=method, progress=False)


def test_counts_and_seeds_that_are_none_are_refused():
    net, guide = network()
    for wrong in ({"num_samples": 4.0}, {"seed": -1}, {"seed": 0.5}):
        with pytest.raises(ValueError, match="whole"):
            predict(net, guide, X, Y, progress=False, **{"num_samples": 3, **wrong})
    with pytest.raises(ValueError, match="a threshold must be a number"):
        prune(guide, threshold="ten")


def test_a_default_device_does_not_reach_into_noise_of_a_cpu():
    net, guide = network()
    expected = predict(net, guide, X, Y, num_samples=3, progress=False).mean_probs
    with torch.device("meta"):
        torch.testing.assert_close(guide.draw(0)["0.weight"].mean().isnan(), torch.tensor(False, device="cpu"))
    torch.testing.assert_close(predict(net, guide, X, Y, num_samples=3, progress=False).mean_probs, expected)
