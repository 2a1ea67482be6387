"""Metrics of uncertainty against their definitions, the shifts, shift.nc, and the densities that LOO needs."""

import json
import math
import resource

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from run_folders import DATA
from torch import nn
from torch.distributions import Categorical, Normal

from ppl_bnn import Classifier, Images, MeanFieldNormal, bayesian, build, metrics, predict
from ppl_bnn.prediction.log_density import train_log_likelihood
from ppl_bnn.prediction.predictive import draw_outputs
from ppl_bnn.prediction.shift import SHIFTS, predict_shifted, shift_metrics, temperature_metrics
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.shift import draw_shift_figures
from ppl_bnn.results.shift import shift_to_inference_data
from ppl_bnn.run import main

SEVERITIES = {"rotation": [90.0], "noise": [0.5], "blur": [1.0, 2.0]}


def small(classes=3):
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    net = bayesian(nn.Sequential(nn.Flatten(), nn.Linear(64, classes)), prior=dist.Normal(0.0, 0.5))
    y = torch.arange(40) % 2
    return net, MeanFieldNormal(Classifier(net, 40), x[:1], y[:1], init_scale=0.3), x, y


def test_adaptive_ece_is_the_gap_in_bins_of_equal_size():
    probs = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1]])
    labels = torch.tensor([0, 1, 0, 0])
    # Bins {0.6, 0.7} with accuracy 1/2 and {0.8, 0.9} with accuracy 1.
    assert metrics.adaptive_ece(probs, labels, bins=2) == pytest.approx((abs(1 - 1.3) + abs(2 - 1.7)) / 4)
    assert metrics.adaptive_ece(probs, labels, bins=9) == pytest.approx((0.4 + 0.7 + 0.2 + 0.1) / 4)


def test_adaptive_ece_of_calibrated_predictions_is_noise_alone():
    probs = torch.softmax(2 * torch.randn(20_000, 5), -1)
    # Of 15 bins with 1333 examples each: E|gap| <= sqrt(2 / pi) 0.5 / sqrt(1333) = 0.011.
    assert metrics.adaptive_ece(probs, Categorical(probs).sample()) < 0.015
    assert metrics.adaptive_ece(probs, Categorical(probs.sqrt()).sample()) > 0.05


def test_risk_coverage_refuses_the_uncertain_first():
    certainty, correct = torch.tensor([0.2, 0.9, 0.5, 0.7]), torch.tensor([False, True, False, True])
    coverage, risk = metrics.risk_coverage(certainty, correct)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    torch.testing.assert_close(risk, torch.tensor([0.0, 0.0, 1 / 3, 0.5], dtype=torch.double))
    # All equally certain: no order is better than another, so the risk is flat.
    torch.testing.assert_close(metrics.risk_coverage(torch.ones(4), correct)[1], torch.full((4,), 0.5).double())


def test_auroc_and_fpr95_against_two_normals():
    inside, outside = torch.randn(40_000), torch.randn(40_000) + 1.5
    unit = Normal(0.0, 1.0)
    expected = unit.cdf(torch.tensor(1.5 / math.sqrt(2))).item()
    assert metrics.auroc(inside, outside) == pytest.approx(expected, abs=0.005)
    assert metrics.fpr95(inside, outside) == pytest.approx(unit.cdf(torch.tensor(1.6449 - 1.5)).item(), abs=0.015)
    # Ranks alone count: tiny uncertainties are not tied, and equal ones count half.
    assert metrics.auroc(1e-9 * inside.double().exp(), 1e-9 * outside.double().exp()) == pytest.approx(
        metrics.auroc(inside, outside), abs=1e-6
    )
    assert metrics.auroc(torch.zeros(5), torch.zeros(7)) == pytest.approx(0.5)


@pytest.mark.parametrize("count", [20, 100, 10_000])
def test_no_more_than_95_of_100_need_to_pass(count):
    inside = torch.randperm(count).double()
    for threshold, passes in ((0.95 * count - 1, 0.0), (0.95 * count - 2, 1.0)):
        # Just above that many of the inside: of 95% that pass, the last is number 0.95 N - 1.
        assert metrics.fpr95(inside, torch.tensor([threshold + 0.5])) == passes


