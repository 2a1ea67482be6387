import math

import pytest
import torch
from pyro import poutine
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, predict, prune, snr, sweep
from ppl_bnn.pruning import snr_histogram

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (20,), generator=torch.Generator().manual_seed(1))
WEIGHTS = 6 * 10 + 10 * 3


def small():
    net = bayesian(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)))
    return net, MeanFieldNormal(Classifier(net, 20), X[:1], Y[:1], init_loc=1.0, init_scale=0.5)


def test_snr_is_loc_over_scale():
    _, guide = small()
    loc, scale = guide.loc_scale("0.weight")
    torch.testing.assert_close(snr(guide)["0.weight"], loc.abs() / scale)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.8, 0.95])
def test_exactly_the_fraction_is_zero_in_every_draw(fraction, scope):
    _, guide = small()
    pruned = prune(guide, fraction=fraction, scope=scope)
    expected = round(fraction * WEIGHTS) if scope == "global" else round(fraction * 60) + round(fraction * 30)
    for index in range(20):
        draw = pruned.guide.draw(index)
        assert sum(int((weight == 0).sum()) for weight in draw.values()) == expected
    assert sum(pruned.nonzero.values()) == WEIGHTS - expected
    assert pruned.fraction == pytest.approx(expected / WEIGHTS)
    if scope == "layer":
        assert pruned.nonzero["2.weight"] == 30 - round(fraction * 30)


def test_ties_are_pruned_to_the_count():
    net = bayesian(nn.Linear(10, 10))
    guide = MeanFieldNormal(net, torch.zeros(1, 10), init_loc=lambda site, shape: torch.ones(shape), init_jitter=0.0)
    assert sum(prune(guide, fraction=0.3).nonzero.values()) == 70


def test_a_small_layer_may_lose_everything_to_rounding():
    net = bayesian(nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 1)))
    guide = MeanFieldNormal(net, X[:1])
    pruned = prune(guide, fraction=0.95, scope="layer")
    assert pruned.nonzero == {"0.weight": 3, "1.weight": 0}
    assert pruned.threshold > snr(guide)["1.weight"].max()
    assert (pruned.guide.draw(0)["1.weight"] == 0).all()


def test_the_weights_that_go_are_those_with_the_lowest_snr():
    _, guide = small()
    ratios = torch.cat([ratio.flatten() for ratio in snr(guide).values()])
    pruned = prune(guide, fraction=0.6)
    kept = torch.cat([pruned.guide.loc_scale(site)[0].flatten() != 0 for site in guide.sites])
    assert ratios[kept].min() >= ratios[~kept].max()
    assert pruned.threshold == pytest.approx(ratios[kept].min().item())


def test_a_threshold_prunes_what_is_below_it():
    _, guide = small()
    pruned = prune(guide, threshold=2.0)
    for site, ratio in snr(guide).items():
        assert pruned.nonzero[site] == int((ratio >= 2.0).sum())
    assert prune(guide, threshold=0.0).fraction == 0


def test_the_outputs_are_those_of_the_masked_network():
    net, guide = small()
    pruned = prune(guide, fraction=0.7)
    found = predict(net, pruned.guide, X, Y, num_samples=6, seed=3, progress=False)
    for index in range(6):
        whole = guide.draw(index, seed=3)
        masked = {site: weight * (pruned.guide.loc_scale(site)[0] != 0) for site, weight in whole.items()}
        with poutine.condition(data=masked), torch.no_grad():
            torch.testing.assert_close(found.probs[index], net(X).softmax(-1))


def test_a_pruned_weight_has_no_scale_left():
    """BPrune sets the unconstrained scale to 0, which is a scale of softplus(0) = 0.69: noise in place of a weight."""
    _, guide = small()
    pruned = prune(guide, fraction=0.5).guide
    with torch.no_grad():
        loc, scale = pruned.loc_scale("0.weight")
        gone = loc == 0
        assert gone.any()
        assert (scale[gone] == 0).all()
        for _ in range(5):
            sampled = poutine.trace(pruned).get_trace(X[:1], Y[:1]).nodes["0.weight"]["value"]
            assert (sampled[gone] == 0).all()


