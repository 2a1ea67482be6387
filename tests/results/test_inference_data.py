"""The result files: their schema, what ArviZ does with them, and what happens to damaged ones."""

import importlib.metadata
import resource
import subprocess
import sys
from types import SimpleNamespace

import arviz as az
import matplotlib as mpl
import numpy as np
import pytest
import torch
import xarray as xr
from class_predictives import of_classes

from ppl_bnn import Classifier, MeanFieldNormal, build, kl_by_site, predict, sweep, to_inference_data
from ppl_bnn.data import Images
from ppl_bnn.errors import FileError
from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.predictive import draw_figures
from ppl_bnn.results.pruning import sweep_to_inference_data

pytestmark = pytest.mark.any_python
mpl.use("Agg")
ARVIZ_1 = int(importlib.metadata.version("arviz").split(".")[0]) >= 1
HISTORY = [
    {"epoch": e, "loss": 2.0 / e, "nll": 1.5 / e, "kl": 0.5 / e, "kl_weight": 1.0, "accuracy": 0.5, "seconds": 2.0}
    for e in (1, 2, 3)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A predictive.nc and a pruning.nc of 40 images with 12 draws."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("results")
    pixels = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8)
    images = Images(pixels, torch.arange(40) % 10, tuple("0123456789"), "MNIST (5,000-digit subset)", "test")
    net = build("bnn-fc")
    model = Classifier(net, 40)
    x, y = images.inputs(), images.labels
    guide = MeanFieldNormal(model, x[:1], y[:1])
    predictive = predict(net, guide, x, y, num_samples=12, progress=False)
    kl = kl_by_site(model, guide, x[:1], y[:1])
    idata = to_inference_data(
        predictive, images, guide=guide, kl=kl, history=HISTORY, attrs={"inputs": {"checkpoint": 3}}
    )
    netcdf.save(idata, folder / "predictive.nc")
    levels = sweep(
        net, guide, x, y, fractions=(0.0, 0.5, 0.9), num_samples=12, keep=torch.arange(0, 40, 2), progress=False
    )
    netcdf.save(sweep_to_inference_data(levels, images, guide=guide), folder / "pruning.nc")
    return folder, predictive, images, levels


def test_arviz_opens_every_group(results):
    folder, predictive, images, _ = results
    idata = az.from_netcdf(str(folder / "predictive.nc"))
    assert isinstance(idata, xr.DataTree if ARVIZ_1 else az.InferenceData)
    assert isinstance(inference_data.load(folder / "predictive.nc"), type(idata))
    assert set(netcdf.groups_of(idata)) == {
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "sample_stats",
        "observed_data",
        "constant_data",
        "uncertainty",
        "monte_carlo",
        "layers",
        "training",
    }
    assert dict(idata.posterior_predictive["probs"].sizes) == {"chain": 1, "draw": 12, "obs_id": 40, "class": 10}
    assert idata.posterior_predictive["y"].dims == ("chain", "draw", "obs_id")
    assert idata.log_likelihood["y"].dims == ("chain", "draw", "obs_id")
    np.testing.assert_allclose(idata.posterior_predictive["probs"].values[0], predictive.probs, atol=1e-5)
    np.testing.assert_allclose(idata.log_likelihood["y"].values[0], predictive.log_likelihood, rtol=1e-6)
    np.testing.assert_array_equal(idata.constant_data["image"].values, images.pixels)
    np.testing.assert_array_equal(idata.observed_data["y"].values, images.labels)
    assert set(idata.constant_data["split"].values) == {"test"}
    assert list(idata.layers["layer"].values) == ["fc1.weight", "fc2.weight", "fc3.weight"]
    assert (idata.layers["kl"] > 0).all()
    assert idata.training["epoch"].values.tolist() == [1, 2, 3]


