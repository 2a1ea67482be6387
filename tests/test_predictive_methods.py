"""Ways to draw the predictive: coherent, layerwise and antithetic draws, the sequential stop, ranks and resumption."""

import math

import pytest
import torch
from test_distributed import Ranks
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, build, draws, metrics, predict, predictor, prune
from ppl_bnn.draws import coherent
from ppl_bnn.layerwise import layerwise
from ppl_bnn.models.plain import plain
from ppl_bnn.moments import moment_predictive
from ppl_bnn.predictive import cheapest, draw_logits, traced
from ppl_bnn.pruning.fastest import choose_layers
from ppl_bnn.stopping import is_look
from ppl_bnn.training import Interrupted

X = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(1))


def dense(scale=0.5, *, bayesian_bias=False):
    torch.manual_seed(0)
    net = bayesian(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), bayesian_bias=bayesian_bias)
    return net, MeanFieldNormal(Classifier(net, 30), X[:1], Y[:1], init_loc=1.0, init_scale=scale)


def convolutional():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )
    net = bayesian(nn.Sequential(*layers)).eval()
    net[1].running_var.uniform_(0.5, 2)
    net[1].weight.data[0] = -0.7
    x = torch.randn(6, 1, 6, 6)
    return net, MeanFieldNormal(Classifier(net, 6), x[:1], Y[:1], init_loc="he", init_scale=0.2), x


def by_pyro(net, guide, x, num_samples, seed=0):
    """The guide's draws by Pyro's handlers."""
    from pyro import poutine

    for index in range(num_samples):
        with torch.no_grad(), poutine.condition(data=guide.draw(index, seed=seed)):
            logits = net(x)
        # Not from inside: the handler would be at work while others run.
        yield logits


class Residual(nn.Module):
    """A deterministic layer first, then a random one, then what the deterministic layer gave once more."""

    def __init__(self):
        super().__init__()
        self.fixed, self.first, self.last = nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.fixed(x)
        return self.last(torch.relu(self.first(h)) + h)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize("make", [dense, convolutional, "residual", "untraceable"])
