"""The command line, end to end on real digits: what a run leaves, and what it prints."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from refusals import assert_refused
from safetensors.torch import load_file

from ppl_bnn.data import Images
from ppl_bnn.inference import checkpoint
from ppl_bnn.results import netcdf
from ppl_bnn.run import main

pytestmark = pytest.mark.any_python
ROOT = Path(__file__).parents[2]


def test_a_run_leaves_every_result(call, run_folder):
    code, _ = call()
    assert code == 0
    out = run_folder / "out"
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "log.csv", "checkpoints", "posterior.json", "predictive.nc", "pruning.nc", "metrics.json",
        "figures", "manifest.json", "performance.json", ".lock",
    }  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["run"] == "tiny"
    assert metrics["data"] == {"title": "MNIST", "train": 600, "test": 200}
    assert metrics["model"] == {"parameters": 538_122, "trainable": 538_122}
    assert set(metrics["train"]) == {"epochs", "seconds", "samples_per_second", "accuracy"}
    assert set(metrics["test"]) == {
        "num_samples", "seconds", "accuracy", "nll", "ece", "brier", "adaptive_ece", "aurc", "method", "sampling",
        "mean_draws", "median_draws", "max_draws", "mc_error", "max_mc_error",
    }  # fmt: skip
    assert metrics["test"]["accuracy"] > 0.5
    assert len(metrics["pruning"]) == 5
    assert set(metrics["pruning"][0]) == {
        "threshold", "pruned_fraction", "nonzero", "accuracy", "nll", "ece", "seconds",
    }  # fmt: skip
    assert [row["pruned_fraction"] for row in metrics["pruning"]] == sorted(
        row["pruned_fraction"] for row in metrics["pruning"]
    )
    assert len(list((out / "figures").glob("*.png"))) == 11
    assert yaml.safe_load((out / "config.yaml").read_text())["train"]["epochs"] == 2

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name not in ("config.yaml", ".lock")}
    code, lines = call()
    assert code == 0
    assert any("complete already" in line for line in lines)
    assert sum("up to date" in line for line in lines) == 4
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}

    code, lines = call("--stages", "predict", "--predict.num_samples", "7")
    assert code == 0
    assert any("predict: recomputing predictive.nc (settings.num_samples: saved 5, now 7)" in line for line in lines)
    assert netcdf.read_attrs(out / "predictive.nc")["num_samples"] == 7

    assert_refused(call("--train.lr", "0.1"), "train.lr: saved 0.001, now 0.1", "--out")
    assert stamps[out / "pruning.nc"] == (out / "pruning.nc").stat().st_mtime_ns


def test_a_report_is_made_again_only_where_its_results_or_its_files_changed(call, run_folder, drawings):
    out = run_folder / "out"
    metrics, figure, gallery = out / "metrics.json", out / "figures" / "reliability.png", out / "figures/gallery.html"
    assert call()[0] == 0
    whole = {path: path.read_bytes() for path in (metrics, figure, gallery)}
    for spoil in (
        figure.unlink,
        lambda: gallery.write_text("half"),
        lambda: metrics.write_text("{}"),
        lambda: (out / "figures" / "made_of.json").write_text("[]"),
        lambda: (out / "figures" / "made_of.json").unlink(),
    ):
        spoil()
        before = len(drawings)
        assert any("figures and gallery.html" in line for line in call("--stages", "report")[1])
        assert whole == {path: path.read_bytes() for path in whole}
        assert any("report: " in line and "up to date" in line for line in call("--stages", "report")[1])
        assert len(drawings) == before + 1
    (out / "figures" / "posterior.png").unlink()
    assert call("--stages", "posterior,report")[0] == 0
    assert (out / "figures" / "posterior.png").exists()
    assert len(drawings) == 6
    assert call("--stages", "predict,report", "--predict.num_samples", "7")[0] == 0
    assert json.loads(metrics.read_text())["test"]["num_samples"] == 7
    assert drawings[-2:] == [5, 7]


def test_a_finished_run_loads_nothing_that_draws(call, run_folder, drawings):
    assert call()[0] == 0
    code = (
        "import sys; from ppl_bnn.run import main; assert main(sys.argv[1:]) == 0; "
        "heavy = {'arviz', 'matplotlib', 'pandas', 'scipy', 'torchvision', 'xarray'} & sys.modules.keys(); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run_folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_twin_is_trained_and_its_weights_start_the_bnn(call, run_folder, tmp_path):
    twin = tmp_path / "twin"
    code, lines = call("--model.deterministic", "true", "--out", twin)
    assert code == 0
    assert any("prune: skipped" in line for line in lines)
    metrics = json.loads((twin / "metrics.json").read_text())
    assert metrics["test"]["num_samples"] == 1
    assert metrics["pruning"] == []
    assert metrics["model"]["parameters"] == 269_322
    arguments = ("--guide.init_from", twin, "--stages", "train", "--train.epochs", "1", "--train.lr", "1e-12")
    assert call(*arguments, "--out", tmp_path / "bnn")[0] == 0
    started, trained = (load_file(checkpoint.find(folder / "checkpoints")) for folder in (tmp_path / "bnn", twin))
    for layer in ("fc1", "fc3"):
        torch.testing.assert_close(started[f"guide.loc.{layer}.weight"], trained[f"model.net.{layer}.weight"])
        torch.testing.assert_close(started[f"model.net.{layer}.bias"], trained[f"model.net.{layer}.bias"])
    shutil.rmtree(twin)
    assert call(*arguments, "--out", tmp_path / "bnn")[0] == 0
    assert_refused(call("--guide.init_from", tmp_path / "none", "--out", tmp_path / "c"), "checkpoint", "is not there")


def test_summary_prints_the_table_and_writes_nothing(run_folder, data_dir, capsys):
    assert main([str(run_folder), "--stages", "summary"]) == 0
    printed = capsys.readouterr().out
    assert "fc1" in printed
    assert "538,122" in printed
    assert not (run_folder / "out").exists()


@pytest.mark.parametrize("name", ["mnist-fc", "cifar10-resnet18", "digits100k-vgg16"])
def test_summary_needs_no_data_and_downloads_none(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ppl_bnn.data.sources._network_timeout", None)
    assert main([str(ROOT / "runs" / name), "--stages", "summary", "--data.dir", str(tmp_path / "data")]) == 0
    assert "Total parameters:" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


def few_images(folder, file, progress):
    images = Images(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.arange(4), tuple("abcd"), "own images", "train")
    return images, replace(images, split="test")


def test_summary_asks_a_data_function_of_the_users_own(run_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "own_images", SimpleNamespace(few=few_images))
    arguments = [str(run_folder), "--stages", "summary", "--data.name", "own_images:few"]
    assert main([*arguments, "--model.name", "resnet18"]) == 0
    printed = capsys.readouterr().out
    assert "resnet18 (Bayesian) on own images" in printed
    assert "block4.conv2, block4.shortcut" in printed


def test_help_teaches_and_print_config_resolves(capsys):
    def output(*arguments):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        return capsys.readouterr().out

    text = output("--help")
    for part in (
        "Exit codes: 0 done",
        "--train.kl_weight",
        "below 1 a colder one",
        "infimnist-compatible indexing, own fields",
        "scale_mixture(weight, scale1, scale2)",
    ):
        assert part in text
    config = yaml.safe_load(output(str(ROOT / "runs/study-mnist-fc-start-3"), "--train.epochs", "3", "--print_config"))
    assert config["train"]["epochs"] == 3
    assert config["train"]["optimizer"] == "rmsprop"


@pytest.mark.parametrize("path", sorted(ROOT.glob("runs/*/config.yaml")), ids=lambda path: path.parent.name)
def test_every_run_that_is_shipped_is_valid(path, data_dir, tmp_path, capsys):
    import numpy as np
    from jpeg_files import jpegs

    arguments = ["--stages", "summary", "--data.dir", str(data_dir)]
    if path.parent.name.startswith(("cifar10", "study-cifar10")):
        np.savez(tmp_path / "c.npz", **jpegs()[0])
        arguments += ["--data.file", str(tmp_path / "c.npz")]
    assert main([str(path.parent), *arguments]) == 0


def test_a_run_folder_may_have_any_name(run_folder, capsys):
    other = run_folder.rename(run_folder.parent / "[a]*{b}")
    assert main([str(other), "--stages", "train,predict", "--train.epochs", "1"]) == 0
    assert yaml.safe_load((other / "out" / "config.yaml").read_text())["model"]["prior"] == "normal(0, 0.1)"
    assert netcdf.read_attrs(other / "out" / "predictive.nc")["run"] == "[a]*{b}"


def test_the_manifest_names_what_the_checkpoint_holds(call, run_folder):
    call("--stages", "train")
    out = run_folder / "out"
    content = json.loads((out / "manifest.json").read_text())
    tensors = load_file(checkpoint.saved(out / "checkpoints")[-1])
    assert [layer["site"] for layer in content["layers"]] == ["fc1.weight", "fc2.weight", "fc3.weight"]
    for layer in content["layers"]:
        for name in (layer["loc"], layer["unconstrained_scale"]):
            assert list(tensors[name].shape) == layer["shape"]
        assert layer["prior"] == "Normal(loc=0, scale=0.1)"
    assert set(content["point_estimates"]) == {name for name in tensors if name.startswith("model.")}
