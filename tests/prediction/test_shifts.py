"""Shifts of tables, sequences and tokens: each does what it says, to the same examples whatever batch they come in."""

import math

import pyro.distributions as dist
import pytest
import torch
from kinds_of_data import bag_of_words
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, Model, bayesian, metrics, predict
from ppl_bnn.data import TensorExamples, as_examples
from ppl_bnn.errors import UserError
from ppl_bnn.inputs import lead, rows
from ppl_bnn.models.likelihoods import Normal
from ppl_bnn.prediction.changed import Changed
from ppl_bnn.prediction.shift import predict_shifted, shift_metrics
from ppl_bnn.prediction.shifts import SHIFTS, applied, shifts_of, tilted
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.shift import draw_shift_figures
from ppl_bnn.results.shift import shift_to_inference_data

COUNT = 4000
COLUMNS = {"width": (0,), "height": (1,), "colour": (2, 3, 4)}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(high, *shape, seed=0):
    return torch.randint(1, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def table():
    """Two columns of numbers, the second three times the first, and a category in three."""
    width = normal(COUNT, 1)
    colour = nn.functional.one_hot(whole(4, COUNT) - 1, 3).float()
    return torch.cat([width, 3 * width, colour], 1)


INPUTS = {
    "table": (normal(30, 4), {}),
    "sequence": (normal(30, 7, 2), {}),
    "tokens": (whole(9, 30, 7), {}),
    "several": ({"about": normal(30, 3), "words": whole(9, 30, 5), "length": whole(5, 30)}, {}),
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_example_is_shifted_alike_in_any_batch(name):
    x, _ = INPUTS[name]
    some = torch.tensor([3, 17, 4])
    for shift in shifts_of(x).values():
        of_all, of_some = applied(shift, x, 0.5), applied(shift, rows(x, some), 0.5, some)
        for part, other in zip(of_all.values() if isinstance(x, dict) else [of_all],
                               of_some.values() if isinstance(x, dict) else [of_some], strict=True):  # fmt: skip
            assert torch.equal(part[some], other)


def test_a_batch_of_images_has_the_noise_of_its_images():
    x = torch.full((6, 1, 4, 4), 0.5)
    of_all = applied(SHIFTS["noise"], x, 0.1, torch.arange(6))
    assert torch.equal(of_all[2:4], applied(SHIFTS["noise"], x[2:4], 0.1, torch.tensor([2, 3])))
    assert not torch.equal(of_all[0], of_all[1])


def test_which_shifts_there_are_follows_the_inputs():
    found = {name: set(shifts_of(x)) for name, (x, _) in INPUTS.items()}
    assert found["table"] == {"feature_noise", "missing", "shuffled"}
    assert found["sequence"] == {"feature_noise", "dropped", "truncated", "shuffled"}
    assert found["tokens"] == {"dropped", "truncated", "replaced", "shuffled"}
    assert found["several"] == found["table"] | found["tokens"]
    assert shifts_of(torch.ones(3, 2, dtype=torch.bool)) == {}


def test_noise_is_in_training_standard_deviations_and_spares_categories(table):
    moved = applied(shifts_of(table, columns=COLUMNS)["feature_noise"], table, 0.5) - table
    assert (moved[:, 2:] == 0).all()
    for column, scale in ((0, 1.0), (1, 3.0)):
        # The standard deviation of COUNT numbers is known to within scale / sqrt(2 COUNT).
        assert moved[:, column].std().item() == pytest.approx(0.5 * table[:, 0].std().item() * scale, rel=0.06)
        assert abs(moved[:, column].mean().item()) < 4 * 0.5 * scale / math.sqrt(COUNT)


def test_missing_columns_are_at_their_training_mean_and_categories_go_together(table):
    train = table + 1
    found = applied(shifts_of(train, columns=COLUMNS)["missing"], table, 0.25)
    lost = found != table
    for column in range(2):
        assert torch.allclose(found[lost[:, column], column], train[:, column].mean())
        assert lost[:, column].float().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / COUNT))
    assert (lost[:, 2:].all(1) | ~lost[:, 2:].any(1)).all()
    # Whether one column is missing says nothing of another.
    assert abs(torch.corrcoef(lost[:, :2].T.float())[0, 1].item()) < 4 / math.sqrt(COUNT)


