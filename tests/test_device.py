"""A run on a device that is not the CPU: a GPU where there is one, else one that is as strict and no faster."""

import copy
from contextlib import nullcontext

import pytest
import torch
from pretend_device import NAME, pretend_device
from safetensors.torch import load_file
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, fit, predict
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.run import main
from ppl_bnn.training import Diverged, Interrupted

GPU = torch.cuda.is_available()


@pytest.fixture
def backend():
    with nullcontext() if GPU else pretend_device() as found:
        yield found


@pytest.fixture
def device(backend):
    return torch.device("cuda" if GPU else NAME)


def small(device, deterministic=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    model = Classifier(net if deterministic else bayesian(net), 24)
    x, y = torch.rand(24, 1, 8, 8), torch.arange(24) % 3
    guide = MeanFieldNormal(model, x[:1], y[:1], init_scale=0.05)
    return model.to(device), guide.to(device), x.to(device), y.to(device)


SETTINGS = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "progress": False}


@pytest.mark.skipif(GPU, reason="a GPU needs no proof that it is strict")
def test_the_stand_in_is_as_strict_as_a_gpu(device):
    there = torch.rand(3, device=device)
    with pytest.raises(RuntimeError, match=r"two devices: \[3\] on pretend, \[3\] on cpu"):
        there + torch.rand(3)
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=device, generator=torch.Generator())
    assert (there + 1).device.type == NAME
    assert torch.randn(3, device=device, generator=torch.Generator(device)).device.type == NAME


@pytest.mark.parametrize(
    ("run", "stages"), [("mnist-lenet", "train,posterior,predict,shift,report"), ("mnist-fc-sparse", "train,prune")]
)
def test_every_stage_of_a_run_works_there(device, tmp_path, data_dir, run, stages, capsys):
    out = tmp_path / "out"
    arguments = [
        f"runs/{run}", "--device", str(device), "--data.dir", str(data_dir), "--data.num_train", "200",
        "--data.num_test", "20", "--train.epochs", "1", "--train.precision", "bfloat16", "--channels_last", "true",
        "--predict.num_samples", "2", "--shift.num_samples", "2", "--pruning.num_samples", "2",
        "--pruning.fractions", "[0.9]", "--stages", stages, "--quiet", "--out", str(out),
    ]  # fmt: skip
    assert main(arguments) == 0, capsys.readouterr().err
    assert (out / ("metrics.json" if "report" in stages else "pruning.nc")).exists()


@pytest.mark.parametrize(
    ("estimator", "optimizer", "precision"),
    [
        *((name, "adam", "bfloat16") for name in ESTIMATORS),
        ("plain", "ivon", "float32"),
        ("plain", "rmsprop", "float32"),
    ],
)
def test_every_estimator_and_optimizer_learns_there(device, estimator, optimizer, precision):
    model, guide, x, y = small(device)
    lr = 0.5 if optimizer == "ivon" else 1e-2
    changes = {"estimator": estimator, "optimizer": optimizer, "precision": precision, "epochs": 20, "lr": lr}
    history = fit(model, guide, x, y, **{**SETTINGS, **changes})
    assert history[-1]["loss"] < history[0]["loss"]


def test_a_deterministic_training_has_the_numbers_of_the_cpu(device):
    found = []
    for place in (torch.device("cpu"), device):
        model, guide, x, y = small(place, deterministic=True)
        found.append(fit(model, guide, x, y, **SETTINGS))
    for one, other in zip(*found, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.parametrize("method", ["draws", "layerwise", "moments"])
def test_a_prediction_is_the_cpus(device, method):
    model, guide, x, y = small(torch.device("cpu"))
    fit(model, guide, x, y, **SETTINGS)
    found = []
    for place in (torch.device("cpu"), device):
        parts = [copy.deepcopy(part).to(place) for part in (model, guide)]
        settings = {"num_samples": 1 if method == "moments" else 300, "method": method, "progress": False}
        found.append(predict(parts[0].net, parts[1], x.to(place), y.to(place), **settings).mean_probs)
    # Its random numbers are its own.
    torch.testing.assert_close(*found, rtol=0, atol=1e-4 if method == "moments" else 0.03)


def test_a_training_that_stopped_there_goes_on_bitwise(device, tmp_path):
    def train(folder, stop_at):
        calls = iter(range(100))
        model, guide, x, y = small(device)
        try:
            fit(model, guide, x, y, **SETTINGS, folder=folder, should_stop=lambda: next(calls) == stop_at)
        except Interrupted:
            return train(folder, None)
        return load_file(sorted((folder / "checkpoints").iterdir())[-1])

    whole, parts = train(tmp_path / "whole", None), train(tmp_path / "parts", 3)
    assert f"random.{device.type}" in whole
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_what_goes_bad_there_is_named(device):
    model, guide, x, y = small(device)
    with torch.no_grad():
        model.net[4].bias.fill_(float("nan"))
    with pytest.raises(Diverged, match=r"step 1 .*net\.4\.bias"):
        fit(model, guide, x, y, **SETTINGS)


@pytest.mark.skipif(GPU, reason="a GPU does not count")
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_a_step_waits_for_the_device_only_when_all_its_gradients_are_asked_for(device, backend, estimator):
    waits = []
    for epochs in (1, 3):
        model, guide, x, y = small(device)
        before = len(backend.waits)
        fit(model, guide, x, y, **{**SETTINGS, "epochs": epochs}, estimator=estimator)
        waits.append(len(backend.waits) - before)
    # The terms, the number of correct answers and the gradient's norm.
    assert (waits[1] - waits[0]) / (2 * 3) == 3
