"""InferenceData of any likelihood: its groups, ArviZ's functions as its tutorials call them, saved and resumed."""

import importlib.metadata

import arviz as az
import matplotlib as mpl
import numpy as np
import pytest
import torch
import xarray as xr
from class_predictives import of_classes
from small_regressions import regression

from ppl_bnn import Images, kl_by_site, number_metrics, predict, sweep, sweep_to_inference_data, to_inference_data
from ppl_bnn.errors import UserError
from ppl_bnn.experiment.merging import merge
from ppl_bnn.prediction.log_density import TrainLogLikelihood
from ppl_bnn.results import netcdf
from ppl_bnn.results.saved_draws import read_predictive
from ppl_bnn.results.training import train_to_inference_data

pytestmark = pytest.mark.any_python
mpl.use("Agg")
ARVIZ_1 = int(importlib.metadata.version("arviz").split(".")[0]) >= 1
HISTORY = [{"epoch": e, "loss": 2.0 / e, "nll": 1.5 / e} for e in (1, 2, 3)]


def opened(path):
    return az.from_netcdf(path if ARVIZ_1 else str(path))


@pytest.fixture(scope="module", params=["numbers", "counts", "classes"])
def two_files(request, tmp_path_factory):
    """Two results of the same data, as ArviZ reads them back."""
    found = []
    for seed in (0, 1):
        path = tmp_path_factory.mktemp(request.param) / f"{seed}.nc"
        if request.param == "classes":
            found.append(path)
            probs = torch.randn(50, 40, 3, generator=torch.Generator().manual_seed(seed)).softmax(-1)
            model, guide, x, y = regression(count=40, seed=seed, epochs=1)
            predictive, y = of_classes(probs, torch.arange(40) % 3), y
            keywords = {"data": Images(x, predictive.labels, ("a", "b", "c"), "tabular", "test")}
        else:
            model, guide, x, y = regression(request.param, seed=seed)
            predictive = predict(model, guide, x, y, num_samples=50, seed=seed, progress=False)
            found.append(path)
            keywords = {"x": x, "feature_names": ["age (years)"]}
        kl = kl_by_site(model, guide, x, y)
        netcdf.save(to_inference_data(predictive, guide=guide, kl=kl, history=HISTORY, **keywords), path)
    return [opened(path) for path in found]


# Pareto's k of a few draws; ArviZ 0.23 calls matplotlib 3.11 and pandas 3 in ways that are to go.
@pytest.mark.filterwarnings(
    "ignore:Estimated shape:UserWarning",
    "ignore::matplotlib.MatplotlibDeprecationWarning",
    "ignore::DeprecationWarning:arviz",
    "ignore::FutureWarning",
)
def test_arvizs_functions_run_as_its_tutorials_call_them(two_files):
    a, b = two_files
    assert az.loo(a).elpd < 0 if ARVIZ_1 else az.loo(a).elpd_loo < 0
    assert list(az.compare({"a": a, "b": b})["rank"]) == [0, 1]
    names = list(az.summary(a, kind="stats").index)
    assert names == list(a.posterior.data_vars)
    assert [name.removeprefix("norm_").split(".")[1] for name in names] == ["weight"] * len(names)
    if ARVIZ_1:
        az.plot_loo_pit(a)
        az.plot_ppc_dist(a, var_names=["y"], num_samples=5, kind="ecdf")
        az.plot_dist(a)
        if "mean" in a.posterior_predictive and a.observed_data["y"].dtype.kind == "i":
            az.plot_ppc_rootogram(a, var_names=["y"])
        return
    az.plot_loo_pit(a, y="y")
    az.plot_ppc(a, num_pp_samples=5, random_seed=0)
    az.plot_posterior(a)
    table = a.to_dataframe()
    assert len(table) == 50
    assert ("posterior", names[0]) in table.columns
    joined = az.concat(a, b, dim="chain")
    assert joined.posterior_predictive.sizes["chain"] == joined.uncertainty.sizes["chain"] == 2
    assert az.loo(joined).elpd_loo < 0
    assert (az.summary(joined)["r_hat"] < 2).any()