# ArviZ 0.23 calls matplotlib 3.11 in a way that is to go in 3.13.
@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")
@pytest.mark.skipif(ARVIZ_1, reason="ArviZ 1.x is installed: the next test is of its functions")
def test_arvizs_functions_run(results):
    folder, *_ = results
    idata = az.from_netcdf(str(folder / "predictive.nc"))
    probs = idata.posterior_predictive["probs"]
    assert az.hdi(idata, group="posterior_predictive", var_names=["probs"])["probs"].sizes["hdi"] == 2
    az.plot_kde(probs.sel(obs_id=0, **{"class": "3"}).values.ravel())
    az.plot_dist(probs.sel(obs_id=0, **{"class": "3"}).values.ravel())
    az.plot_ppc(idata, num_pp_samples=5, random_seed=0)
    summary = az.summary(idata.posterior_predictive[["probs"]].sel(obs_id=[0, 1]), kind="stats")
    assert len(summary) == 20
    assert {"mean", "sd"} <= set(az.summary(idata.sample_stats, kind="stats").columns)


@pytest.mark.skipif(not ARVIZ_1, reason="ArviZ 0.x is installed: the test before is of its functions")
def test_arviz_1s_functions_run(results):
    folder, *_ = results
    tree = az.from_netcdf(folder / "predictive.nc")
    interval = az.hdi(tree, group="posterior_predictive", var_names=["probs"])["probs"]
    assert interval.sizes["ci_bound"] == 2
    one = tree["posterior_predictive"]["probs"].sel(obs_id=0, **{"class": "3"}).drop_vars(["obs_id", "class"])
    az.plot_dist(az.from_dict({"posterior": {"softmax": one.values}}), kind="kde")
    az.plot_ppc_dist(tree, var_names=["y"], num_samples=5, kind="ecdf")
    coords = {"obs_id": [0, 1]}
    summary = az.summary(tree, var_names=["probs"], group="posterior_predictive", coords=coords, kind="stats")
    assert len(summary) == 20
    assert {"mean", "sd"} <= set(az.summary(tree, group="sample_stats", kind="stats").columns)


@pytest.mark.parametrize(
    ("installed", "in_groups"),
    [("0.22.0", True), ("0.23.4", True), ("1.0.0rc1", False), ("1.3.0", False), ("10.0", False)],
)
def test_the_version_decides_what_holds_the_groups(monkeypatch, installed, in_groups):
    """By the names it has, ArviZ 1.x cannot be told from 0.x."""
    made = []
    fake = SimpleNamespace(InferenceData=lambda **given: made.append(given), kde=None)
    monkeypatch.setattr(importlib.metadata, "version", {"arviz": installed}.__getitem__)
    monkeypatch.setattr(inference_data, "_arviz", lambda: fake)
    tree = inference_data.assemble({"observed_data": xr.Dataset({"y": ("obs_id", [1, 2])})}, {"title": "digits"})
    if in_groups:
        assert tree is None
        assert list(made[0]) == ["observed_data", "attrs", "warn_on_custom_groups"]
    else:
        assert not made
        assert tree["observed_data"]["y"].values.tolist() == [1, 2]
        assert tree.attrs == {"title": "digits"}


def test_arviz_says_nothing_when_it_is_imported():
    code = (
        "import logging, sys, warnings; logging.basicConfig(level=logging.INFO); warnings.simplefilter('always'); "
        "import numpy, ppl_bnn; from ppl_bnn.results.idata import density; density(numpy.linspace(0, 1, 50)); "
        "assert 'arviz' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "arviz" not in done.stderr.lower(), done.stderr


def test_importing_the_package_and_the_command_line_imports_no_arviz():
    code = "import sys, ppl_bnn, ppl_bnn.run; assert not [m for m in sys.modules if m.split('_')[0] == 'arviz']"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_sampled_labels_follow_the_probabilities(results):
    *_, images, _ = results
    many = of_classes(torch.tensor([0.1, 0.2, 0.7]).expand(50, 400, 3), torch.zeros(400, dtype=torch.long))
    some = Images(images.pixels[:1].expand(400, -1, -1, -1), many.labels, ("a", "b", "c"), "x", "test")
    y = to_inference_data(many, some)["posterior_predictive"]["y"].values.ravel()
    share = np.bincount(y, minlength=3) / y.size
    expected = np.array([0.1, 0.2, 0.7])
    assert (np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / y.size)).all()


