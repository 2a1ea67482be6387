"""What version 0.1.0 wrote stays usable: checkpoints, results, settings. `tests/fixtures` says how it was made."""

import csv
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ppl_bnn import export, metrics, predict
from ppl_bnn.experiment.setup import opened
from ppl_bnn.inference import checkpoint
from ppl_bnn.inference.posterior_file import load_posterior
from ppl_bnn.models.networks import NETWORKS
from ppl_bnn.results import idata, netcdf
from ppl_bnn.results.saved_draws import read_predictive
from ppl_bnn.run import main

pytestmark = pytest.mark.any_python
FOLDER = Path(__file__).parents[1] / "fixtures" / "version_0_1_0"
# The numbers that say how long something took.
TIMES = ("seconds", "samples_per_second")


@pytest.fixture(autouse=True)
def _the_runs_network_and_data(monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", runpy.run_path(str(FOLDER / "make.py"))["tiny"])
    # The settings name images.npz where they are read.
    monkeypatch.chdir(FOLDER)


@pytest.fixture
def copied(tmp_path):
    """A copy of a run, whose out folder may be written to."""

    def _copied(name="run"):
        return shutil.copytree(FOLDER / name, tmp_path / name)

    return _copied


def rows(run):
    with (run / "out" / "log.csv").open() as file:
        return list(csv.DictReader(file))


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["run", "ivon"])
@pytest.mark.parametrize("step", ["step-00000000", "step-00000030", "last"])
def test_a_checkpoint_is_restored_and_predicted_from(name, step):
    run = opened(FOLDER / name / "out")
    state = run.restored(step)
    for site in run.guide.sites:
        loc, scale = run.guide.loc_scale(site)
        assert torch.equal(loc, state.tensors[f"guide.loc.{site}"])
        unconstrained = state.tensors[f"guide.unconstrained_scale.{site}"]
        torch.testing.assert_close(scale, torch.nn.functional.softplus(unconstrained) + 1.2e-7)
    assert torch.equal(run.model.state_dict()["net.1.running_var"], state.tensors["model.net.1.running_var"])
    found = predict(run.model.net, run.guide, *run.tensors(run.test_data), num_samples=200, progress=False).summary()
    if step == "last":
        assert found["accuracy"] > 0.85
        assert found["nll"] < 0.5
    if step == "step-00000000":
        assert found["nll"] > 1.5


def test_the_predictive_is_that_of_version_0_1_0():
    """Of other draws, as the generator of the noise may change: within the Monte Carlo error of both."""
    there = read_predictive(FOLDER / "run" / "out" / "predictive.nc")
    run = opened(FOLDER / "run" / "out")
    run.restored("last")
    here = predict(run.model.net, run.guide, *run.tensors(run.test_data), num_samples=1000, seed=1, progress=False)
    error = (there.mc_error.square() + here.mc_error.square()).mean().sqrt()
    assert 0.01 < error < 0.03
    assert (here.mean_probs - there.mean_probs).square().mean().sqrt() < 1.5 * error


def test_every_result_is_read():
    out = FOLDER / "run" / "out"
    for name, groups in (
        ("predictive", "posterior_predictive log_likelihood sample_stats observed_data constant_data uncertainty "
         "monte_carlo layers training"),
        ("pruning", "posterior_predictive observed_data constant_data layers pruning"),
        ("shift", "shift in_distribution ood"),
        ("train_log_likelihood", "log_likelihood sample_stats observed_data"),
    ):  # fmt: skip
        found = idata.load(out / f"{name}.nc")
        assert set(netcdf.groups_of(found)) == set(groups.split())
        assert found.attrs["title"] == "CIFAR-10 (JPEG)"
    predictive = read_predictive(out / "predictive.nc")
    written = json.loads((out / "metrics.json").read_text())["test"]
    for name in ("accuracy", "nll", "ece", "brier"):
        assert predictive.summary()[name] == pytest.approx(written[name], rel=1e-6), name


