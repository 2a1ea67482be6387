"""Priors of runs: those with parameters of their own, and a finished run's posterior (--model.prior_from)."""

import json
import shutil

import pytest
import torch
from refusals import assert_refused
from torch import nn

from ppl_bnn import bayesian
from ppl_bnn.experiment.setup import opened
from ppl_bnn.inference import checkpoint
from ppl_bnn.models import parse_prior, site_priors
from ppl_bnn.models.priors import prior_text

DEFAULT = ("--model.prior", "normal(0, 1)")


@pytest.mark.parametrize(
    ("prior", "arguments"),
    [
        pytest.param(
            "learnt_normal(0.1)",
            ["--pruning.criterion", "kl", "--train.optimizer", "ivon", "--train.lr", "0.1"],
            marks=pytest.mark.slow,
        ),
        pytest.param("ard(half_cauchy(0.1))", ["--predict.train_log_likelihood", "true"], marks=pytest.mark.slow),
        ("horseshoe(0.1)", ["--pruning.criterion", "evidence"]),
    ],
)
def test_a_prior_with_parameters_of_its_own_goes_through_every_stage(call, run_folder, request, prior, arguments):
    # The figures of one are enough.
    if prior != "horseshoe(0.1)":
        request.getfixturevalue("drawings")
    code, lines = call("--model.prior", prior, *arguments)
    assert code == 0, lines
    before = {path: path.read_bytes() for path in (run_folder / "out").glob("*.nc")}
    assert {path.name for path in before} >= {"predictive.nc", "pruning.nc"}
    code, lines = call("--model.prior", prior, *arguments)
    assert any("train: complete already" in line for line in lines)
    assert before == {path: path.read_bytes() for path in before}
    layers = json.loads((run_folder / "out" / "manifest.json").read_text())["layers"]
    assert {layer["prior"] for layer in layers[:3]} == priors_of(prior)


def priors_of(text):
    net = bayesian(nn.Linear(6, 2), parse_prior(text))
    return {prior_text(net._random["weight"].prior)}


def trained(call, out, *arguments):
    code, lines = call("--stages", "train", *DEFAULT, "--out", out, *arguments)
    assert code == 0, lines


@pytest.mark.usefixtures("drawings")
def test_a_finished_runs_posterior_is_the_prior_of_the_next(call, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    trained(call, first)
    next_run = (*DEFAULT, "--model.prior_from", first, "--out", second)
    assert call(*next_run)[0] == 0
    assert call(*next_run)[0] == 0
    run = opened(second)
    before = opened(first)
    checkpoint.restore(before.saved(), model=before.model, guide=before.guide)
    for site, prior in site_priors(run.model, *run.example()).items():
        loc, scale = before.guide.loc_scale(site)
        torch.testing.assert_close(prior.base_dist.mean, loc.detach())
        torch.testing.assert_close(prior.base_dist.stddev, scale.detach())
    meta = checkpoint.read_meta(checkpoint.find(second / "checkpoints"))
    assert meta["origin"]["model.prior_from"] == {"step": before.saved().step, "crc32": before.saved().meta["crc32"]}
    layers = json.loads((second / "manifest.json").read_text())["layers"]
    assert all(layer["prior"].startswith("Normal(loc=[") for layer in layers)

    # Another posterior in the same place is another prior.
    shutil.rmtree(first)
    assert_refused(call(*next_run), "checkpoint", "is not there")
    trained(call, first, "--train.seed", "1")
    assert_refused(call(*next_run), "belongs to another run: model.prior_from.crc32: saved")


def test_what_cannot_be_a_prior_is_refused_in_one_line(call, tmp_path):
    first, twin = tmp_path / "first", tmp_path / "twin"
    trained(call, first)
    trained(call, twin, "--model.deterministic", "true")
    out = ("--out", tmp_path / "next")
    assert_refused(call("--model.prior_from", first, *out), "model.prior_from takes the place of model.prior, got both")
    start = (*DEFAULT, "--model.prior_from")
    assert_refused(call(*start, first, "--model.deterministic", "true", *out), "no effect on a deterministic network")
    assert_refused(call(*start, tmp_path / "none", *out), "checkpoint", "is not there")
    assert_refused(call(*start, twin, *out), "has no Normal posterior of random weights")
    assert_refused(
        call(*start, first, "--model.name", "lenet", *out),
        "does not fit this network",
        "the prior's pattern 'fc3.weight' matches no parameter",
    )
    assert_refused(
        call(*start, first, "--model.bayesian_bias", "true", *out), "does not fit this network", "'fc1.bias'"
    )
    start_of_training = first / "checkpoints" / "step-00000000.safetensors"
    last = checkpoint.find(first / "checkpoints")
    shutil.move(last, tmp_path / last.name)
    assert start_of_training.exists()
    assert_refused(call(*start, first, *out), "is not finished (step ", "finish its training")
