"""A predictor answers small requests as predict does."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_posteriors import X, convolutional, dense

from ppl_bnn import predict, predictor, prune


@pytest.mark.parametrize("sampling", ["independent", "antithetic", "sobol"])
@pytest.mark.parametrize("count", [1, 30])
def test_a_predictor_answers_as_predict_does(sampling, count):
    net, guide = dense()
    answer = predictor(net, guide, X[:count], num_samples=50, seed=3, sampling=sampling)
    for x in (X[:count], X[-count:], X[:count]):
        probs, entropy = answer(x)
        expected = predict(
            net, guide, x, torch.zeros(len(x)).long(), num_samples=50, seed=3, sampling=sampling, progress=False
        )
        torch.testing.assert_close(probs.double(), expected.mean_probs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(entropy.double(), expected.mean_entropy, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="1 examples have NaN"):
        answer(X[:count].index_fill(0, torch.tensor([0]), math.nan))


@pytest.mark.parametrize("sparse", [True, False])
def test_a_predictor_of_a_pruned_posterior_draws_from_its_compact_network(sparse, monkeypatch):
    monkeypatch.setattr("ppl_bnn.prediction.compact.layerwise.sparse_pays", lambda *run: sparse)
    net, guide = dense()
    pruned = prune(guide, fraction=0.7).guide
    draws = 20_000
    answer = predictor(net, pruned, X[:2], num_samples=draws, seed=3)
    for x in (X[:2], X[-1:], X[:2]):
        expected = predict(net, pruned, x, torch.zeros(len(x)).long(), num_samples=draws, seed=4, progress=False)
        probs, entropy = answer(x)
        error = expected.averages["spread"].div(draws / 2).sqrt()
        assert ((probs - expected.mean_probs).abs() < 4.5 * error + 1e-6).all()
        assert not torch.equal(probs.double(), expected.mean_probs)
        torch.testing.assert_close(entropy.double(), expected.mean_entropy, rtol=0.02, atol=1e-3)
    assert torch.equal(answer(X[:2])[0], answer(X[:2])[0])


@pytest.mark.parametrize("method", ["layerwise", "draws"])
def test_a_predictor_keeps_the_posterior_it_was_made_of(method):
    net, guide, x = (*dense(), X[:2]) if method == "layerwise" else convolutional()
    answer = predictor(net, guide, x, num_samples=20)
    before = answer(x)[0]
    with torch.no_grad():
        for value in (*guide.parameters(), *net.parameters()):
            value.add_(0.5)
    assert torch.equal(answer(x)[0], before)


def test_threads_do_not_get_each_others_draws():
    net, guide, x = convolutional()
    # More rows than noise is kept for, and many draws that others may write over.
    answer = predictor(net, guide, x, num_samples=300)
    expected = answer(x)[0]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: answer(x)[0], range(8)):
            assert torch.equal(found, expected)


def test_a_request_without_examples_is_refused():
    answer = predictor(*dense(), X[:2], num_samples=5)
    with pytest.raises(ValueError, match="at least 1 example"):
        answer(X[:0])