def test_a_label_of_next_to_no_probability_leaves_the_temperature_finite():
    logits = torch.randn(2000, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0)) * 30
    labels = logits.argmax(1)
    labels[::10] = (labels[::10] + 1) % 4
    log_probs = logits.float().log_softmax(1)
    log_likelihood = log_probs.gather(1, labels[:, None]).T
    found = temperature_metrics(log_probs.exp()[None], log_likelihood, labels, num_held_out=1000)
    assert found["nll_plain"] == pytest.approx(-log_likelihood[0, 1000:].double().mean().item())
    assert math.isfinite(found["nll_scaled"])


def test_the_temperature_is_found_and_nothing_else_changes():
    logits = 2 * torch.randn(30_000, 4, dtype=torch.double)
    labels = Categorical(logits=logits).sample()
    overconfident = (2.5 * logits).softmax(1)
    # The standard error of the temperature at so many labels is below 0.02.
    assert metrics.fit_temperature(overconfident, labels) == pytest.approx(2.5, abs=0.08)
    torch.testing.assert_close(metrics.tempered(overconfident, 2.5), logits.softmax(1))
    log_likelihood = overconfident.gather(1, labels[:, None]).log().T
    found = temperature_metrics(overconfident[None], log_likelihood, labels, num_held_out=10_000)
    assert (found["held_out"], found["measured"]) == (10_000, 20_000)
    assert found["nll_plain"] == pytest.approx(-overconfident[10_000:].gather(1, labels[10_000:, None]).log().mean())
    assert found["nll_scaled"] < found["nll_plain"]
    assert found["ece_scaled"] < 0.02 < found["ece_plain"]
    for number in (0, 30_000):
        with pytest.raises(ValueError, match=f"1 to 29999 of the images, got {number}"):
            temperature_metrics(overconfident[None], log_likelihood, labels, num_held_out=number)


def test_a_class_that_never_occurs_and_labels_out_of_range():
    probs = torch.softmax(torch.randn(50, 4), 1)
    labels = torch.randint(0, 2, (50,))
    assert 0 <= metrics.adaptive_ece(probs, labels) <= 1
    assert metrics.fit_temperature(probs, labels) > 0
    with pytest.raises(ValueError, match="labels from 0 to 3"):
        metrics.fit_temperature(probs, labels + 3)


def test_the_shifts_do_what_they_say():
    x = torch.zeros(2, 1, 9, 9)
    x[:, :, 0, 4] = 1
    turned = SHIFTS["rotation"](x, 90.0)
    assert turned[0, 0, 4, 0] == pytest.approx(1, abs=1e-4)  # the top goes to the left: counter-clockwise
    spread = SHIFTS["blur"](x, 1.0)
    assert spread[0, 0, 0, 4] < 1
    grey = torch.full((50, 1, 28, 28), 0.5)
    noisy = SHIFTS["noise"](grey, 0.1)
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.02)
    assert torch.equal(noisy, SHIFTS["noise"](grey, 0.1))
    assert 0 <= float(SHIFTS["noise"](grey, 2.0).min()) <= float(SHIFTS["noise"](grey, 2.0).max()) <= 1