def test_the_kl_of_one_training_is_not_said_of_several():
    _, guide, x, _ = regression()
    found = of_classes(
        torch.rand(5, 60, 3, generator=torch.Generator().manual_seed(0)).softmax(-1), torch.arange(60) % 3
    )
    parts = [to_inference_data(found, x=x, guide=guide, kl={"0.weight": kl, "2.weight": 2.0}) for kl in (0.5, 1.5)]
    merged = merge(parts)
    assert merged["posterior"].sizes["chain"] == 2
    assert "kl" not in merged["posterior"]["norm_0.weight"].attrs
    assert merged["posterior"]["norm_2.weight"].attrs["kl"] == 2.0
    assert merged["layers"]["kl"].values.tolist() == [[0.5, 2.0], [1.5, 2.0]]


def test_log_likelihoods_of_training_data_have_y_of_any_shape():
    *_, y = regression("pairs", epochs=1)
    likelihood = TrainLogLikelihood(torch.randn(4, 60), torch.randn(4), torch.randn(4))
    idata = train_to_inference_data(likelihood, y)
    assert idata["observed_data"]["y"].dims == ("obs_id", "y_dim_0")
    np.testing.assert_array_equal(idata["log_likelihood"]["y"].values[0], likelihood.log_likelihood)


def test_results_that_were_joined_are_saved_and_read(two_files, tmp_path):
    if ARVIZ_1:
        pytest.skip("ArviZ 1.x has no concat")
    netcdf.save(az.concat(*two_files, dim="chain"), tmp_path / "joined.nc")
    assert netcdf.read_attrs(tmp_path / "joined.nc")["seed"] in (0, [0, 1])
    assert netcdf.read_group(tmp_path / "joined.nc", "uncertainty").sizes["chain"] == 2


def test_the_groups_hold_what_the_predictive_says():
    model, guide, x, y = regression("pairs", columns=3)
    found = predict(model, guide, x, y, num_samples=30, progress=False)
    kl = kl_by_site(model, guide, x, y)
    idata = to_inference_data(found, x=x, feature_names=["a", "b", "c"], guide=guide, kl=kl, attrs={"title": "waves"})
    drawn = idata["posterior_predictive"]
    assert drawn["mean"].dims == drawn["y"].dims == ("chain", "draw", "obs_id", "y_dim_0")
    np.testing.assert_array_equal(drawn["mean"].values[0], found.means)
    np.testing.assert_array_equal(drawn["y"].values[0], found.samples)
    np.testing.assert_array_equal(idata["log_likelihood"]["y"].values[0], found.log_likelihood)
    np.testing.assert_array_equal(idata["observed_data"]["y"].values, y)
    np.testing.assert_array_equal(idata["constant_data"]["x"].values, x)
    assert idata["constant_data"]["x_dim_0"].values.tolist() == ["a", "b", "c"]
    stats = idata["sample_stats"]
    np.testing.assert_allclose(stats["score"].values[0], -(found.means - y).square().mean((1, 2)), rtol=1e-5)
    said = idata["uncertainty"]
    assert all("chain" in variable.dims for variable in said.values())
    lower, upper = found.interval(0.5)
    np.testing.assert_allclose(said["interval"].sel(quantile=0.25)[0], lower, rtol=1e-6)
    np.testing.assert_allclose(said["interval"].sel(quantile=0.75)[0], upper, rtol=1e-6)
    lower, _ = found.interval(0.9, of="mean")
    np.testing.assert_allclose(said["mean_interval"].sel(quantile=0.05)[0], lower, rtol=1e-6)
    np.testing.assert_allclose(said["std"][0] ** 2, said["total"][0], rtol=1e-6)
    np.testing.assert_allclose(said["total"][0], said["aleatoric"][0] + said["epistemic"][0])
    for name, limits in zip(("pit_lower", "pit_upper"), number_metrics.pit_limits(found.samples, y), strict=True):
        np.testing.assert_allclose(said[name][0], limits)
    assert idata.attrs["likelihood"] == "Normal"
    assert idata.attrs["rmse"] == found.summary()["rmse"]
    assert idata.attrs["title"] == "waves"