def test_the_pruned_posterior_is_read():
    run = opened(FOLDER / "run" / "out")
    file = FOLDER / "run" / "out" / "pruned.safetensors"
    net, guide = run.model.net, load_posterior(file, run.model, *run.example())
    left = sum(int((guide.loc_scale(site)[0] != 0).sum()) for site in guide.sites)
    assert left == 974
    assert (
        predict(net, guide, *run.tensors(run.test_data), num_samples=100, progress=False).summary()["accuracy"] > 0.85
    )


def test_a_finished_run_is_not_trained_again_and_its_report_is_the_same(copied, capsys):
    run = copied()
    kept = [*run.glob("out/*.nc"), *run.glob("out/checkpoints/*")]
    before = {path: path.read_bytes() for path in kept}
    assert len(kept) == 7
    report = json.loads((run / "out" / "metrics.json").read_text())
    (run / "out" / "metrics.json").unlink()
    assert main([str(run), "--stages", "train,predict,shift,prune,report", "--quiet"]) == 0
    lines = capsys.readouterr().err
    assert "train: complete already (20 epochs)" in lines
    for name in ("predictive.nc", "shift.nc", "pruning.nc"):
        assert f"{name} is up to date" in lines
    assert all(path.read_bytes() == content for path, content in before.items())
    assert without_times(json.loads((run / "out" / "metrics.json").read_text())) == without_times(report | {"step": 60})
    assert len(list((run / "out" / "figures").glob("*.png"))) == 13


def test_its_settings_are_accepted_as_a_run_of_today(copied):
    run = copied()
    shutil.copy(run / "out" / "config.yaml", run / "config.yaml")
    shutil.rmtree(run / "out")
    assert main([str(run), "--stages", "train", "--train.epochs", "1", "--quiet"]) == 0
    there = yaml.safe_load((FOLDER / "run" / "out" / "config.yaml").read_text())
    here = yaml.safe_load((run / "out" / "config.yaml").read_text())
    here["train"]["epochs"] = 20
    for part, settings in there.items():
        for name, value in settings.items() if isinstance(settings, dict) else ():
            assert here[part][name] == value, f"{part}.{name}"


def test_other_settings_are_told_from_its_own(copied, capsys):
    run = copied()
    assert main([str(run), "--stages", "train", "--train.lr", "0.02", "--quiet"]) == 2
    assert "train.lr" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run", "ivon"])
def test_a_training_that_was_cut_off_is_resumed(copied, name):
    run = copied(name)
    (run / "out" / "checkpoints" / "step-00000060.safetensors").unlink()
    before = rows(run)
    ivon = ("--train.optimizer", "ivon", "--train.lr", "0.1", "--train.beta2", "0.9", "--train.scale_lr_factor", "1")
    assert main([str(run), "--stages", "train", "--quiet", *(ivon if name == "ivon" else ())]) == 0
    after = rows(run)
    assert [row["epoch"] for row in after] == [str(epoch) for epoch in range(1, 21)]
    assert after[:10] == before[:10]
    # Its noise may be of another generator, so losses are near those of 0.1.0, not the same: those of single epochs, of
    # three steps each, scatter by 4%.
    for name in ("loss", "kl"):
        means = [sum(float(row[name]) for row in of[-5:]) / 5 for of in (before, after)]
        assert means[1] == pytest.approx(means[0], rel=0.05)
    state = checkpoint.load(checkpoint.saved(run / "out" / "checkpoints")[-1])
    assert state.step == 60


def test_it_is_exported(copied):
    onnxruntime = pytest.importorskip("onnxruntime")
    run = copied()
    assert export.main([str(run / "out"), "--draws", "4"]) == 0
    opened_run = opened(run / "out")
    x, y = opened_run.tensors(opened_run.test_data)
    session = onnxruntime.InferenceSession(str(run / "out" / "predictive.onnx"))
    (probs,) = session.run(["probs"], {"x": x.numpy()})
    assert np.isfinite(probs).all()
    assert metrics.accuracy(torch.from_numpy(probs), y) > 0.85
