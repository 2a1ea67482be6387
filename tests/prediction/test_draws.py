"""Coherent draws: one network each, also in compact form, and the same at once, later and on several ranks."""

import pytest
import torch
from ranks import Ranks
from small_posteriors import Branches, Residual, X, Y, by_pyro, convolutional, dense

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, predict, prune
from ppl_bnn.errors import Interrupted
from ppl_bnn.prediction import draws
from ppl_bnn.prediction.draws import coherent
from ppl_bnn.prediction.plain import plain
from ppl_bnn.prediction.predictive import draw_outputs


@pytest.mark.parametrize("make", [dense, convolutional, "residual", "untraceable"])
def test_a_coherent_draw_is_the_guides_function(make):
    if callable(make):
        net, guide, x = (*make(), X)[:3]
    else:
        net, x = bayesian({"residual": Residual, "untraceable": Branches}[make]()).eval(), X
        guide = MeanFieldNormal(Classifier(net, 30), x[:1], Y[:1])
    found = draw_outputs(net, guide, x, num_samples=3, seed=4, batch_size=4)
    for logits, expected in zip(found, by_pyro(net, guide, x, 3, seed=4), strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    blocks = coherent(net, guide, x, seed=4)
    torch.testing.assert_close(blocks.logits(2, 1.0)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: (*dense(bayesian_bias=True), X), convolutional])
def test_a_pruned_guides_draws_are_the_same_in_its_compact_network(make):
    net, guide, x = make()
    pruned, network = prune(guide, fraction=0.7).guide, plain(net)
    small = draws.compact_network(network, pruned, x, 4, "yes")
    blocks = coherent(net, pruned, x, seed=4, batch_size=4, network=network, small=small)
    for index, expected in enumerate(by_pyro(net, pruned, x, 4, seed=4)):
        torch.testing.assert_close(blocks.logits(index, 1.0)[0], expected, rtol=1e-4, atol=1e-5)
    mirrored = coherent(net, pruned, x, seed=4, batch_size=4)
    for index in range(2):
        torch.testing.assert_close(mirrored.logits(index, -1.0), blocks.logits(index, -1.0), rtol=1e-4, atol=1e-5)
    assert draws.compact_network(network, guide, x, 4, "auto") is None


@pytest.mark.parametrize("sampling", ["independent", "antithetic"])
@pytest.mark.parametrize("method", ["draws", "layerwise"])
@pytest.mark.parametrize("tolerance", [None, 0.05])
def test_more_draws_later_are_those_made_at_once(method, sampling, tolerance):
    net, guide = dense()
    options = {"method": method, "sampling": sampling, "tolerance": tolerance, "progress": False}
    once = predict(net, guide, X, Y, num_samples=230, **options)
    parts = None
    for count in (30, 100, 230):
        parts = predict(net, guide, X, Y, num_samples=count, so_far=parts, **options)
    assert_same(once, parts)


def assert_same(one, other):
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(-1.0), getattr(other, name).nan_to_num(-1.0)), name


def test_a_stopped_prediction_saves_what_it_has():
    net, guide = dense()
    saved, asked = [], iter([False] * 6 + [True])
    with pytest.raises(Interrupted, match="after draw 7 of 20"):
        predict(net, guide, X, Y, num_samples=20, progress=False, should_stop=lambda: next(asked), save=saved.append)
    assert [len(one.log_likelihood) for one in saved] == [7]
    rest = predict(net, guide, X, Y, num_samples=20, progress=False, so_far=saved[0])
    assert_same(rest, predict(net, guide, X, Y, num_samples=20, progress=False))


def on_a_rank(communicator, method, tolerance):
    torch.manual_seed(0)
    net, guide = dense()
    options = {"method": method, "tolerance": tolerance, "progress": False, "communicator": communicator}
    before = predict(net, guide, X, Y, num_samples=61, **options)
    found = predict(net, guide, X, Y, num_samples=151, so_far=before if communicator.is_main else None, **options)
    parts = {name: value for name, value in vars(found).items() if isinstance(value, torch.Tensor)}
    return parts | {"mean_probs": found.mean_probs, "mean_entropy": found.mean_entropy, "probs": found.probs}


@pytest.mark.parametrize(("method", "tolerance"), [("draws", None), ("layerwise", None), ("draws", 0.05)])
def test_ranks_share_the_draws_out(tmp_path, method, tolerance):
    first, second = Ranks(tmp_path, 2, on_a_rank, method, tolerance).results()
    net, guide = dense()
    alone = predict(net, guide, X, Y, num_samples=151, method=method, tolerance=tolerance, progress=False)
    for name, value in first.items():
        assert torch.equal(value.nan_to_num(-1.0), getattr(alone, name).nan_to_num(-1.0)), name
    assert torch.equal(second["mean_probs"], first["mean_probs"])
    assert second["probs"].shape == (151, 0, 3)