def test_the_norms_are_of_the_weights_that_predicted():
    model, guide, x, y = regression()
    model.requires_grad_(False)
    for sampling in ("independent", "antithetic"):
        found = predict(model, guide, x, y, num_samples=6, seed=3, sampling=sampling, progress=False)
        group = to_inference_data(found, guide=guide, kl={"0.weight": 1.5})["posterior"]
        assert list(group.data_vars) == ["norm_0.weight", "norm_2.weight"]
        assert group["norm_0.weight"].attrs["kl"] == 1.5
        half = 2 if sampling == "antithetic" else 1
        for draw in range(6):
            weights = dict(guide.draw(draw // half, seed=3))
            if half == 2 and draw % 2:
                weights = {site: 2 * guide.loc_scale(site)[0] - value for site, value in weights.items()}
            hidden = torch.relu(x @ weights["0.weight"].T + model.net[0].bias)
            mean = (hidden @ weights["2.weight"].T + model.net[2].bias).squeeze(1)
            torch.testing.assert_close(found.means[draw], mean)
            for site, value in weights.items():
                assert float(group[f"norm_{site}"][0, draw]) == pytest.approx(float(value.detach().norm()), rel=1e-6)


class Latent:
    """Three latents beside a guide's weights, told apart by their numbers."""

    latents = ("tau", "outer/vector", "many")

    def __init__(self, guide):
        self.sites, self._guide = guide.sites, guide

    def draw_latents(self, index, *, seed=0, sign=1.0):
        tau = torch.tensor(index + 100.0 * seed)
        return {"tau": tau, "outer/vector": torch.arange(3.0) * index, "many": torch.full((50, 50), tau)}

    def draw(self, index, *, seed=0):
        return {**self._guide.draw(index, seed=seed), **self.draw_latents(index, seed=seed)}


def test_latents_that_are_no_weights_are_in_the_posterior():
    model, guide, x, y = regression()
    found = predict(model, guide, x, y, num_samples=4, seed=2, progress=False)
    group = to_inference_data(found, guide=Latent(guide), kl={"tau": 0.25}, norms=False)["posterior"]
    assert set(group.data_vars) == {"tau", "outer.vector", "norm_many"}
    np.testing.assert_allclose(group["norm_many"], 50 * group["tau"])
    assert group["tau"].values.tolist() == [[200.0, 201.0, 202.0, 203.0]]
    assert group["tau"].attrs["kl"] == 0.25
    assert group["outer.vector"].dims == ("chain", "draw", "outer.vector_dim_0")
    assert group["outer.vector"][0, 2].values.tolist() == [0, 2, 4]
    assert "norm_0.weight" in to_inference_data(found, guide=Latent(guide))["posterior"]


def test_labels_of_yes_and_no_have_no_dimension_of_classes():
    model, guide, x, y = regression("labels")
    found = predict(model, guide, x, y, num_samples=400, progress=False)
    idata = to_inference_data(found, x=x, guide=guide)
    drawn = idata["posterior_predictive"]
    assert drawn["probs"].dims == drawn["y"].dims == ("chain", "draw", "obs_id", "y_dim_0")
    assert set(np.unique(drawn["y"])) == {0, 1}
    error = (drawn["y"].mean(("chain", "draw")) - idata["uncertainty"]["mean_probs"][0]).values
    assert np.abs(error).max() < 5 * 0.5 / 400**0.5
    assert idata["observed_data"]["y"].dtype == np.int32
    assert idata["uncertainty"]["interval"].dims == ("chain", "obs_id", "y_dim_0", "quantile")


def test_what_the_predictive_lacks_is_left_out():
    model, guide, x, y = regression()
    unlabelled = predict(model, guide, x, num_samples=5, progress=False)
    groups = netcdf.groups_of(to_inference_data(unlabelled, guide=guide))
    assert set(groups) == {"posterior", "posterior_predictive", "uncertainty", "monte_carlo", "layers"}
    assert "pit_lower" not in groups["uncertainty"]
    short = predict(model, guide, x, y, num_samples=5, log_likelihood=False, progress=False)
    groups = netcdf.groups_of(to_inference_data(short))
    assert "log_likelihood" not in groups
    assert set(groups["sample_stats"]) == {"score"}
    moments = predict(model, guide, x, y, method="moments", progress=False)
    groups = netcdf.groups_of(to_inference_data(moments, guide=guide))
    assert "posterior" not in groups
    assert set(groups["posterior_predictive"]) == {"mean"}
    assert {"mean", "std", "total"} <= set(groups["uncertainty"])
    assert "interval" not in groups["uncertainty"]


@pytest.mark.parametrize("shape", [(), (2,), (3, 4), (2, 3, 4, 5)])
def test_x_of_any_shape_is_kept(shape):
    x = torch.rand(40, *shape)
    idata = to_inference_data(of_classes(torch.rand(3, 40, 2).softmax(-1), torch.arange(40) % 2), x=x.numpy())
    kept = idata["constant_data"]["x"]
    assert kept.dims == ("obs_id", *(f"x_dim_{at}" for at in range(len(shape))))
    np.testing.assert_array_equal(kept.values, x)
    assert idata["posterior_predictive"]["class"].values.tolist() == ["0", "1"]


def test_a_pruning_sweep_has_the_likelihoods_scores(tmp_path):
    model, guide, x, y = regression("pairs")
    levels = sweep(model, guide, x, y, fractions=(0.0, 0.5, 0.9), num_samples=10, keep=torch.arange(8), progress=False)
    netcdf.save(sweep_to_inference_data(levels, guide=guide, x=x, save_snr=True), tmp_path / "pruning.nc")
    group, drawn = (netcdf.read_group(tmp_path / "pruning.nc", name) for name in ("pruning", "posterior_predictive"))
    assert drawn["y"].dims == ("chain", "draw", "level", "obs_id", "y_dim_0")
    for at, level in enumerate(levels):
        np.testing.assert_array_equal(drawn["mean"].values[0, :, at], level.predictive.means)
        for name, value in level.predictive.scores().items():
            assert float(group[name][at]) == value
        np.testing.assert_allclose(group["epistemic"].values[at], level.predictive.uncertainties()[2])
    assert group["mean"].dims == ("level", "image", "y_dim_0")
    assert group["rmse"].values[-1] > group["rmse"].values[0]
    assert netcdf.read_group(tmp_path / "pruning.nc", "snr")["0.weight"].shape == (8, 1)


def test_wrong_input_is_refused_in_one_line(tmp_path):
    classes = of_classes(torch.rand(3, 12, 2).softmax(-1), torch.arange(12) % 2)
    images = Images(torch.rand(12, 4), classes.labels, ("a", "b"), "tabular", "test")
    x = torch.rand(12, 4)
    for message, arguments, keywords in (
        ("a Table or another Split of ppl_bnn.data, got a Tensor: pass inputs of other kinds as x=", (x,), {}),
        ("got both data and x", (images,), {"x": x}),
        (r"x must be the inputs of the 12 examples of the predictive, \[12, ...\], got \[3, 4\]", (), {"x": x[:3]}),
        ("got list", (), {"x": [1, 2]}),
        ("feature_names must name each of the 4 columns of x .* got 2 names", (), {"x": x, "feature_names": "ab"}),
        ("the predictive has 2 classes, got names of 3", (), {"classes": "abc"}),
        ("guide must be the posterior .* got a Linear", (), {"guide": torch.nn.Linear(1, 1)}),
    ):
        with pytest.raises(UserError, match=message) as caught:
            to_inference_data(classes, *arguments, **keywords)
        assert "\n" not in str(caught.value)
    model, guide, x, y = regression(epochs=1)
    found = predict(model, guide, x, y, num_samples=3, progress=False)
    netcdf.save(to_inference_data(found), tmp_path / "p.nc")
    with pytest.raises(UserError, match="is of a Normal likelihood, got Categorical: pass likelihood="):
        read_predictive(tmp_path / "p.nc")


def test_results_read_by_group_have_no_chain_of_their_own(two_files, tmp_path):
    """A result of one training reads as it did when these groups had no chain."""
    a, _ = two_files
    for name in netcdf.BY_CHAIN:
        assert all(variable.dims[0] == "chain" for variable in a[name].data_vars.values()), name
        assert "chain" not in netcdf.groups_of(a)[name].dims
    netcdf.save(a, tmp_path / "again.nc")
    assert all("chain" not in netcdf.read_group(tmp_path / "again.nc", name).dims for name in netcdf.BY_CHAIN)
    assert isinstance(opened(tmp_path / "again.nc")["uncertainty"], xr.Dataset | xr.DataTree)