def test_pruning_holds_what_bprunes_binary_held(results):
    folder, _, images, levels = results
    groups = netcdf.groups_of(inference_data.load(folder / "pruning.nc"))
    pruning = groups["pruning"]
    assert pruning.sizes["level"] == len(levels) == 4
    for at, level in enumerate(levels):
        assert int(pruning["nonzero"][at]) == sum(level.pruned.nonzero.values())
        assert pruning["nonzero_by_layer"].values[at].tolist() == list(level.pruned.nonzero.values())
        np.testing.assert_allclose(pruning["mean_probs"].values[at], level.predictive.mean_probs, atol=1e-6)
        assert float(pruning["seconds"][at]) > 0
    assert groups["posterior_predictive"]["probs"].dims == ("chain", "draw", "level", "obs_id", "class")
    assert groups["posterior_predictive"]["obs_id"].values.tolist() == list(range(0, 40, 2))
    np.testing.assert_array_equal(groups["constant_data"]["image"].values, images.pixels)
    np.testing.assert_array_equal(groups["observed_data"]["y"].values, images.labels)


def test_every_figure_is_drawn_from_the_files_alone(results, tmp_path):
    folder, *_ = results
    code = (
        "import sys; from pathlib import Path; from ppl_bnn.results.figures.predictive import draw_figures; "
        "print(*draw_figures(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])))"
    )
    arguments = [folder / "predictive.nc", folder / "pruning.nc", tmp_path]
    subprocess.run([sys.executable, "-W", "error", "-c", code, *map(str, arguments)], check=True)
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {"training", "reliability", "certainty", "snr", "pruning_density"}
    from PIL import Image

    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_figures_say_which_data_they_show(results):
    from ppl_bnn.results.figures import predictive as plots

    folder, *_ = results
    groups = netcdf.groups_of(inference_data.load(folder / "predictive.nc"))
    title = netcdf.read_attrs(folder / "predictive.nc")["title"]
    for draw in (plots.training_curves, plots.reliability_diagram, plots.most_and_least_certain, plots.snr_histograms):
        assert "5,000-digit subset" in draw(groups, title).get_suptitle()


def test_without_a_guide_there_is_less_to_draw(results, tmp_path):
    _, predictive, images, _ = results
    netcdf.save(to_inference_data(predictive, images), tmp_path / "predictive.nc")
    names = {path.stem for path in draw_figures(tmp_path / "predictive.nc", None, tmp_path)}
    assert names == {"reliability", "certainty"}


def test_a_pruned_guide_has_no_signal_to_noise_ratios_to_store(results):
    _, predictive, images, levels = results
    for level in levels:
        groups = netcdf.groups_of(to_inference_data(predictive, images, guide=level.pruned.guide))
        assert ("layers" in groups) == (level.pruned.fraction == 0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(results, tmp_path, share):
    folder, *_ = results
    content = (folder / "predictive.nc").read_bytes()
    path = tmp_path / "cut.nc"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FileError, match=r"cut\.nc is truncated or not"):
        inference_data.load(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.nc").write_text("hello")
    with pytest.raises(FileError, match="not a netCDF result"):
        inference_data.load(tmp_path / "text.nc")
    with pytest.raises(FileError, match="run the stage that writes it"):
        inference_data.load(tmp_path / "none.nc")


def test_a_full_disk_leaves_the_earlier_file(results, tmp_path):
    """A limit on file size is what a full disk is to the writer."""
    _, predictive, images, _ = results
    path = tmp_path / "p.nc"
    idata = to_inference_data(predictive, images)
    netcdf.save(idata, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            netcdf.save(idata, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["p.nc"]


def test_images_must_match(results):
    _, predictive, images, _ = results
    with pytest.raises(ValueError, match="has 40 images, got 7"):
        to_inference_data(predictive, images.first(7))


def test_one_group_is_read_alone(results, tmp_path):
    folder, *_ = results
    assert netcdf.read_group(folder / "predictive.nc", "training")["epoch"].values.tolist() == [1, 2, 3]
    assert netcdf.read_group(folder / "predictive.nc", "nothing") is None
    (tmp_path / "cut.nc").write_bytes((folder / "predictive.nc").read_bytes()[:500])
    with pytest.raises(FileError, match=r"cut\.nc is truncated"):
        netcdf.read_group(tmp_path / "cut.nc", "training")


def test_attributes_come_back(results):
    folder, predictive, _, _ = results
    attrs = netcdf.read_attrs(folder / "predictive.nc")
    assert attrs["inputs"] == {"checkpoint": 3}
    assert attrs["num_samples"] == 12
    assert attrs["nll"] == pytest.approx(predictive.summary()["nll"])