def test_shifted_predictions_are_those_of_the_shifted_images():
    net, guide, x, y = small()
    outside = {"flat": torch.full((30, 1, 8, 8), 0.5)}
    shifted, other = predict_shifted(
        net, guide, x, y, severities=SEVERITIES, outside=outside, num_samples=7, seed=3, progress=False
    )
    assert [(one.kind, one.severity) for one in shifted] == [
        ("none", 0.0), ("rotation", 90.0), ("noise", 0.5), ("blur", 1.0), ("blur", 2.0),
    ]  # fmt: skip
    alone = predict(net, guide, SHIFTS["rotation"](x, 90.0), y, num_samples=7, seed=3, progress=False)
    torch.testing.assert_close(shifted[1].predictive.mean_probs, alone.mean_probs)
    alone = predict(
        net, guide, outside["flat"], torch.zeros(30, dtype=torch.long), num_samples=7, seed=3, progress=False
    )
    torch.testing.assert_close(other["flat"].mean_probs, alone.mean_probs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"severities": {"zoom": [1.0]}}, "unknown shift 'zoom'; the shifts are rotation, noise, blur"),
        ({"outside": {"wide": torch.zeros(2, 1, 8, 9)}}, r"wide has images \[1, 8, 9\], the network takes \[1, 8, 8\]"),
        (
            {"outside": {"dim": torch.full((2, 1, 8, 8), math.nan)}},
            "2 of 2 images of dim have others, the first is image",
        ),
        ({"outside": {"raw": torch.full((2, 1, 8, 8), 255.0)}}, r"image 0 \(255 to 255\)"),
        ({"y": torch.full((40,), 9)}, "labels y are from 9 to 9; expected integer class labels 0..2"),
    ],
)
def test_refusals(changes, message):
    net, guide, x, y = small()
    arguments = {"severities": SEVERITIES, "outside": {}, "num_samples": 2, "progress": False, "y": y, **changes}
    with pytest.raises(ValueError, match=message):
        predict_shifted(net, guide, x, arguments.pop("y"), **arguments)


@pytest.mark.any_python
def test_shift_nc_and_its_figures(tmp_path):
    net, guide, x, y = small()
    outside = {"flat": torch.full((30, 1, 8, 8), 0.5), "light": torch.ones(10, 1, 8, 8)}
    shifted, other = predict_shifted(
        net, guide, x, y, severities=SEVERITIES, outside=outside, num_samples=7, progress=False
    )
    images = Images((255 * x).to(torch.uint8), y, ("a", "b", "c"), "little ones", "test")
    netcdf.save(shift_to_inference_data(shifted, other, images), tmp_path / "shift.nc")
    levels, ood = (netcdf.read_group(tmp_path / "shift.nc", name) for name in ("shift", "ood"))
    assert levels["kind"].values.tolist() == ["none", "rotation", "noise", "blur", "blur"]
    for at, one in enumerate(shifted):
        for name, value in shift_metrics(one.predictive).items():
            assert float(levels[name][at]) == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert ood["set"].values.tolist() == ["flat", "light"]
    assert ood["epistemic"].sel(set="light").count() == 10
    by_hand = metrics.auroc(shifted[0].predictive.uncertainties()[2], other["light"].uncertainties()[2])
    assert float(ood["auroc"].sel(set="light", score="epistemic")) == pytest.approx(by_hand)
    assert {path.name for path in draw_shift_figures(tmp_path / "shift.nc", tmp_path)} == {"shift.png", "ood.png"}


def test_the_densities_are_those_of_the_draws():
    net, guide, x, y = small()
    model = Classifier(net, 40)
    found = train_log_likelihood(model, guide, x, y, num_samples=4, seed=5, batch_size=11, progress=False)
    for s, logits in enumerate(draw_outputs(net, guide, x, num_samples=4, seed=5)):
        torch.testing.assert_close(found.log_likelihood[s], -F.cross_entropy(logits, y, reduction="none"))
        (site,) = guide.sites
        weights = guide.draw(s, seed=5)[site].double()
        loc, scale = (part.double() for part in guide.loc_scale(site))
        assert found.log_prior[s].item() == pytest.approx(Normal(0.0, 0.5).log_prob(weights).sum().item(), rel=1e-6)
        assert found.log_q[s].item() == pytest.approx(Normal(loc, scale).log_prob(weights).sum().item(), rel=1e-6)


