import math
import subprocess
import sys
import time

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, build, metrics, predict
from ppl_bnn.errors import Interrupted
from ppl_bnn.prediction.methods import drawn_blocks
from ppl_bnn.prediction.predictive import draw_outputs

X = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(1))


def small():
    net = bayesian(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    return net, MeanFieldNormal(Classifier(net, 30), X[:1], Y[:1], init_scale=0.5)


def test_a_draw_is_one_network_over_all_the_data():
    net, guide = small()
    for batch_size in (1, 7, 30):
        for index, logits in enumerate(draw_outputs(net, guide, X, num_samples=3, seed=4, batch_size=batch_size)):
            with poutine.condition(data=guide.draw(index, seed=4)):
                torch.testing.assert_close(logits, net(X))


def test_the_predictive_is_the_mean_of_the_softmax():
    net, guide = small()
    found = predict(net, guide, X, Y, num_samples=20, seed=2, batch_size=8, progress=False)
    logits = torch.stack(list(draw_outputs(net, guide, X, num_samples=20, seed=2)))
    probs = logits.softmax(-1)
    torch.testing.assert_close(found.probs, probs)
    torch.testing.assert_close(found.mean_probs, probs.mean(0).double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        found.log_likelihood, -F.cross_entropy(logits.permute(1, 2, 0), Y[:, None].expand(-1, 20), reduction="none").T
    )
    torch.testing.assert_close(found.mean_entropy.float(), -(probs * probs.log()).sum(-1).mean(0))
    torch.testing.assert_close(found.accuracies, (logits.argmax(-1) == Y).float().mean(1))
    summary = found.summary()
    assert summary["num_samples"] == 20
    assert summary["accuracy"] == pytest.approx((probs.mean(0).argmax(-1) == Y).double().mean().item())
    assert summary["nll"] == pytest.approx(-probs.mean(0)[range(30), Y].log().mean().item(), rel=1e-5)


def test_keeping_some_images_changes_nothing_else():
    net, guide = small()
    every = predict(net, guide, X, Y, num_samples=5, progress=False)
    some = predict(net, guide, X, Y, num_samples=5, keep=torch.tensor([3, 11]), progress=False)
    torch.testing.assert_close(some.probs, every.probs[:, [3, 11]])
    torch.testing.assert_close(some.mean_probs, every.mean_probs)
    assert some.kept.tolist() == [3, 11]


def test_the_network_is_put_back_into_training_mode():
    net, guide = small()
    net.train()
    predict(net, guide, X, Y, num_samples=1, progress=False)
    assert net.training


def test_batch_norm_predicts_with_its_running_statistics():
    net = bayesian(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    guide = MeanFieldNormal(Classifier(net.eval(), 30), X[:1], Y[:1])
    net.train()
    before = net[1].running_mean.clone()
    one = next(draw_outputs(net, guide, X, num_samples=1, batch_size=30))
    other = next(draw_outputs(net, guide, X, num_samples=1, batch_size=1))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(net[1].running_mean, before)


def test_a_deterministic_network_predicts_too():
    net = nn.Linear(5, 3)
    guide = MeanFieldNormal(Classifier(net, 30), X[:1], Y[:1])
    found = predict(net, guide, X, Y, num_samples=1, progress=False)
    torch.testing.assert_close(found.probs[0], net(X).softmax(-1).detach())
    assert found.uncertainties()[2].max() < 1e-6


def test_seconds_count_what_is_computed_before_the_first_draw(monkeypatch):
    def slowly(*arguments):
        time.sleep(0.2)
        return drawn_blocks(*arguments)

    monkeypatch.setattr("ppl_bnn.prediction.drawing.drawn_blocks", slowly)
    net, guide = small()
    assert predict(net, guide, X, Y, num_samples=1, progress=False).summary()["seconds"] >= 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"y": Y[:3]}, "got 30 and 3"),
        ({"x": X[:0], "y": Y[:0]}, "at least 1"),
        ({"y": Y + 2}, "labels y are from 2 to 4; expected integer class labels 0..2"),
    ],
)
def test_refusals(changes, message):
    net, guide = small()
    arguments = {"x": X, "y": Y, "num_samples": 2, "progress": False, **changes}
    with pytest.raises(ValueError, match=message):
        predict(net, guide, arguments.pop("x"), arguments.pop("y"), **arguments)


def test_fewer_draws_than_there_are_is_refused():
    net, guide = small()
    settings = {"method": "draws", "progress": False}
    before = predict(net, guide, X, Y, num_samples=3, **settings)
    with pytest.raises(ValueError, match="num_samples is 2, and so_far has 3 draws already"):
        predict(net, guide, X, Y, num_samples=2, so_far=before, **settings)