def test_a_coherent_draw_is_the_guides_function(make):
    if callable(make):
        net, guide, x = (*make(), X)[:3]
    else:
        net, x = bayesian({"residual": Residual, "untraceable": Branches}[make]()).eval(), X
        guide = MeanFieldNormal(Classifier(net, 30), x[:1], Y[:1])
    found = draw_logits(net, guide, x, num_samples=3, seed=4, batch_size=4)
    for logits, expected in zip(found, by_pyro(net, guide, x, 3, seed=4), strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    blocks = coherent(net, guide, x, seed=4)
    torch.testing.assert_close(blocks.logits(2, 1.0)[0], expected, rtol=1e-4, atol=1e-5)


def residual():
    torch.manual_seed(0)
    net = bayesian(Residual()).eval()
    return net, MeanFieldNormal(Classifier(net, 30), X[:1], Y[:1], init_scale=0.5), X


@pytest.mark.parametrize("make", [lambda: (*dense(bayesian_bias=True), X), convolutional])
def test_a_pruned_guides_draws_are_the_same_in_its_compact_network(make, monkeypatch):
    net, guide, x = make()
    pruned = prune(guide, fraction=0.7).guide
    tried = []
    monkeypatch.setattr(draws, "choose_layers", lambda small, x: tried.append(choose_layers(small, x)))
    monkeypatch.setattr(draws, "_WAIT", 0.0)
    blocks = coherent(net, pruned, x, seed=4, batch_size=4)
    for index, expected in enumerate(by_pyro(net, pruned, x, 4, seed=4)):
        torch.testing.assert_close(blocks.logits(index, 1.0)[0], expected, rtol=1e-4, atol=1e-5)
        assert len(tried) == 1
    network = plain(net)
    by_compact = draws.compact_passes(network, pruned, draws.laid_out(network, x), 4)
    mirrored = draws.placed(network, pruned, pruned.sites)
    for index in range(2):
        mirrored((site, -noise) for site, noise in pruned.noise(index, seed=4))
        torch.testing.assert_close(by_compact(), blocks.logits(index, -1.0)[0], rtol=1e-4, atol=1e-5)
    coherent(net, guide, x).logits(0, 1.0)
    assert len(tried) == 2


@pytest.mark.parametrize(
    "make", [dense, lambda: dense(bayesian_bias=True), convolutional, residual], ids=["fc", "bias", "conv", "residual"]
)
def test_layerwise_has_the_same_distribution_for_each_example(make):
    net, guide, x = (*make(), X)[:3]
    count = 1500
    probs = [
        torch.stack(list(draw_logits(net, guide, x, num_samples=count, method=method))).softmax(-1).double()
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
    logits = torch.stack(list(draw_logits(net, guide, X[:1].expand(2, 5), num_samples=2000, method="layerwise")))
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
    draws = torch.stack(list(draw_logits(net, guide, x, num_samples=1000, method="layerwise")))
    expected = torch.stack(list(by_pyro(net, guide, x, 3000, seed=1)))
    torch.testing.assert_close(draws.std(0), expected.std(0), rtol=0.12, atol=0)


def test_the_method_is_chosen_by_random_numbers():
    net, guide = dense()
    # 64 weights, 11 units.
    assert [cheapest(plain(net), guide, X[:count]) for count in (1, 5, 6)] == ["layerwise", "layerwise", "draws"]
    net = bayesian(Branches())
    guide = MeanFieldNormal(Classifier(net, 30), X[:1], Y[:1])
    assert cheapest(traced(net), guide, X[:1]) == "draws"
    with pytest.raises(ValueError, match=r"layerwise needs a traced network.*use the method draws"):
        predict(net, guide, X, Y, method="layerwise", progress=False)
    net = bayesian(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten()))
    x = torch.rand(2, 1, 3, 3)
    guide = MeanFieldNormal(Classifier(net, 2), x, Y[:2])
    with pytest.raises(ValueError, match="layerwise needs a dense random layer"):
        predict(net, guide, x, Y[:2], method="layerwise", progress=False)


@pytest.mark.parametrize("method", ["draws", "layerwise"])
def test_antithetic_pairs_are_mirror_images_and_average_better(method):
    net, guide = dense(0.1)
    linear = bayesian(nn.Sequential(nn.Linear(5, 3)))
    linear_guide = MeanFieldNormal(Classifier(linear, 30), X[:1], Y[:1], init_loc=1.0)
    pair = list(draw_logits(linear, linear_guide, X, num_samples=2, method=method, sampling="antithetic"))
    with torch.no_grad():
        mean = X @ linear_guide.loc_scale("0.weight")[0].T + linear[0].bias
    torch.testing.assert_close((pair[0] + pair[1]) / 2, mean, rtol=1e-4, atol=1e-4)
    independent, antithetic = (
        predict(net, guide, X, Y, num_samples=1200, method=method, sampling=sampling, progress=False)
        for sampling in ("independent", "antithetic")
    )
    difference = independent.mean_probs - antithetic.mean_probs
    error = (independent.mc_error.square() + antithetic.mc_error.square()).sqrt() + 1e-5
    assert (difference / error).abs().max() < 4.5
    # What the error is said to be is what it is: the spread of 30 shorter runs.
    runs = torch.stack(list(draw_logits(net, guide, X, num_samples=1200, seed=9, method=method, sampling="antithetic")))
    spread = runs.softmax(-1).unflatten(0, (30, 40)).mean(1).std(0)
    ratio = (spread * math.sqrt(40 / 1200) / antithetic.mc_error)[antithetic.mc_error > 1e-4]
    assert 0.8 < ratio.median() < 1.25
    noisy = independent.mc_error > 1e-4
    assert (antithetic.mc_error / independent.mc_error)[noisy].square().median() < 0.5


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
    return {name: value for name, value in vars(found).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(("method", "tolerance"), [("draws", None), ("layerwise", None), ("draws", 0.05)])
def test_ranks_share_the_draws_out(tmp_path, method, tolerance):
    first, second = Ranks(tmp_path, 2, on_a_rank, method, tolerance).results()
    net, guide = dense()
    alone = predict(net, guide, X, Y, num_samples=151, method=method, tolerance=tolerance, progress=False)
    for name, value in first.items():
        assert torch.equal(value.nan_to_num(-1.0), getattr(alone, name).nan_to_num(-1.0)), name
    assert torch.equal(second["mean_probs"], first["mean_probs"])
    assert second["probs"].shape == (151, 0, 3)


@pytest.mark.parametrize("sampling", ["independent", "antithetic"])
def test_the_sequential_stop_keeps_its_bound(sampling):
    net, guide = dense(0.3)
    exact = predict(
        net, guide, X, Y, num_samples=80_000, seed=1, method="layerwise", progress=False, keep=torch.tensor([0])
    ).mean_probs
    misses, draws = [], []
    for seed in range(2, 22):
        found = predict(
            net, guide, X, Y, num_samples=1600, seed=seed, method="layerwise", sampling=sampling, tolerance=0.02,
            progress=False,
        )  # fmt: skip
        early = found.draws < 1600
        misses.append(((found.mean_probs - exact).abs().amax(1) > 0.02 + 3 * 0.5 / 80_000**0.5)[early])
        draws.append(found.draws)
    # 95% is promised for each class; the bound at every look together is meant to be on the safe side.
    assert torch.cat(misses).double().mean() < 0.05
    draws = torch.cat(draws)
    assert draws.unique().numel() > 1
    assert all(is_look(count) for count in draws.unique().tolist())
    assert draws.double().mean() < 1600


def test_an_image_that_is_known_gets_no_further_draws():
    net, guide = dense(0.3)
    fixed = predict(net, guide, X, Y, num_samples=400, method="draws", progress=False)
    found = predict(net, guide, X, Y, num_samples=400, method="draws", tolerance=0.05, progress=False)
    assert 50 <= int(found.draws.min()) < int(found.draws.max())
    for at, count in enumerate(found.draws.tolist()):
        # Draw s is the same network for the images that are left.
        torch.testing.assert_close(found.probs[:count, at], fixed.probs[:count, at], rtol=1e-4, atol=1e-5)
        assert found.probs[count:, at].isnan().all()
        torch.testing.assert_close(found.mean_probs[at], fixed.probs[:count, at].double().mean(0), rtol=1e-4, atol=1e-6)
    expected = -found.mean_probs[range(30), Y].log().mean()
    assert metrics.nll(found.log_likelihood) == pytest.approx(expected.item(), rel=1e-4)
    assert found.accuracies[:50].isfinite().all()


def test_the_monte_carlo_error_is_the_standard_error():
    net, guide = dense()
    found = predict(net, guide, X, Y, num_samples=300, progress=False)
    expected = found.probs.double().std(0) / math.sqrt(300)
    torch.testing.assert_close(found.mc_error, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "exact"}, "method must be one of auto, draws, layerwise"),
        ({"sampling": "halton"}, "sampling must be one of independent, antithetic, sobol"),
        ({"sampling": "sobol", "method": "draws"}, "sobol is for the method layerwise"),
        ({"sampling": "sobol", "tolerance": 0.1}, "a tolerance needs draws that tell their own error"),
        ({"sampling": "antithetic", "num_samples": 3}, "must be even, got 3"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
        ({"x": X.clone().index_fill(0, torch.tensor([4, 7]), math.nan)}, r"2 examples have NaN.*the first is 4"),
    ],
)
def test_refusals(changes, message):
    net, guide = dense()
    arguments = {"num_samples": 2, "progress": False, **changes}
    with pytest.raises(ValueError, match=message):
        predict(net, guide, arguments.pop("x", X), Y, **arguments)