def test_log_q_minus_log_prior_averages_to_the_kl():
    from ppl_bnn import kl_by_site

    net, guide, x, y = small()
    model = Classifier(net, 40)
    found = train_log_likelihood(model, guide, x[:1], y[:1], num_samples=500, progress=False)
    ratio = found.log_q - found.log_prior
    kl = sum(kl_by_site(model, guide, x[:1], y[:1]).values())
    assert abs(ratio.mean().item() - kl) < 4 * ratio.std().item() / math.sqrt(500)


def test_a_deterministic_network_has_no_densities():
    net = build("bnn-fc", deterministic=True)
    x, y = torch.rand(2, 1, 28, 28), torch.tensor([0, 1])
    guide = MeanFieldNormal(Classifier(net, 2), x[:1], y[:1])
    with pytest.raises(ValueError, match="no random weights"):
        train_log_likelihood(Classifier(net, 2), guide, x, y, num_samples=2, progress=False)


@pytest.fixture(scope="module")
def run_out(tmp_path_factory):
    """A run of seconds on real digits with every result this page knows."""
    folder = tmp_path_factory.mktemp("run") / "little"
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({
        "data": {"dir": str(DATA), "num_train": 600, "num_test": 150},
        "model": {"prior": "normal(0, 0.1)"},
        "train": {"epochs": 2, "optimizer": "adam", "estimator": "local", "kl_weight": 0.1},
        "predict": {"num_samples": 20, "train_log_likelihood": True},
        "shift": {"num_samples": 3, "rotation": [30, 60], "noise": [0.5], "blur": [], "ood": ["noise"],
                  "temperature_on": 50},
    }))  # fmt: skip
    assert main([str(folder), "--stages", "train,predict,shift,report", "--quiet"]) == 0
    return folder


def test_a_run_tells_of_shifts(run_out, capsys):
    out = run_out / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"adaptive_ece", "aurc"} <= set(metrics["test"])
    assert [(row["kind"], row["severity"]) for row in metrics["shift"]] == [
        ("none", 0.0), ("rotation", 30.0), ("rotation", 60.0), ("noise", 0.5),
    ]  # fmt: skip
    assert metrics["shift"][0]["accuracy"] > metrics["shift"][2]["accuracy"]
    assert [row["set"] for row in metrics["ood"]] == ["MNIST with noise of 0.5"] * 2
    assert 0 <= metrics["ood"][0]["fpr95"] <= 1
    assert metrics["temperature"]["measured"] == 100
    assert {"shift.png", "ood.png", "risk_coverage.png", "gallery.html"} <= {
        p.name for p in (out / "figures").iterdir()
    }
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.nc")}
    assert main([str(run_out), "--stages", "predict,shift", "--quiet"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.nc")}
    assert "shift.nc is up to date" in capsys.readouterr().err


def test_the_file_of_training_log_likelihoods(run_out):
    path = run_out / "out" / "train_log_likelihood.nc"
    found, stats = netcdf.read_group(path, "log_likelihood"), netcdf.read_group(path, "sample_stats")
    assert dict(found["y"].sizes) == {"chain": 1, "draw": 20, "obs_id": 600}
    assert stats["lp"].values == pytest.approx(stats["log_prior"].values + found["y"].values.astype(float).sum(-1))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_samples", "0", "shift.num_samples must be at least 1, got 0"),
        ("ood", "[mnist]", "shift.ood must name other data than data.name"),
        ("ood", "[letters]", "got 'letters'"),
        ("blur", "[-1]", "shift.blur must be positive and finite, got -1"),
        ("noise", "[]", "shift.ood has noise, but shift.noise has no severity"),
        ("temperature_on", "150", "below 150, got 150"),
    ],
)
def test_bad_settings_take_one_line(run_out, capsys, option, value, message):
    capsys.readouterr()
    assert main([str(run_out), "--stages", "shift", "--quiet", f"--shift.{option}", value]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_full_disk_takes_one_line_and_no_result(run_out, capsys):
    path = run_out / "out" / "shift.nc"
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        assert main([str(run_out), "--stages", "shift", "--shift.num_samples", "2", "--quiet"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in capsys.readouterr().err.strip().splitlines()[-1]
    assert path.read_bytes() == before
