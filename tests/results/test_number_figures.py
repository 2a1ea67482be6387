"""The figures of numbers, counts and labels of yes or no: what the axes show is what the result holds."""

import dataclasses

import numpy as np
import pytest
import torch
import xarray as xr
from class_predictives import of_classes
from PIL import Image
from small_regressions import regression

from ppl_bnn import fit, metrics, number_metrics, predict, sweep, sweep_to_inference_data, to_inference_data
from ppl_bnn.errors import UserError
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures import numbers
from ppl_bnn.results.figures.number_pruning import draw_number_pruning
from ppl_bnn.results.figures.numbers import draw_number_figures
from ppl_bnn.results.figures.predictive import draw_figures, reliability_diagram, training_curves
from ppl_bnn.results.idata import load

pytestmark = pytest.mark.any_python
ALL = {"bands", "predicted_observed", "quantile_calibration", "pit"}


def result(path, kind="numbers", *, columns=1, keep=None, **keywords):
    model, guide, x, y = regression(kind, columns=columns, count=100)
    found = predict(model, guide, x, y, num_samples=60, keep=keep, progress=False)
    names = ["age (years)", "size (m²)", "rooms"][:columns]
    attrs = {"title": "houses", "y_label": "price ($)"}
    netcdf.save(to_inference_data(found, **{"x": x, "feature_names": names, "attrs": attrs, **keywords}), path)
    return found, x, y


def groups_of(path):
    return netcdf.groups_of(load(path))


@pytest.mark.parametrize(
    ("kind", "columns", "expected"),
    [("numbers", 1, ALL), ("numbers", 3, ALL), ("pairs", 1, ALL), ("counts", 1, ALL), ("labels", 2, {"reliability"})],
)
def test_every_figure_is_drawn_from_the_file_alone(tmp_path, kind, columns, expected):
    result(tmp_path / "predictive.nc", kind, columns=columns)
    paths = draw_number_figures(tmp_path / "predictive.nc", tmp_path)
    assert {path.stem for path in paths} == expected
    for path in paths:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_bands_are_the_intervals_of_the_predictive_in_the_order_of_the_input(tmp_path):
    found, x, y = result(tmp_path / "p.nc")
    figure = numbers.bands(groups_of(tmp_path / "p.nc"), "houses", "price ($)")
    (axis,) = figure.axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("age (years)", "price ($)")
    order = x[:, 0].argsort(stable=True)
    mean, observed = axis.lines
    np.testing.assert_allclose(mean.get_xydata(), torch.stack([x[order, 0], found.mean[order]], 1), rtol=1e-5)
    np.testing.assert_allclose(observed.get_ydata(), y[order], rtol=1e-5)
    for area, (level, of) in zip(axis.collections, ((0.9, "y"), (0.5, "y"), (0.9, "mean")), strict=True):
        corners = area.get_paths()[0].vertices
        for bound in found.interval(level, of=of):
            for at in (0, 50, 99):
                corner = [float(x[order[at], 0]), float(bound[order[at]])]
                assert np.abs(corners - corner).sum(1).min() < 1e-5


def test_with_several_columns_the_one_that_goes_with_the_mean_is_shown(tmp_path):
    result(tmp_path / "p.nc", columns=3)
    groups = groups_of(tmp_path / "p.nc")
    (axis,) = numbers.bands(groups, "houses", "y").axes
    assert axis.get_xlabel() == "age (years)"
    (axis,) = numbers.bands(groups, "houses", "y", column=2).axes
    assert axis.get_xlabel() == "rooms"


def test_predicted_against_observed_counts_those_inside(tmp_path):
    found, _, y = result(tmp_path / "p.nc", "pairs")
    axes = numbers.predicted_against_observed(groups_of(tmp_path / "p.nc"), "houses", "price").axes
    lower, upper = found.interval(0.9)
    for at, axis in enumerate(axes):
        inside = number_metrics.coverage(lower[:, at], upper[:, at], y[:, at])
        assert f"{100 * inside:.0f}% of 100 inside" in axis.get_title()
        assert f"RMSE {number_metrics.rmse(found.mean[:, at], y[:, at]):.3g}" in axis.get_title()
        assert axis.get_ylabel() == f"observed price[{at}]"


@pytest.mark.parametrize("kind", ["numbers", "counts"])
def test_calibration_and_pit_are_those_of_the_draws(tmp_path, kind):
    found, _, y = result(tmp_path / "p.nc", kind)
    groups = groups_of(tmp_path / "p.nc")
    pit, upper = number_metrics.pit_limits(found.samples, y)
    (axis,) = numbers.quantile_calibration(groups, "houses").axes
    shares = number_metrics.observed_shares(pit, upper).numpy()
    np.testing.assert_allclose(axis.lines[1].get_ydata(), shares, atol=1e-9)
    assert (np.diff(shares) >= 0).all()
    assert shares[0] < shares[-1]
    (axis,) = numbers.pit_histogram(groups, "houses").axes
    heights = [bar.get_height() for bar in axis.patches[-5:]]
    assert sum(heights) / 5 == pytest.approx(1)
    assert heights[0] == pytest.approx(5 * float(number_metrics.observed_shares(pit, upper, levels=[0.2])))


def test_draws_of_some_examples_are_enough(tmp_path):
    found, *_ = result(tmp_path / "p.nc", keep=torch.arange(10))
    assert {path.stem for path in draw_number_figures(tmp_path / "p.nc", tmp_path)} == ALL
    for one, limits in zip(numbers.pit_of(groups_of(tmp_path / "p.nc")), found.pit, strict=True):
        np.testing.assert_allclose(one, limits, rtol=1e-6)