def test_shuffled_columns_keep_their_distributions_and_lose_their_dependence(table):
    found = applied(shifts_of(table, columns=COLUMNS)["shuffled"], table, 1.0)
    assert (found[:, 2:].sum(1) == 1).all()
    assert torch.corrcoef(table[:, :2].T)[0, 1].item() == pytest.approx(1)
    assert abs(torch.corrcoef(found[:, :2].T)[0, 1].item()) < 4 / math.sqrt(COUNT)
    for column in range(5):
        # Kolmogorov and Smirnov: the greatest difference of two empirical distributions of COUNT numbers each.
        values = table[:, column].sort().values
        below = [torch.searchsorted(part[:, column].sort().values, values, right=True) for part in (table, found)]
        assert (below[0] - below[1]).abs().max().item() / COUNT < 1.95 * math.sqrt(2 / COUNT)


def test_steps_are_dropped_cut_off_and_shuffled():
    x = 1 + torch.arange(10.0).expand(500, 10).unsqueeze(2).repeat(1, 1, 2)
    shifts = shifts_of(x)
    dropped = applied(shifts["dropped"], x, 0.3) == 0
    assert torch.equal(dropped[..., 0], dropped[..., 1])
    assert dropped[..., 0].float().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 5000))
    assert applied(shifts["truncated"], x, 0.25)[7, :, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]
    order = applied(shifts["shuffled"], x, 1.0)
    assert torch.equal(order.sort(1).values, x)
    # Each step is at each place as often as at any other.
    at_first = torch.bincount(order[:, 0, 0].long() - 1, minlength=10)
    assert ((at_first - 50) ** 2 / 50).sum().item() < 33  # chi-squared with 9 degrees of freedom, p = 0.0001


def test_tokens_become_tokens_of_the_training_sequences_by_their_frequency():
    train = torch.tensor([[3, 3, 3, 5]]).expand(100, 4)
    x = torch.full((1000, 4), 9)
    found = applied(shifts_of(train)["replaced"], x, 0.5)
    assert found.dtype == torch.int64
    share = [(found == token).float().mean().item() for token in (9, 3, 5)]
    assert share == pytest.approx([0.5, 0.375, 0.125], abs=4 * 0.5 / math.sqrt(4000))
    assert sum(share) == pytest.approx(1)


def test_a_tilt_moves_the_mean_of_a_normal_column_by_its_severity():
    values = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(COUNT) + 0.5) / COUNT)
    for severity in (-1.0, 0.5, 1.0):
        chosen = values[tilted(values, severity)]
        assert chosen.mean().item() == pytest.approx(severity, abs=0.02)
        assert chosen.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(tilted(values, 0.0), torch.arange(COUNT))


def test_a_shift_of_ones_own_must_keep_the_shape():
    with pytest.raises(UserError, match=r"same shape, \[\[4, 3\]\]; got \[\[4, 2\]\]"):
        applied(lambda x, severity: x[:, 1:], torch.zeros(4, 3), 1.0)


@pytest.fixture
def regression():
    x = normal(50, 3)
    net = bayesian(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), prior=dist.Normal(0.0, 0.5))
    model = Model(net, Normal(0.3), 50)
    y = x[:, 0] + 0.1
    return model, MeanFieldNormal(model, x[:1], y[:1], init_scale=0.3), x, y


HOW = {"num_samples": 6, "seed": 3, "progress": False}


def test_numbers_under_shift_are_those_of_the_shifted_rows(regression):
    model, guide, x, y = regression
    shifts = {**shifts_of(x), "half": lambda x, severity: severity * x}
    severities = {"feature_noise": [0.5], "covariate": [1.0], "half": [0.5]}
    outside = {"far": 5 + x[:20]}
    shifted, other = predict_shifted(
        model, guide, x, y, severities=severities, outside=outside, shifts=shifts, tilt_by=x[:, 0], **HOW
    )
    positions = tilted(x[:, 0], 1.0)
    expected = [(x, y), (applied(shifts["feature_noise"], x, 0.5), y), (x[positions], y[positions]), (x / 2, y)]
    assert [one.kind for one in shifted] == ["none", "feature_noise", "covariate", "half"]
    for one, (inputs, observed) in zip(shifted, expected, strict=True):
        alone = predict(model, guide, inputs, observed, **HOW)
        assert torch.equal(one.predictive.mean, alone.mean)
        assert one.predictive.scores() == alone.scores()
        found = one.metrics
        assert found == shift_metrics(alone)
        assert {"nll", "rmse", "crps", "coverage_90", "total", "aleatoric", "epistemic"} <= found.keys()
        assert found["total"] == pytest.approx(float(alone.std.square().mean()))
    slim, _ = predict_shifted(
        model, guide, x, y, severities={"half": [0.5]}, outside={}, shifts=shifts, metrics_alone=True, **HOW
    )
    assert slim[1].metrics == shifted[3].metrics
    assert slim[1].predictive is None
    assert other["far"].y is None
    assert metrics.auroc(shifted[0].predictive.std, other["far"].std) > 0.9


