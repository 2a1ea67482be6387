"""Independent jobs: which there are, what becomes of them, and their results as the chains of one file."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from run_folders import quick

from ppl_bnn import metrics, run
from ppl_bnn.experiment.job_plan import shard, vary
from ppl_bnn.experiment.jobs import main
from ppl_bnn.experiment.merging import merge
from ppl_bnn.inference import checkpoint
from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.networks import read_networks


def test_varied_settings_are_combined_and_read_as_yaml():
    assert vary(["train.seed=0,1", "predict.checkpoint=last,step-00000006"]) == [
        {"train.seed": 0, "predict.checkpoint": "last"},
        {"train.seed": 0, "predict.checkpoint": "step-00000006"},
        {"train.seed": 1, "predict.checkpoint": "last"},
        {"train.seed": 1, "predict.checkpoint": "step-00000006"},
    ]
    assert vary(["pruning.fractions=[0.5, 0.9],[0.8]"])[0] == {"pruning.fractions": [0.5, 0.9]}


@pytest.mark.parametrize("options", [["train.seed"], ["train.seed="], ["a=1,1"], ["a=1", "a=2"], ["a=[1"]])
def test_varied_settings_that_say_nothing_are_refused(options):
    with pytest.raises(ValueError, match="--vary takes SETTING=VALUE"):
        vary(options)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_shards_are_disjoint_and_complete(size):
    jobs = list(range(7))
    parts = [jobs[shard(f"{index}/{size}")] for index in range(size)]
    assert sorted(job for part in parts for job in part) == jobs
    for wrong in ("3/3", "1", "-1/2", "0/0"):
        with pytest.raises(ValueError, match="--shard takes I/N"):
            shard(wrong)


@pytest.fixture
def run_folder(tmp_path, data_dir):
    pruning = {"num_samples": 2, "threshold": [0.5, 1.0], "fractions": [0.0, 0.5]}
    return quick(tmp_path, data_dir, pruning=pruning)


@pytest.mark.slow
def test_trainings_become_the_chains_of_one_file(run_folder, capsys):
    out = run_folder / "out"
    folders = [out / "jobs" / f"train.seed={seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        of_one = [str(run_folder), "--train.seed", str(seed), "--out", str(folder)]
        assert run.main([*of_one, "--stages", "train,predict" if seed else "train,predict,prune"]) == 0
    written = [folder.joinpath("predictive.nc").stat().st_mtime_ns for folder in folders]
    arguments = [str(run_folder), "--vary", "train.seed=0,1", "--stages", "predict,prune"]
    assert main([*arguments, "--shard", "1/2", "--workers", "2"]) == 0
    # What is done is not done again.
    assert [folder.joinpath("predictive.nc").stat().st_mtime_ns for folder in folders] == written

    parts = [inference_data.load(out / "jobs" / f"train.seed={seed}" / "predictive.nc") for seed in (0, 1)]
    merged = inference_data.load(out / "merged" / "predictive.nc")
    probs = merged["posterior_predictive"]["probs"]
    assert probs.sizes == {"chain": 2, "draw": 4, "obs_id": 60, "class": 10}
    assert probs["chain"].values.tolist() == [0, 1]
    for chain, part in enumerate(parts):
        for group in ("posterior_predictive", "log_likelihood", "sample_stats"):
            for name, values in part[group].data_vars.items():
                np.testing.assert_allclose(merged[group][name].isel(chain=chain), values.isel(chain=0), atol=1e-5)
        assert merged["layers"]["kl"].isel(chain=chain, drop=True).equals(part["layers"]["kl"])
    assert not np.allclose(probs[0], probs[1])
    # The predictive that averages both, and what it says of itself.
    mean = torch.from_numpy(probs.mean(("chain", "draw")).values).double()
    np.testing.assert_allclose(merged["uncertainty"]["mean_probs"], mean, atol=3e-5)
    np.testing.assert_allclose(merged["uncertainty"]["total"], metrics.entropy(mean), atol=1e-3)
    aleatoric = sum(part["uncertainty"]["aleatoric"] for part in parts) / 2
    np.testing.assert_allclose(merged["uncertainty"]["aleatoric"], aleatoric, atol=1e-6)
    of_all = probs.values.reshape(8, 60, 10)
    np.testing.assert_allclose(merged["uncertainty"]["std_probs"], of_all.std(0), atol=3e-5)
    expected = np.moveaxis(np.quantile(of_all, [0.05, 0.95], axis=0), 0, -1)
    np.testing.assert_allclose(merged["uncertainty"]["interval"], expected, atol=3e-5)
    attrs = netcdf.read_attrs(out / "merged" / "predictive.nc")
    labels = torch.from_numpy(merged["observed_data"]["y"].values)
    assert attrs["accuracy"] == metrics.accuracy(mean, labels)
    log_likelihood = np.concatenate([part["log_likelihood"]["y"].values[0] for part in parts])
    assert attrs["nll"] == pytest.approx(metrics.nll(torch.from_numpy(log_likelihood)), rel=1e-6)
    assert attrs["num_samples"] == 8
    assert attrs["chains"] == ["jobs/train.seed=0/predictive.nc", "jobs/train.seed=1/predictive.nc"]

    pruned = inference_data.load(out / "merged" / "pruning.nc")["pruning"]
    # Levels at a threshold first, each the same in both chains; then those at a fraction.
    assert (pruned["threshold"][0, :-1] == pruned["threshold"][1, :-1]).all()
    np.testing.assert_allclose(pruned["pruned_fraction"][:, [0, 3]], [[0, 0.5], [0, 0.5]], atol=1e-5)
    assert pruned["accuracy"].dims == ("chain", "level")
    # Seeds are trainings of one network, apart or merged.
    apart = [folder / "pruning.nc" for folder in folders]
    for paths in (apart, [out / "merged" / "pruning.nc"]):
        assert [len(trainings) for trainings in read_networks(paths)[1].values()] == [2]
    assert "training" in netcdf.read_attrs(out / "merged" / "pruning.nc")

    # Where one has other draws than the other, nothing is merged.
    capsys.readouterr()
    before = (out / "merged" / "predictive.nc").read_bytes()
    again = [str(run_folder), "--vary", "train.seed=0,1", "--stages", "predict ", "--predict.seed", "7"]
    assert main([*again, "--shard", "0/2"]) == 0
    why = "the results differ (settings.seed: one has 0, another 7)"
    assert f"predictive.nc of all: not merged, {why}" in capsys.readouterr().err
    assert (out / "merged" / "predictive.nc").read_bytes() == before
    assert run.main([*of_one, "--stages", "predict", "--predict.seed", "7"]) == 0
    assert main([*again, "--shard", "1/2"]) == 0
    assert "predictive.nc: 2 chains" in capsys.readouterr().err


@pytest.mark.any_python
def test_chains_count_by_their_draws_of_each_image(run_folder):
    out = run_folder / "out"
    common = [str(run_folder), "--stages", "train,predict", "--predict.num_samples", "200", "--predict.method", "draws"]
    for seed, tolerance in enumerate(("0.1", "0.0001")):
        own = ["--out", str(out / str(seed)), "--train.seed", str(seed), "--predict.tolerance", tolerance]
        assert run.main([*common, *own]) == 0
    merged = merge([inference_data.load(out / str(seed) / "predictive.nc") for seed in (0, 1)])
    probs = merged["posterior_predictive"]["probs"].values.reshape(400, 60, 10)
    draws = merged["monte_carlo"]["draws"].values
    assert (draws[0] < draws[1]).any()
    np.testing.assert_array_equal((~np.isnan(probs[..., 0])).sum(0), draws.sum(0))
    np.testing.assert_allclose(merged["uncertainty"]["mean_probs"], np.nanmean(probs, 0), atol=3e-5)
    assert (merged["posterior_predictive"]["y"].values.reshape(400, 60)[np.isnan(probs[..., 0])] == -1).all()


def test_jobs_that_vary_no_training_share_one_and_a_bad_one_does_not_stop_the_others(run_folder, capsys):
    out = run_folder / "out"
    assert run.main([str(run_folder), "--stages", "train"]) == 0
    assert main([str(run_folder), "--vary", "predict.num_samples=0,3", "--stages", "predict"]) == 2
    errors = capsys.readouterr().err
    assert "failed with exit code 2: error: predict.num_samples must be at least 1, got 0" in errors
    assert "predictive.nc of predict.num_samples=0: 0 of 1 are done" in errors
    found = inference_data.load(out / "jobs" / "predict.num_samples=3" / "predictive.nc")
    assert found["posterior_predictive"].sizes["draw"] == 3
    assert not (out / "merged").exists()


def test_a_run_folder_that_is_not_there_leaves_no_folder_of_jobs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["mnits-fc", "--vary", "train.seed=0,1"]) == 2
    assert "there is no mnits-fc/config.yaml" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_signal_ends_the_jobs_with_their_checkpoints(run_folder, capsys):
    folder = run_folder / "out" / "jobs" / "train.seed=0" / "checkpoints"

    def stop_when_it_trains():
        deadline = time.monotonic() + 60
        while len(checkpoint.saved(folder)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop_when_it_trains)
    stopping.start()
    arguments = ["--stages", "train", "--train.epochs", "100000", "--train.checkpoint_every", "1"]
    assert main([str(run_folder), "--vary", "train.seed=0,1", *arguments]) == 75
    stopping.join()
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; run the same command again to resume"
    assert not (run_folder / "out" / "jobs" / "train.seed=1").exists()
    assert "run the same command again to resume" in (folder.parent / "job.log").read_text()


def test_jobs_share_the_cores_and_leave_no_setting_of_it_in_the_out_folder(run_folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    command = [str(run_folder), "--vary", "predict.seed=0", "--stages", "train"]

    def threads(out):
        used = json.loads((out / "performance.json").read_text())["threads"]
        return used, yaml.safe_load((out / "config.yaml").read_text())["threads"]

    assert main(command) == 0
    assert threads(run_folder / "out") == (len(os.sched_getaffinity(0)), None)
    # What the user sets is kept.
    other = run_folder / "other"
    assert main([*command, "--threads", "3", "--out", str(other)]) == 0
    assert threads(other) == (3, 3)


def test_results_of_other_images_are_not_merged():
    def part(labels):
        return xr.DataTree.from_dict(
            {"observed_data": xr.Dataset({"y": ("obs_id", labels)}), "constant_data": xr.Dataset()}
        )

    with pytest.raises(ValueError, match="their observed_data differ"):
        merge([part([0, 1]), part([0, 2])])