@pytest.mark.parametrize("name", ["lenet", "bnn-fc", "resnet18"])
def test_the_networks_predict_by_either_method(name):
    shape = (3, 32, 32) if name == "resnet18" else (1, 28, 28)
    net, x = build(name).eval(), torch.rand(2, *shape)
    guide = MeanFieldNormal(Classifier(net, 2), x, Y[:2], init_loc="he", init_scale=0.01)
    for method in ("draws", "layerwise"):
        found = predict(net, guide, x, Y[:2], num_samples=2, method=method, progress=False)
        assert found.probs.isfinite().all()
        assert found.method == method


def test_moments_are_a_predictive_without_draws():
    net, guide = dense(0.1)
    found = predict(net, guide, X, Y, num_samples=50, method="moments", keep=torch.tensor([3]), progress=False)
    probs, entropy = moment_predictive(net, guide, X)
    torch.testing.assert_close(found.mean_probs, probs.double())
    torch.testing.assert_close(found.mean_entropy, entropy.double())
    torch.testing.assert_close(found.probs, probs[None, [3]])
    assert found.method == "moments"
    assert found.draws.tolist() == [0] * len(X)
    assert found.mc_error.isnan().all()
    assert found.summary()["nll"] == pytest.approx(-probs[range(len(X)), Y].log().mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="labels must be from 0 to 2"):
        predict(net, guide, X, Y + 3, method="moments", progress=False)