def test_an_unconstrained_scale_of_zero_is_noise_and_no_pruning():
    """What BPrune writes into a checkpoint: the weight keeps a scale of log 2, and the output its variance."""
    net, guide = small()
    pruned = prune(guide, fraction=0.9).guide
    mask = {site: pruned.loc_scale(site)[1] > 0 for site in guide.sites}
    with torch.no_grad():
        for site, keep in mask.items():
            for part in (guide.loc, guide.unconstrained_scale):
                part.get_parameter(site)[~keep] = 0.0
    gone = ~mask["0.weight"]
    theirs = torch.stack([guide.draw(index)["0.weight"][gone] for index in range(300)])
    ours = torch.stack([pruned.draw(index)["0.weight"][gone] for index in range(300)])
    # 300 draws of about 50 weights: the standard error of the standard deviation is below 0.005.
    assert theirs.std() == pytest.approx(math.log(2), abs=0.02)
    assert (ours == 0).all()
    spread = [predict(net, each, X, Y, num_samples=60, progress=False).probs.std(0).mean() for each in (guide, pruned)]
    assert spread[0] > 2 * spread[1]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_mask_of_any_type_prunes(dtype):
    _, guide = small()
    keep = {site: (torch.rand_like(guide.loc_scale(site)[0]) < 0.5) for site in guide.sites}
    pruned = guide.pruned({site: mask.to(dtype) for site, mask in keep.items()})
    assert all((value[~keep[site]] == 0).all() for site, value in pruned.draw(0).items())
    assert len(list(pruned.parameters())) == len(list(guide.parameters()))


def test_pruning_leaves_the_guide_as_it_was():
    _, guide = small()
    before = guide.draw(0)
    prune(guide, fraction=0.9)
    for site, weight in guide.draw(0).items():
        torch.testing.assert_close(weight, before[site], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"threshold": -1.0}, "at least 0 and finite; got -1.0"),
        ({"threshold": math.nan}, "at least 0"),
        ({"threshold": math.inf}, "finite"),
        ({"fraction": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"fraction": -0.1}, r"in \[0, 1\)"),
        ({}, "either a threshold or a fraction"),
        ({"threshold": 1.0, "fraction": 0.5}, "either a threshold or a fraction"),
        ({"fraction": 0.5, "scope": "filter"}, "scope must be one of global, layer"),
    ],
)
def test_refusals(keywords, message):
    _, guide = small()
    with pytest.raises(ValueError, match=message):
        prune(guide, **keywords)


def test_a_posterior_without_a_defined_snr_is_refused():
    _, guide = small()
    with torch.no_grad():
        guide.loc.get_parameter("2.weight")[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'2.weight' has a loc that is not finite"):
        snr(guide)
    _, guide = small()
    with torch.no_grad():
        guide.unconstrained_scale.get_parameter("0.weight")[0, 0] = math.nan
    with pytest.raises(ValueError, match="scale that is not positive"):
        prune(guide, threshold=1.0)
    with pytest.raises(ValueError, match="no random weights"):
        snr(MeanFieldNormal(Classifier(nn.Linear(6, 3), 20), X[:1], Y[:1]))


def test_the_sweep_orders_its_levels_and_shares_its_noise():
    net, guide = small()
    keep = torch.tensor([0, 5])
    levels = sweep(
        net, guide, X, Y, thresholds=(1.0,), fractions=(0.9, 0.0, 0.5), num_samples=4, keep=keep, progress=False
    )
    fractions = [level.pruned.fraction for level in levels]
    assert fractions == sorted(fractions)
    assert len(levels) == 4
    whole = predict(net, guide, X, Y, num_samples=4, progress=False)
    torch.testing.assert_close(levels[0].predictive.mean_probs, whole.mean_probs)
    assert levels[0].predictive.probs.shape == (4, 2, 3)
    with pytest.raises(ValueError, match="at least one"):
        sweep(net, guide, X, Y, thresholds=(), fractions=(), progress=False)
    with pytest.raises(ValueError, match="fraction must be"):
        sweep(net, guide, X, Y, fractions=(0.5, 2.0), progress=False)


def test_the_histogram_counts_every_weight_once():
    _, guide = small()
    edges, counts = snr_histogram(snr(guide))
    assert len(edges) == 71
    assert {site: int(count.sum()) for site, count in counts.items()} == {"0.weight": 60, "2.weight": 30}
    extreme = {"w": torch.tensor([0.0, 1e-9, 1e9, 1.0])}
    assert snr_histogram(extreme)[1]["w"][[0, -1]].tolist() == [2.0, 1.0]


def test_masks_that_do_not_fit():
    _, guide = small()
    with pytest.raises(ValueError, match=r"'0.weight' needs a mask of shape \[10, 6\], got none"):
        guide.pruned({})


@pytest.mark.parametrize("structure", ["units", "inputs"])
def test_a_guide_pruned_by_groups_can_be_loaded_into(structure):
    """Its masks were views that repeat one number for a whole group, which no checkpoint could be read into."""
    guide = prune(small()[1], fraction=0.5, structure=structure).guide
    guide.load_state_dict({name: value.clone() for name, value in guide.state_dict().items()})
    assert all(mask.is_contiguous() for mask in guide.keep.buffers())