def test_numbers_under_shift_are_saved_and_drawn(regression, tmp_path):
    model, guide, x, y = regression
    shifted, other = predict_shifted(
        model, guide, x, y, severities={"missing": [0.2, 0.8]}, outside={"far": 5 + x[:20]}, **HOW
    )
    idata = shift_to_inference_data(shifted, other, attrs={"examples": "rows"})
    netcdf.save(idata, tmp_path / "shift.nc")
    ood, attrs = netcdf.read_group(tmp_path / "shift.nc", "ood"), netcdf.read_attrs(tmp_path / "shift.nc")
    assert ood["score"].values.tolist() == ["total", "aleatoric", "epistemic"]
    assert (attrs["title"], attrs["units"]) == ("50 examples", "variance of y")
    assert "top_prob" not in ood
    by_hand = metrics.auroc(shifted[0].predictive.std, other["far"].std)
    assert float(ood["auroc"].sel(set="far", score="total")) == pytest.approx(by_hand)
    assert {path.name for path in draw_shift_figures(tmp_path / "shift.nc", tmp_path)} == {"shift.png", "ood.png"}


def test_what_does_not_fit_is_refused_before_any_prediction(regression):
    model, guide, x, y = regression
    cases = (
        ({"severities": {"rotation": [15.0]}, "outside": {}}, "unknown shift 'rotation'; the shifts are feature_noise"),
        ({"severities": {"covariate": [1.0]}, "outside": {}}, "unknown shift 'covariate'"),
        ({"severities": {}, "outside": {"wide": torch.zeros(5, 4)}}, r"wide has inputs \[4\], the network takes \[3\]"),
    )
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            predict_shifted(model, guide, x, y, **changes, **HOW)


def test_sequences_that_are_padded_batch_by_batch_have_any_length():
    def items(*lengths):
        return as_examples([(torch.arange(1, 1 + n), n % 2) for n in lengths], collate_fn=padded)

    def padded(items):
        x, y = zip(*items, strict=True)
        return nn.utils.rnn.pad_sequence(x, batch_first=True), torch.tensor(y)

    model = Classifier(bayesian(bag_of_words((4,), 2)), 4)
    guide = MeanFieldNormal(model, torch.zeros(1, 4).long())
    outside = {"long": items(6, 9, 5)}
    _, other = predict_shifted(model, guide, items(4, 2, 3, 4), severities={}, outside=outside, shifts={}, **HOW)
    assert other["long"].mean.shape == (3, 2)
    with pytest.raises(UserError, match=r"rows has inputs float \[\*\], the network takes int \[\*\]"):
        predict_shifted(model, guide, items(4, 2), severities={}, outside={"rows": torch.rand(3, 4)}, shifts={}, **HOW)


class Logged:
    """Examples that remember which rows were read, with a transform that halves."""

    def __init__(self, x, y):
        self.inner, self.taken = TensorExamples(x, y), []
        self.batch_transform = lambda x: x / 2

    def __len__(self):
        return len(self.inner)

    def take(self, rows):
        self.taken += rows.tolist()
        return self.inner.take(rows)

    def fingerprint(self):
        return "logged"


def test_examples_are_changed_while_they_are_read():
    x, y = normal(20, 3), torch.arange(20)
    noise = shifts_of(x)["feature_noise"]
    examples = Logged(x, y)
    changed = Changed(
        examples, lambda inputs, rows: applied(noise, inputs, 1.0, rows), positions=torch.tensor([7, 2, 7])
    )
    assert len(changed) == 3
    inputs, labels = changed.take(torch.tensor([2, 1]))
    assert examples.taken == labels.tolist() == [7, 2]
    expected = applied(noise, x / 2, 1.0)
    assert torch.equal(inputs, expected[[7, 2]])
    streamed = list(changed.stream([torch.tensor([0]), torch.tensor([1, 2])]))
    assert torch.equal(torch.cat([lead(batch) for batch, _ in streamed]), expected[[7, 2, 7]])
    assert Changed(examples, labelled=False).take(torch.tensor([0]))[1] is None
