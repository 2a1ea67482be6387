"""A run on a device that is not the CPU: a GPU where there is one, else one that is as strict and no faster."""

import copy
import inspect
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial, wraps
from multiprocessing import get_context

import pyro
import pytest
import torch
from pretend_device import AVAILABLE, NAME, pretend_device
from safetensors.torch import load_file
from torch import nn

from ppl_bnn import Classifier, KLScaledELBO, MeanFieldNormal, TrainingStep, bayesian, fit, predict, prune
from ppl_bnn.data import as_examples
from ppl_bnn.data.examples import batches
from ppl_bnn.errors import Diverged, Interrupted, UserError
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.inference.data_parallel import rank_seed
from ppl_bnn.inference.log import BatchAccuracy
from ppl_bnn.run import main

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not (GPU or AVAILABLE), reason="needs a GPU, or a torch that can pretend")
SETTINGS = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "progress": False}
TESTS = {}


@pytest.fixture(scope="module")
def process():
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        yield executor


def there(test):
    """Call test(device, backend, ...) in a process of its own: autograd knows the devices of its first use alone."""
    TESTS[test.__name__] = test

    @wraps(test)
    def run(process, **arguments):
        process.submit(call, test.__name__, arguments).result()

    first, *rest = inspect.signature(test).parameters.values()
    run.__signature__ = inspect.Signature([first.replace(name="process"), *rest[1:]])
    return run


def call(name, arguments):
    pyro.clear_param_store()
    torch.manual_seed(0)
    # Sums in one order and in float32 throughout, which cuDNN does not promise unless told.
    exact = torch.backends.cudnn.flags(deterministic=True, allow_tf32=False)
    with exact, nullcontext() if GPU else pretend_device() as backend:
        TESTS[name](torch.device("cuda" if GPU else NAME), backend, **arguments)


def small(device, deterministic=False, bias=True, bayesian_bias=False):
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(1, 4, 3, padding=1, bias=bias), nn.Linear(256, 3, bias=bias)
    net = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), linear)
    model = Classifier(net if deterministic else bayesian(net, bayesian_bias=bayesian_bias), 24)
    x, y = torch.rand(24, 1, 8, 8), torch.arange(24) % 3
    guide = MeanFieldNormal(model, x[:1], y[:1], init_scale=0.05)
    return model.to(device), guide.to(device), x.to(device), y.to(device)