def test_it_stops_when_asked():
    net, guide = small()
    with pytest.raises(Interrupted, match="after draw 1 of 5"):
        predict(net, guide, X, Y, num_samples=5, progress=False, should_stop=lambda: True)


MEMORY = """
import resource, sys, torch
from ppl_bnn import Classifier, MeanFieldNormal, build, predict
draws = int(sys.argv[1])
x, y = torch.rand(2000, 1, 28, 28), torch.zeros(2000, dtype=torch.long)
net = build("bnn-fc")
guide = MeanFieldNormal(Classifier(net, 2000), x[:1], y[:1])
predict(net, guide, x, y, num_samples=draws, keep=torch.arange(5), progress=False, batch_size=500)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number_of_draws():
    few, many = (
        int(
            subprocess.run(
                [sys.executable, "-c", MEMORY, str(draws)], check=True, capture_output=True, text=True
            ).stdout
        )
        for draws in (5, 150)
    )
    # 145 more draws of weights alone are 156,000 KiB, of probabilities 11,600 KiB; the log likelihoods kept are 1,160.
    assert many - few < 8_000, f"{few} KiB with 5 draws, {many} KiB with 150"


def test_metrics_against_their_definitions():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.2, 0.2, 0.6], [0.35, 0.33, 0.32]])
    labels = torch.tensor([0, 2, 2, 1])
    assert metrics.accuracy(probs, labels) == 0.5
    assert metrics.nll(probs[range(4), labels].log().unsqueeze(0)) == pytest.approx(
        -(math.log(0.7) + math.log(0.4) + math.log(0.6) + math.log(0.33)) / 4
    )
    assert metrics.brier(probs[:1], labels[:1]) == pytest.approx(0.3**2 + 0.2**2 + 0.1**2)
    # One image in each of the four bins: |accuracy - confidence| a quarter each.
    assert metrics.ece(probs, labels) == pytest.approx((0.3 + 0.5 + 0.4 + 0.35) / 4)


def test_calibration_error_is_torchmetrics_where_no_image_is_certain():
    probs = torch.softmax(3 * torch.randn(3000, 10), -1)
    probs = probs[probs.max(1).values < 1]
    labels = torch.distributions.Categorical(probs.sqrt()).sample()
    expected = multiclass_calibration_error(probs, labels, num_classes=10, n_bins=15, norm="l1")
    assert metrics.ece(probs, labels) == pytest.approx(expected.item(), abs=1e-5)


def test_certain_images_share_the_last_bin():
    """Sure at 1.0 and right in 94%, sure at 0.95 and always right: together they are nearly calibrated."""
    top = torch.cat([torch.ones(500), torch.full((500,), 0.95)])
    probs = torch.stack((top, 1 - top), 1)
    labels = torch.zeros(1000, dtype=torch.long)
    labels[:30] = 1
    assert metrics.ece(probs, labels) == pytest.approx(abs(0.975 - 0.97), abs=1e-6)


def test_nll_of_the_average_is_not_the_average_nll():
    log_likelihood = torch.tensor([[math.log(0.9)], [math.log(0.1)]])
    assert metrics.nll(log_likelihood) == pytest.approx(-math.log(0.5))
    # A draw that gives the label no chance at all does not make the average infinite.
    assert math.isfinite(metrics.nll(torch.tensor([[-math.inf], [math.log(0.5)]])))


def test_uncertainties_split_into_their_parts():
    # Two draws that disagree: all uncertainty is epistemic. One draw that is undecided: all is aleatoric.
    total, aleatoric, epistemic = metrics.uncertainties(
        torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([0.0, math.log(2)])
    )
    torch.testing.assert_close(total, torch.full((2,), math.log(2)))
    torch.testing.assert_close(aleatoric, torch.tensor([0.0, math.log(2)]))
    torch.testing.assert_close(epistemic, torch.tensor([math.log(2), 0.0]))


def test_pyros_own_predictive_agrees():
    """The averaged predictive by Pyro's handlers alone, within Monte Carlo error."""
    net, guide = small()
    model = Classifier(net, 30)
    ours = predict(net, guide, X, Y, num_samples=3000, progress=False)
    total = torch.zeros(30, 3)
    with torch.no_grad():
        for _ in range(3000):
            trace = poutine.trace(guide).get_trace(X, Y)
            total += poutine.replay(model, trace=trace)(X, Y).softmax(-1)
    error = ours.probs.std(0) * math.sqrt(2 / 3000)
    assert ((ours.mean_probs - total / 3000) / error).abs().max() < 5


def test_bnn_fc_predicts_images():
    net = build("bnn-fc", prior=dist.Normal(0.0, 0.1))
    x, y = torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])
    guide = MeanFieldNormal(Classifier(net, 4), x, y)
    assert predict(net, guide, x, y, num_samples=2, progress=False).probs.shape == (2, 4, 10)
