"""Draws of another generator are drawn anew, and never added to."""

import dataclasses

import h5py
import pytest
import torch
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, predict
from ppl_bnn.native.normals import GENERATOR
from ppl_bnn.results import netcdf
from ppl_bnn.results.saved_draws import read_predictive


def as_of_version_0_1_0(path):
    """A result without the generator's name."""
    with h5py.File(path, "r+") as file:
        assert file.attrs["generator"]
        del file.attrs["generator"]


def test_draws_of_another_generator_are_not_added_to():
    x, y = torch.randn(6, 4), torch.zeros(6, dtype=torch.long)
    net = bayesian(nn.Sequential(nn.Linear(4, 2)))
    guide = MeanFieldNormal(Classifier(net, 6), x, y)
    before = predict(net, guide, x, y, num_samples=3, progress=False)
    assert before.generator == GENERATOR
    assert len(predict(net, guide, x, y, num_samples=5, progress=False, so_far=before).log_likelihood) == 5
    before = dataclasses.replace(before, generator="xoshiro")
    with pytest.raises(ValueError, match=f"so_far was drawn by the generator xoshiro, and this .* by {GENERATOR}"):
        predict(net, guide, x, y, num_samples=5, progress=False, so_far=before)


@pytest.mark.slow
@pytest.mark.usefixtures("drawings")
def test_draws_of_another_generator_are_reported_and_left_alone_but_not_added_to(call, run_folder):
    out = run_folder / "out"
    assert call("--stages", "train,predict,prune")[0] == 0
    assert netcdf.read_attrs(out / "predictive.nc")["generator"] == GENERATOR
    assert read_predictive(out / "predictive.nc").generator == GENERATOR
    for name in ("predictive.nc", "pruning.nc"):
        as_of_version_0_1_0(out / name)
    assert read_predictive(out / "predictive.nc").generator == "of version 0.1.0"
    assert call("--stages", "report")[0] == 0
    code, lines = call("--stages", "predict,prune", "--predict.num_samples", 8)
    assert code == 0
    text = "\n".join(lines)
    assert f"the draws in predictive.nc are of another generator than {GENERATOR}; starting again" in text
    assert "resuming from" not in text
    assert "pruning.nc is up to date" in text
    assert len(read_predictive(out / "predictive.nc").log_likelihood) == 8
    code, lines = call("--stages", "predict,prune", "--predict.num_samples", 10)
    assert code == 0
    assert "resuming from the 8 draws in predictive.nc" in "\n".join(lines)