def test_sobol_points_are_unbiased_and_average_better():
    net, guide = dense()
    reference = predict(net, guide, X[:4], Y[:4], num_samples=20_000, method="layerwise", progress=False).mean_probs
    errors = {}
    for sampling in ("independent", "sobol"):
        found = [
            predict(net, guide, X[:4], Y[:4], num_samples=64, seed=seed, method="layerwise", sampling=sampling,
                    progress=False).mean_probs - reference
            for seed in range(1, 41)
        ]  # fmt: skip
        errors[sampling] = torch.stack(found)
    spread = {name: part.square().mean().sqrt() for name, part in errors.items()}
    assert spread["sobol"] < 0.75 * spread["independent"]
    bias = errors["sobol"].mean(0)
    assert (bias.abs() < 4.5 * errors["sobol"].std(0) / 40**0.5 + 0.004).all()


def test_sobol_points_can_be_added_to_and_differ_between_images():
    net, guide = dense()
    same = X[:1].expand(3, *X.shape[1:])
    arguments = {"method": "layerwise", "sampling": "sobol", "progress": False}
    whole = predict(net, guide, same, Y[:3], num_samples=64, **arguments)
    part = predict(net, guide, same, Y[:3], num_samples=24, **arguments)
    assert torch.equal(predict(net, guide, same, Y[:3], num_samples=64, so_far=part, **arguments).probs, whole.probs)
    assert torch.equal(
        predict(net, guide, same, Y[:3], num_samples=64, sampling="sobol", progress=False).probs, whole.probs
    )
    assert not torch.isclose(whole.probs[:, 0], whole.probs[:, 1]).all(-1).any()


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
    monkeypatch.setattr("ppl_bnn.pruning.layerwise.faster", lambda one, other: sparse)
    net, guide = dense()
    pruned = prune(guide, fraction=0.7).guide
    draws = 20_000
    answer = predictor(net, pruned, X[:2], num_samples=draws, seed=3)
    for x in (X[:2], X[-1:], X[:2]):
        expected = predict(net, pruned, x, torch.zeros(len(x)).long(), num_samples=draws, seed=4, progress=False)
        probs, entropy = answer(x)
        error = (expected.mean_squares - expected.mean_probs.square()).clamp_min(0).div(draws / 2).sqrt()
        assert ((probs - expected.mean_probs).abs() < 4.5 * error + 1e-6).all()
        assert not torch.equal(probs.double(), expected.mean_probs)
        torch.testing.assert_close(entropy.double(), expected.mean_entropy, rtol=0.02, atol=1e-3)
    assert torch.equal(answer(X[:2])[0], answer(X[:2])[0])
