"""Predictives of numbers and counts, saved and read back: further draws are bitwise those of a single run."""

import dataclasses

import numpy as np
import pytest
import torch
from small_regressions import regression

from ppl_bnn import predict, to_inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.saved_draws import read_predictive

pytestmark = pytest.mark.any_python


def fields(predictive):
    for field in dataclasses.fields(predictive):
        value = getattr(predictive, field.name)
        if field.name == "sums":
            yield from value.items()
        elif field.name == "sketch" and value is not None:
            yield from value.state().items()
        elif isinstance(value, torch.Tensor):
            yield field.name, value


@pytest.mark.parametrize("kind", ["numbers", "pairs", "counts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "keywords", [{}, {"keep": [1, 5], "log_likelihood": False, "sampling": "antithetic"}, {"tolerance": 0.03}]
)
def test_draws_added_to_a_saved_predictive_are_those_of_a_single_run(tmp_path, kind, dtype, keywords):
    model, guide, x, y = regression(kind, count=20, epochs=2, dtype=dtype)
    keywords = {**keywords, "seed": 7, "progress": False}
    if "keep" in keywords:
        keywords["keep"] = torch.tensor(keywords["keep"])
    few = predict(model, guide, x, y, num_samples=20, **keywords)
    netcdf.save(to_inference_data(few, x=x, guide=guide), tmp_path / "p.nc")
    back = read_predictive(tmp_path / "p.nc", model.likelihood)
    assert back.seed == 7
    at_once = predict(model, guide, x, y, num_samples=40, **keywords)
    resumed = predict(model, guide, x, y, num_samples=40, so_far=back, **keywords)
    expected = dict(fields(at_once))
    assert expected.keys() == dict(fields(resumed)).keys()
    for name, value in fields(resumed):
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value.nan_to_num(-9), expected[name].nan_to_num(-9)), name


def test_counts_are_whole_numbers_in_the_file_and_come_back_as_they_were(tmp_path):
    model, guide, x, y = regression("counts")
    found = predict(model, guide, x, y, num_samples=20, progress=False)
    idata = to_inference_data(found, x=x)
    assert idata["posterior_predictive"]["y"].dtype == idata["observed_data"]["y"].dtype == np.int32
    netcdf.save(idata, tmp_path / "p.nc")
    back = read_predictive(tmp_path / "p.nc", model.likelihood)
    assert back.samples.dtype == back.y.dtype == torch.float32
    assert torch.equal(back.samples, found.samples)
    assert torch.equal(back.y, y)