@pytest.mark.skipif(GPU, reason="a GPU needs no proof that it is strict")
@there
def test_the_stand_in_is_as_strict_as_a_gpu(device, backend):
    there = torch.rand(3, device=device)
    with pytest.raises(RuntimeError, match=r"two devices: \[3\] on pretend, \[3\] on cpu"):
        there + torch.rand(3)
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=device, generator=torch.Generator())
    assert (there + 1).device.type == NAME
    assert torch.randn(3, device=device, generator=torch.Generator(device)).device.type == NAME
    assert backend.waits == []
    assert there.cpu().tolist() == there.tolist()
    assert len(backend.waits) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "stages"), [("mnist-lenet", "train,posterior,predict,shift,report"), ("mnist-fc-sparse", "train,prune")]
)
@there
def test_every_stage_of_a_run_works_there(device, backend, tmp_path, data_dir, run, stages):
    out = tmp_path / "out"
    arguments = [
        f"runs/{run}", "--device", str(device), "--data.dir", str(data_dir), "--data.num_train", "200",
        "--data.num_test", "20", "--train.epochs", "1", "--train.precision", "bfloat16", "--channels_last", "true",
        "--predict.num_samples", "2", "--shift.num_samples", "2", "--pruning.num_samples", "2",
        "--pruning.fractions", "[0.9]", "--stages", stages, "--quiet", "--out", str(out),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert (out / ("metrics.json" if "report" in stages else "pruning.nc")).exists()


@pytest.mark.parametrize(
    ("estimator", "optimizer", "precision"),
    [
        *((name, "adam", "bfloat16") for name in ESTIMATORS),
        ("plain", "ivon", "float32"),
        ("plain", "rmsprop", "float32"),
    ],
)
@there
def test_every_estimator_and_optimizer_learns_there(device, backend, estimator, optimizer, precision):
    model, guide, x, y = small(device)
    lr = 0.5 if optimizer == "ivon" else 1e-2
    changes = {"estimator": estimator, "optimizer": optimizer, "precision": precision, "epochs": 20, "lr": lr}
    history = fit(model, guide, x, y, **{**SETTINGS, **changes})
    assert history[-1]["loss"] < history[0]["loss"]


@there
def test_a_deterministic_training_has_the_numbers_of_the_cpu(device, backend):
    found = []
    for place in (torch.device("cpu"), device):
        model, guide, x, y = small(place, deterministic=True)
        found.append(fit(model, guide, x, y, **SETTINGS))
    for one, other in zip(*found, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.parametrize("kind", ["usual", "pruned", "no_bias", "bayesian_bias"])
@pytest.mark.parametrize("method", ["draws", "layerwise", "moments"])
@there
def test_a_prediction_is_the_cpus(device, backend, method, kind):
    model, guide, x, y = small(torch.device("cpu"), bias=kind != "no_bias", bayesian_bias=kind == "bayesian_bias")
    fit(model, guide, x, y, **SETTINGS)
    pruned = prune(guide, fraction=0.3).guide if kind == "pruned" else guide
    found = []
    for place in (torch.device("cpu"), device):
        parts = [copy.deepcopy(part).to(place) for part in (model, pruned)]
        settings = {"num_samples": 1 if method == "moments" else 20, "method": method, "progress": False}
        found.append(predict(parts[0].net, parts[1], x.to(place), y.to(place), **settings).mean_probs)
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


@there
def test_data_on_the_cpu_are_predicted_on_the_device(device, backend):
    model, guide, x, y = small(device)
    settings = {"num_samples": 5, "progress": False}
    expected = predict(model.net, guide, x, y, **settings)
    pixels = (255 * x.cpu()).byte()
    by_pixels = predict(model.net, guide, (pixels.to(device).float() / 255), y, **settings)
    for data, right in (
        ((x.cpu().numpy(), y.cpu().numpy()), expected),
        (as_examples((x.cpu(), y.cpu()), transform=lambda x: x), expected),
        (as_examples((pixels, y.cpu()), transform=lambda x: x.float() / 255), by_pixels),
    ):
        found = predict(model.net, guide, *(data if isinstance(data, tuple) else (data,)), **settings)
        torch.testing.assert_close(found.mean_probs, right.mean_probs)
        assert found.nll == pytest.approx(right.nll, rel=1e-5)


@there
def test_a_training_that_stopped_there_goes_on_bitwise(device, backend, tmp_path):
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


@pytest.mark.parametrize(("log_every", "step"), [(1, 2), (50, 4)])
@there
def test_what_goes_bad_there_is_named(device, backend, log_every, step):
    model, guide, x, y = small(device)

    def spoil():
        with torch.no_grad():
            model.net[4].bias.fill_(float("nan"))
        return False

    # It is asked where steps are read: after each, or after an epoch of three.
    with pytest.raises(Diverged, match=rf"step {step} .*net\.4\.bias"):
        fit(model, guide, x, y, **SETTINGS, should_stop=spoil, log_every=log_every)
    x[5] = float("inf")
    with pytest.raises(UserError, match=r"^example 5: its inputs have NaN or infinite values \(step [123]\)"):
        fit(*small(device)[:2], x, y, **SETTINGS, log_every=log_every)


@pytest.mark.skipif(GPU, reason="a GPU does not count")
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@there
def test_a_step_waits_for_the_device_after_back_propagation_alone(device, backend, estimator):
    model, guide, x, y = small(device)
    elbo = KLScaledELBO(24)
    for step in range(2):
        backend.waits.clear()
        with pyro.validation_enabled(False), ESTIMATORS[estimator](), BatchAccuracy() as accuracy:
            elbo.differentiable_loss(model, guide, x, y).backward()
        # The prior's scale is looked at once.
        assert step == 0 or backend.waits == []
    assert elbo.terms.loss > 0 <= accuracy.correct
    assert len(backend.waits) == 2


@pytest.mark.skipif(GPU, reason="a GPU does not count")
@pytest.mark.parametrize("optimizer", ["adam", "ivon"])
@pytest.mark.parametrize("estimator", ["plain", "groups", "flipout", "local"])
@there
def test_a_step_waits_for_the_device_where_it_is_read_alone(device, backend, estimator, optimizer):
    waits = {}
    for epochs, log_every in ((1, 50), (4, 50), (4, 2)):
        model, guide, x, y = small(device)
        backend.waits.clear()
        how = {"estimator": estimator, "optimizer": optimizer, "log_every": log_every, "clip_norm": 10.0}
        fit(model, guide, x, y, **{**SETTINGS, "epochs": epochs, "batch_size": len(x) // 4, **how})
        waits[epochs, log_every] = len(backend.waits)
    # Four steps an epoch, whose end is read in any case.
    assert waits[4, 50] - waits[1, 50] == 3
    assert waits[4, 2] - waits[4, 50] == 4


@pytest.mark.skipif(GPU, reason="a GPU does not count")
@there
def test_a_step_through_pyro_waits_for_the_device_three_times(device, backend):
    waits = []
    for epochs in (1, 3):
        model, guide, x, y = small(device)
        guide = prune(guide, fraction=0.3).guide
        backend.waits.clear()
        fit(model, guide, x, y, **{**SETTINGS, "epochs": epochs})
        waits.append(len(backend.waits))
    # The terms, the number of correct answers and the gradient's norm.
    assert (waits[1] - waits[0]) / (2 * 3) == 3


@there
def test_a_training_is_steered_there_as_on_a_cpu(device, backend):
    noted = []

    class Noting:
        def on_step(self, training):
            noted.append(training.step)

    def steered(validated, **changes):
        model, guide, x, y = small(device)
        more = {"validation": (x.cpu(), y.cpu()), "callbacks": [Noting()], "patience": 5} if validated else {}
        history = fit(model, guide, x, y, **SETTINGS | {"epochs": 3}, estimator="plain", **changes, **more)
        return [{name: row[name] for name in ("loss", "nll", "kl", "lr")} for row in history], history

    scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    expected, _ = steered(False, scheduler=scheduler)
    found, history = steered(True, scheduler=scheduler)
    assert found == expected
    assert noted == list(range(1, 10))
    assert all(0 <= row["val_accuracy"] <= 1 for row in history)


@pytest.mark.parametrize("optimizer", ["adam", "ivon", "torch.optim:SGD"])
@there
def test_several_batches_an_update_are_one_large_one_there_too(device, backend, optimizer):
    found = []
    for batch_size, accumulate in ((4, 3), (12, 1)):
        model, guide, x, y = small(device)
        # Its statistics would be of each batch.
        model.train()
        model.net[1].eval()
        changes = {"batch_size": batch_size, "accumulate": accumulate, "optimizer": optimizer}
        history = fit(model, guide, x, y, **SETTINGS | changes, estimator="plain")
        found.append([[row[name] for name in ("loss", "nll", "kl", "accuracy")] for row in history])
    assert found[0] == [pytest.approx(row, rel=1e-4) for row in found[1]]


@pytest.mark.parametrize("optimizer", ["adam", "ivon", "torch.optim:SGD"])
@there
def test_a_loop_of_ones_own_is_fit_there_too(device, backend, optimizer):
    model, guide, x, y = small(device)
    how = {"estimator": "plain", "optimizer": optimizer, "lr": 0.01}
    history = fit(model, guide, x, y, epochs=3, batch_size=24, progress=False, kl_weight=0.5, **how)
    losses = []
    for halves in (False, True):
        model, guide, x, y = small(device)
        step = TrainingStep(model, guide, x[:4], y[:4], num_data=24, **how)
        torch.manual_seed(rank_seed(0, 0))
        for epoch in range(3):
            (rows,) = batches(24, 24, epoch=epoch, seed=0, device=device)
            if halves:
                step.gradients(x[rows], y[rows], kl_weight=0.5)
            losses.append(float(step.update().loss if halves else step(x[rows], y[rows], kl_weight=0.5).loss))
    assert losses == pytest.approx([row["loss"] for row in history] * 2, rel=1e-5)
