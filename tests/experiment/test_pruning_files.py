"""Which file a sweep or a prediction goes into, and what pruning.nc holds on request."""

import json

import arviz as az
import numpy as np
import pytest
import torch
from refusals import assert_refused

from ppl_bnn import snr
from ppl_bnn.experiment.config import PruningConfig
from ppl_bnn.experiment.jobs import main as jobs
from ppl_bnn.experiment.provenance import pruning_path
from ppl_bnn.experiment.setup import opened
from ppl_bnn.results import netcdf
from ppl_bnn.run import main

ONE_LEVEL = ("--pruning.fractions", "[0.5]", "--pruning.threshold", "[]")


@pytest.fixture
def prune(call, run_folder):
    """A trained run, and its prune stage: (the messages, each file's bytes by name)."""
    assert call("--stages", "train", "--train.epochs", 1, "--train.checkpoint_every", 1)[0] == 0

    def _prune(*arguments, stages="prune"):
        how = ("--train.epochs", 1, "--train.checkpoint_every", 1, *ONE_LEVEL)
        code, lines = call("--stages", stages, *how, *arguments)
        assert code == 0, lines
        files = {path.name: path.read_bytes() for path in (run_folder / "out").glob("prun*")}
        return "\n".join(lines), files

    return _prune


def test_other_steps_and_other_draws_go_beside_and_are_found_again(prune, run_folder):
    _, first = prune()
    assert list(first) == ["pruning.nc"]
    after = first
    for arguments, name in (
        (["--pruning.checkpoint", "0"], "pruning-step-00000000.nc"),
        (["--pruning.num_samples", 2], "pruning-2draws.nc"),
        (["--pruning.seed", 1], "pruning-seed1.nc"),
        (["--pruning.seed", 1, "--pruning.num_samples", 2], "pruning-2draws-seed1.nc"),
        (["--pruning.seed", 1, "--pruning.checkpoint", "step-00000000"], "pruning-step-00000000-seed1.nc"),
    ):
        before = after
        _, after = prune(*arguments)
        assert set(after) - set(before) == {name}
        assert {file: after[file] for file in before} == before
        assert f"{name} is up to date" in prune(*arguments)[0]
    attrs = netcdf.read_attrs(run_folder / "out" / "pruning-2draws-seed1.nc")
    assert (attrs["step"], attrs["inputs"]["settings"]["seed"]) == (6, 1)
    # The same draws at other levels replace those that are there.
    text, after = prune("--pruning.num_samples", 2, "--pruning.criterion", "kl")
    assert "recomputing pruning-2draws.nc (settings.criterion: saved 'snr', now 'kl')" in text
    assert after["pruning.nc"] == first["pruning.nc"]


def test_the_saved_posterior_lies_beside_its_sweep(prune):
    _, first = prune("--pruning.save_fraction", 0.9)
    assert set(first) == {"pruning.nc", "pruned.safetensors"}
    _, after = prune("--pruning.save_fraction", 0.9, "--pruning.checkpoint", 0)
    assert set(after) - set(first) == {"pruning-step-00000000.nc", "pruned-step-00000000.safetensors"}
    assert {name: after[name] for name in first} == first


def test_the_report_is_of_the_files_of_its_settings(prune, run_folder, monkeypatch):
    drawn = []
    monkeypatch.setattr("ppl_bnn.experiment.report.draw_all", lambda run, rows, *paths: drawn.append(paths) or [])
    prune(stages="predict,prune")
    prune("--pruning.checkpoint", 0, "--predict.checkpoint", 0, stages="predict,prune,report")
    prune(stages="report")
    names = [[path.name for path in paths] for paths in drawn]
    assert names == [
        ["predictive-step-00000000.nc", "shift.nc", "pruning-step-00000000.nc"],
        ["predictive.nc", "shift.nc", "pruning.nc"],
    ]
    steps = [netcdf.read_attrs(run_folder / "out" / name)["step"] for name in (names[0][0], names[1][0])]
    assert steps == [0, 6]
    assert json.loads((run_folder / "out" / "metrics.json").read_text())["pruning"][0]["pruned_fraction"] == 0.5


