"""Whether draws go through a compact network is decided from counts, before the first draw, and recorded."""

import copy
import time

import pytest
import torch
from small_posteriors import X, Y, dense
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, predict, predictor, prune
from ppl_bnn.errors import UserError
from ppl_bnn.prediction.compact.forms import choose_layers, uses_of
from ppl_bnn.prediction.compact.network import compact
from ppl_bnn.prediction.draws import compact_network
from ppl_bnn.prediction.plain import plain


def wide(fraction):
    torch.manual_seed(0)
    net = bayesian(nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 10)))
    x, y = torch.rand(300, 100), torch.arange(300) % 10
    guide = MeanFieldNormal(Classifier(net, 300), x[:1], y[:1], init_loc="he", init_scale=0.1)
    return net, prune(guide, fraction=fraction).guide if fraction else guide, x, y


@pytest.mark.parametrize(("fraction", "small"), [(0.0, False), (0.2, False), (0.9, True)])
def test_auto_takes_the_smaller_network_where_it_costs_less(fraction, small):
    net, guide, x, y = wide(fraction)
    found = predict(net, guide, x, y, num_samples=4, method="draws", progress=False)
    assert found.compact == small
    plainly = predict(net, guide, x, y, num_samples=4, method="draws", compact="no", progress=False)
    forced = predict(net, guide, x, y, num_samples=4, compact="yes", progress=False)
    assert (plainly.compact, forced.compact) == (False, True)
    torch.testing.assert_close(plainly.probs, forced.probs, rtol=1e-4, atol=1e-6)
    # A single example meets each weight once: writing the weights would cost more than they do.
    assert compact_network(plain(net), guide, x[:1], None, "auto") is None


def test_the_same_seed_gives_the_same_bits_whatever_the_load(monkeypatch):
    net, guide, x, y = wide(0.95)
    settings = {"num_samples": 6, "method": "draws", "progress": False}
    expected = predict(net, guide, x, y, **settings)
    clock = time.perf_counter
    # A machine on which everything takes a thousand times as long.
    monkeypatch.setattr(time, "perf_counter", lambda: 1000 * clock())
    slow = predict(net, guide, x, y, **settings)
    later = predict(net, guide, x, y, **settings, so_far=predict(net, guide, x, y, **settings | {"num_samples": 2}))
    for found in (slow, later):
        assert torch.equal(found.probs, expected.probs)
        assert torch.equal(found.mean_probs, expected.mean_probs)


def test_layers_are_chosen_by_their_zeros_and_the_batch():
    net, guide, _, _ = wide(0.9)
    small = compact(plain(net), guide)
    assert set(choose_layers(copy.deepcopy(small), 300).values()) == {"sparse"}
    assert set(choose_layers(copy.deepcopy(small), 1).values()) == {"dense"}
    net, guide, _, _ = wide(0.3)
    assert set(choose_layers(compact(plain(net), guide), 300).values()) == {"dense"}


def test_a_convolution_meets_its_weights_at_every_place():
    net = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.Flatten(), nn.Linear(3 * 9, 2)).eval()
    assert uses_of(plain(net).net, ["0", "2"], torch.rand(1, 1, 7, 7)) == {"0": 9, "2": 1}


def test_a_weight_that_is_certain_and_not_zero_stays():
    """A posterior may fix a weight at a value: only loc 0 and scale 0 together are a pruned one."""
    net, guide = dense()

    class Certain:
        sites = guide.sites

        def loc_scale(self, site):
            loc, scale = guide.loc_scale(site)
            return loc.detach().index_fill(0, torch.tensor([1]), 0.0), torch.zeros_like(scale)

        def draw(self, index, *, seed=0):
            return {site: self.loc_scale(site)[0] for site in self.sites}

    found = [predict(net, Certain(), X, Y, num_samples=1, compact=how, progress=False).probs for how in ("no", "yes")]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_predictor_may_keep_to_the_draws_of_predict():
    net, guide, x, y = wide(0.95)
    answer = predictor(net, guide, x[:1], num_samples=20, seed=1, compact="no")
    expected = predict(net, guide, x[:1], y[:1], num_samples=20, seed=1, compact="no", progress=False)
    assert expected.method == "layerwise"
    torch.testing.assert_close(answer(x[:1])[0].double(), expected.mean_probs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "layerwise"}, "compact 'yes' is for the method draws, not layerwise"),
        ({"method": "moments"}, "compact 'yes' is for the method draws, not moments"),
    ],
)
def test_a_compact_network_is_refused_where_there_are_no_draws_of_weights(settings, message):
    net, guide, x, y = wide(0.5)
    with pytest.raises(UserError, match=message):
        predict(net, guide, x, y, num_samples=2, compact="yes", progress=False, **settings)