def test_many_outputs_are_shown_together(tmp_path):
    model, guide, x, y = regression("pairs", count=50)
    found = predict(model, guide, x, y, num_samples=20, progress=False)
    many = {"sums": {name: part.repeat(1, 3) for name, part in found.sums.items()}, "y": y.repeat(1, 3)}
    many |= {name: getattr(found, name).repeat(1, 1, 3) for name in ("means", "samples")}
    many |= {name: getattr(found, name).repeat(1, 3) for name in ("squares", "reference")}
    netcdf.save(to_inference_data(type(found)(**{**vars(found), **many}), x=x), tmp_path / "p.nc")
    (column,) = numbers.columns_of(groups_of(tmp_path / "p.nc"), "y")
    assert len(column.y) == 300
    np.testing.assert_allclose(column.y[column.where == 7], y[7].repeat(3), rtol=1e-6)
    assert {path.stem for path in draw_number_figures(tmp_path / "p.nc", tmp_path)} == ALL


def test_reliability_of_labels_is_of_the_probability_of_yes(tmp_path):
    found, _, y = result(tmp_path / "p.nc", "labels", columns=2)
    figure = numbers.binary_reliability(groups_of(tmp_path / "p.nc"), "houses")
    assert f"ECE {metrics.binary_ece(found.mean, y):.4f}" in figure.get_suptitle()
    groups = groups_of(tmp_path / "p.nc")
    groups["observed_data"]["y"][:30] = -100
    figure = numbers.binary_reliability(groups, "houses")
    assert f"ECE {metrics.binary_ece(found.mean[30:], y[30:]):.4f}" in figure.get_suptitle()


def test_reliability_of_pixels_pools_those_that_are_not_ignored(tmp_path):
    found = of_classes(torch.rand(3, 12, 2).softmax(-1), torch.arange(12) % 2)
    netcdf.save(to_inference_data(found), tmp_path / "p.nc")
    groups = groups_of(tmp_path / "p.nc")
    expected = reliability_diagram(groups, "pixels").get_suptitle()
    probs, labels = groups["uncertainty"]["mean_probs"].values, groups["observed_data"]["y"].values
    extra = (np.concatenate([probs, probs[:4]]).reshape(4, 4, 2), np.concatenate([labels, [-100] * 4]).reshape(4, 4))
    pixels = {
        "uncertainty": xr.Dataset({"mean_probs": (("obs_id", "y_dim_0", "class"), extra[0])}),
        "observed_data": xr.Dataset({"y": (("obs_id", "y_dim_0"), extra[1])}),
    }
    assert reliability_diagram(pixels, "pixels").get_suptitle() == expected


def test_training_and_layers_are_drawn_where_the_result_has_them(tmp_path):
    model, guide, x, y = regression()
    found = predict(model, guide, x, num_samples=5, progress=False)
    log = fit(model, guide, x, y, epochs=3, progress=False)
    netcdf.save(to_inference_data(found, guide=guide, history=log), tmp_path / "p.nc")
    assert {path.stem for path in draw_number_figures(tmp_path / "p.nc", tmp_path)} == {"training", "snr"}
    groups = groups_of(tmp_path / "p.nc")
    (axis,) = training_curves(groups, "houses").axes
    assert axis.get_yscale() == "log"
    for name in ("loss", "nll"):
        groups["training"][name] = groups["training"][name] - 10
    assert training_curves(groups, "houses").axes[0].get_yscale() == "linear"


def test_classes_of_tabular_data_are_drawn_without_images_or_labels(tmp_path):
    found = of_classes(torch.rand(3, 12, 2).softmax(-1), torch.arange(12) % 2)
    for one, expected in ((found, {"reliability"}), (dataclasses.replace(found, y=None), set())):
        netcdf.save(to_inference_data(one, x=torch.rand(12, 4)), tmp_path / "p.nc")
        assert {path.stem for path in draw_figures(tmp_path / "p.nc", None, tmp_path)} == expected


def test_without_intervals_or_inputs_there_is_less_to_draw(tmp_path):
    model, guide, x, y = regression()
    for keywords, y_of, expected in (
        ({"method": "moments"}, y, {"predicted_observed"}),
        ({"num_samples": 5}, y, ALL - {"bands"}),
        ({"num_samples": 5}, None, set()),
    ):
        found = predict(model, guide, x, y_of, progress=False, **keywords)
        netcdf.save(to_inference_data(found), tmp_path / "p.nc")
        assert {path.stem for path in draw_number_figures(tmp_path / "p.nc", tmp_path)} == expected


def test_a_result_of_classes_is_refused(tmp_path):
    found = of_classes(torch.rand(3, 12, 2).softmax(-1), torch.arange(12) % 2)
    netcdf.save(to_inference_data(found), tmp_path / "p.nc")
    with pytest.raises(UserError, match="is of classes; draw it by"):
        draw_number_figures(tmp_path / "p.nc", tmp_path)


def test_a_sweep_of_numbers_has_a_figure(tmp_path):
    model, guide, x, y = regression()
    levels = sweep(model, guide, x, y, fractions=(0.0, 0.5), thresholds=(), num_samples=10, progress=False)
    netcdf.save(sweep_to_inference_data(levels, x=x, guide=guide), tmp_path / "pruning.nc")
    (path,) = draw_number_pruning(tmp_path / "pruning.nc", tmp_path)
    assert path.name == "pruning.png"
    assert path.stat().st_size > 10_000