def test_a_damaged_sweep_is_named_before_any_work(prune, call, run_folder):
    prune()
    (run_folder / "out" / "pruning.nc").write_bytes(b"half")
    how = ("--train.epochs", 1, "--train.checkpoint_every", 1, "--pruning.seed", 1)
    assert_refused(call("--stages", "prune", *how), "pruning.nc is truncated or not a netCDF result")


def test_a_sweep_without_inputs_has_the_short_name(tmp_path):
    assert pruning_path(tmp_path, PruningConfig()).name == "pruning.nc"
    assert pruning_path(tmp_path, PruningConfig(checkpoint="12")).name == "pruning-step-00000012.nc"
    assert pruning_path(tmp_path, PruningConfig(checkpoint="step-best.safetensors")).name == "pruning-step-best.nc"


def test_the_images_asked_for_are_kept(prune, call, run_folder):
    prune("--pruning.keep_images", "[42, 0, 7, 42]")
    out = run_folder / "out"
    kept = netcdf.read_group(out / "pruning.nc", "posterior_predictive")
    assert kept["obs_id"].values.tolist() == [0, 7, 42]
    assert kept["probs"].sizes["obs_id"] == 3
    assert netcdf.read_group(out / "pruning.nc", "pruning")["mean_probs"].sizes["image"] == 200
    # A prediction would choose other images; these are chosen.
    assert "up to date" in prune("--pruning.keep_images", "[42, 0, 7, 42]", stages="predict,prune")[0]
    before = (out / "pruning.nc").read_bytes()
    for images, message in (
        ("[0,200]", "pruning.keep_images must be numbers of test images, from 0 to 199; got 200"),
        ("[-1]", "pruning.keep_images must be at least 0"),
        ("[]", "pruning.keep_images must name at least one image"),
    ):
        how = ("--stages", "train,prune", "--train.epochs", 1, "--train.checkpoint_every", 1)
        assert_refused(call(*how, "--pruning.keep_images", images), message)
    assert (out / "pruning.nc").read_bytes() == before
    assert "settings.keep_images: saved [42, 0, 7, 42], now None" in prune()[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_each_weights_snr_is_saved_on_request(prune, run_folder):
    prune()
    path = run_folder / "out" / "pruning.nc"
    assert netcdf.read_group(path, "snr") is None
    prune("--pruning.save_snr", "true")
    run = opened(run_folder / "out")
    run.restored("last")
    ratios = snr(run.guide)
    found = az.from_netcdf(str(path))["snr"]
    assert set(found.data_vars) == set(ratios)
    for site, ratio in ratios.items():
        assert found[site].dims == (f"{site}_dim_0", f"{site}_dim_1")
        torch.testing.assert_close(torch.from_numpy(found[site].values), ratio)


@pytest.mark.slow
def test_jobs_merge_the_files_that_their_settings_name(run_folder):
    out = run_folder / "out"
    common = ["--train.epochs", "1", *ONE_LEVEL, "--pruning.save_snr", "true", "--stages", "train,predict,prune"]
    for step in ("last", "0"):
        how = [*common, "--pruning.checkpoint", step, "--predict.checkpoint", step]
        # One of them a job finds done; the other belongs to another shard.
        for seed in (0, 1):
            own = ["--train.seed", str(seed), "--out", str(out / "jobs" / f"train.seed={seed}")]
            assert main([str(run_folder), "--quiet", *how, *own]) == 0
        assert jobs([str(run_folder), "--vary", "train.seed=0,1", *how, "--shard", "1/2"]) == 0
    merged = {path.name for path in (out / "merged").iterdir()}
    assert merged == {
        "predictive.nc", "pruning.nc", "predictive-step-00000000.nc", "pruning-step-00000000.nc",
    }  # fmt: skip
    for name, step in (("pruning.nc", 6), ("pruning-step-00000000.nc", 0)):
        assert netcdf.read_attrs(out / "merged" / name)["step"] == step
        ratios = netcdf.read_group(out / "merged" / name, "snr")
        assert ratios["fc3.weight"].shape == (2, 10, 256)
        assert not np.allclose(*ratios["fc3.weight"].values)
