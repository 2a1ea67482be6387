"""The command line, end to end on real digits, and every way it can be given something wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ppl_bnn import checkpoint, netcdf, predict, stage_prune
from ppl_bnn.experiment import opened
from ppl_bnn.pruning import finetune
from ppl_bnn.pruning.storage import load_pruned
from ppl_bnn.run import main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run_folder(tmp_path, data_dir):
    """A run of seconds on real MNIST: 600 training and 200 test digits."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {
        "data": {"dir": str(data_dir), "num_train": 600, "num_test": 200},
        "model": {"prior": "normal(0, 0.1)"},
        "train": {"epochs": 2, "optimizer": "adam", "estimator": "local", "kl_weight": 0.1},
        "predict": {"num_samples": 5},
        "pruning": {"num_samples": 3, "threshold": [0.5, 10.0], "fractions": [0.0, 0.5, 0.9]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def call(run_folder, capsys):
    """Run the command line in this process: (exit code, the lines it wrote to standard error)."""

    def _call(*arguments, run=run_folder):
        capsys.readouterr()
        code = main([str(run), *map(str, arguments)])
        return code, capsys.readouterr().err.strip().splitlines()

    return _call


def training_command(run_folder):
    """Train in a process of its own, with a checkpoint every epoch."""
    command = [sys.executable, "-m", "ppl_bnn.run", str(run_folder), "--stages", "train"]
    return [*command, "--train.checkpoint_every", "1"]


def assert_refused(result, *parts):
    code, lines = result
    assert code == 2
    assert len(lines) == 1, lines
    for part in ("error:", *parts):
        assert part in lines[0]


def test_a_run_leaves_every_result(call, run_folder):
    code, _ = call()
    assert code == 0
    out = run_folder / "out"
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "log.csv", "checkpoints", "posterior.json", "predictive.nc", "pruning.nc", "metrics.json",
        "figures", "manifest.json", "performance.json",
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

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".nc", ".safetensors")}
    code, lines = call()
    assert code == 0
    assert any("complete already" in line for line in lines)
    assert sum("up to date" in line for line in lines) == 2
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}

    code, lines = call("--stages", "predict", "--predict.num_samples", "7")
    assert code == 0
    assert any("settings.num_samples is 5 there and 7 here" in line for line in lines)
    assert netcdf.read_attrs(out / "predictive.nc")["num_samples"] == 7

    assert_refused(call("--train.lr", "0.1"), "train.lr is 0.001 there and 0.1 here", "--out")
    assert stamps[out / "pruning.nc"] == (out / "pruning.nc").stat().st_mtime_ns


def test_an_earlier_step_is_pruned_by_name(call, run_folder):
    call("--stages", "train,prune", "--train.checkpoint_every", "1")
    last = netcdf.read_attrs(run_folder / "out" / "pruning.nc")
    assert call("--stages", "prune", "--pruning.checkpoint", "step-00000006", "--train.checkpoint_every", "1")[0] == 0
    early = netcdf.read_attrs(run_folder / "out" / "pruning.nc")
    assert (last["step"], early["step"]) == (12, 6)
    assert_refused(
        call("--stages", "prune", "--pruning.checkpoint", "7"), "no checkpoint '7'", "step-00000006, step-00000012"
    )


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


def test_help_teaches_and_print_config_resolves():
    def output(*arguments):
        command = [sys.executable, "-m", "ppl_bnn.run", *arguments]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    text = output("--help")
    for part in (
        "Exit codes: 0 done",
        "--train.kl_weight",
        "below 1 a colder one",
        "infimnist-compatible indexing, own fields",
        "scale_mixture(weight, scale1, scale2)",
    ):
        assert part in text
    config = yaml.safe_load(output("runs/study-mnist-fc", "--train.epochs", "3", "--print_config"))
    assert config["train"]["epochs"] == 3
    assert config["train"]["optimizer"] == "rmsprop"


@pytest.mark.parametrize("path", sorted(ROOT.glob("runs/*/config.yaml")), ids=lambda path: path.parent.name)
def test_every_run_that_is_shipped_is_valid(path, data_dir, tmp_path, capsys):
    import numpy as np
    from test_data import jpegs

    arguments = ["--stages", "summary", "--data.dir", str(data_dir)]
    if path.parent.name.startswith(("cifar10", "study-cifar10")):
        np.savez(tmp_path / "c.npz", **jpegs()[0])
        arguments += ["--data.file", str(tmp_path / "c.npz")]
    assert main([str(path.parent), *arguments]) == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--train.epoch", "3"], ["--train.epoch", "did you mean train.epochs?"]),
        (["--train.lr", "fast"], ['"train.lr"', "fast"]),
        (["--train.epochs", "0"], ["train.epochs must be at least 1, got 0"]),
        (["--predict.num_samples", "0"], ["predict.num_samples must be at least 1, got 0"]),
        (["--pruning.threshold", "-1"], ["pruning.threshold must be at least 0"]),
        (["--pruning.threshold", '{"fc1*":.nan}'], ["pruning.threshold must be at least 0 and finite; got nan"]),
        (["--pruning.criterion", "magnitude"], ["pruning.criterion must be one of snr, kl, evidence"]),
        (["--pruning.structure", "rows"], ["pruning.structure must be one of weights, units, inputs"]),
        (["--pruning.finetune_lr", "0"], ["pruning.finetune_lr must be positive"]),
        (["--pruning.fractions", "[0.5,1.0]"], ["pruning.fractions must lie in [0, 1), got 1.0"]),
        (["--pruning.fractions", "[]", "--pruning.threshold", "[]"], ["at least one threshold or fraction"]),
        (["--guide.init_loc", ".inf"], ["guide.init_loc must be a finite number"]),
        (["--train.seed", str(2**64)], ["train.seed must be at least 0 and below 2^63"]),
        (["--model.prior", "normal(0)"], ["normal(loc, scale)"]),
        (["--model.prior", '{"conv*": "normal(0, 1)"}'], ["no prior for site 'fc1.weight'"]),
        (
            ["--model.name", "alexnet"],
            ["model.name must be one of bnn-fc, bnn-conv, lenet, vgg16, resnet18; got 'alexnet'"],
        ),
        (["--data.name", "svhn"], ["data.name must be one of mnist"]),
        (["--train.estimator", "magic"], ["train.estimator must be one of plain, flipout, groups, local"]),
        (["--train.kl_weight", "0"], ["kl_weight must be positive"]),
        (["--guide.init_loc", "xavier"], ["guide.init_loc must be a finite number or 'he'"]),
        (
            ["--stages", "train,dance"],
            ["unknown stage 'dance'", "summary, train, posterior, predict, shift, prune, report"],
        ),
        (["--device", "tpu9"], ["device 'tpu9' cannot be used"]),
        (["--stages", "predict"], ["no checkpoint", "run the train stage first"]),
        (["--stages", "report"], ["no checkpoint", "run the train stage first"]),
    ],
)
def test_bad_settings_are_one_line(call, arguments, parts):
    assert_refused(call(*arguments), *parts)


def test_a_refused_first_try_does_not_stand_in_the_way(call, run_folder):
    assert_refused(call("--stages", "train", "--model.prior", '{"conv*": "normal(0, 1)"}'), "no prior for site")
    assert call("--stages", "train", "--train.epochs", "1")[0] == 0


def test_a_report_is_not_made_of_results_with_other_settings(call, run_folder):
    assert call("--stages", "train,predict,prune,report")[0] == 0
    out = run_folder / "out"
    before = (out / "metrics.json").read_text()
    assert_refused(
        call("--stages", "report", "--predict.num_samples", 9), "predictive.nc is out of date", "5 there and 9"
    )
    assert_refused(call("--stages", "report", "--pruning.seed", 3), "pruning.nc is out of date", "settings.seed")
    for path in (out / "checkpoints").iterdir():
        path.unlink()
    assert_refused(call("--stages", "report", "--model.prior", "laplace(0, 3)"), "holds a run with other settings")
    assert (out / "metrics.json").read_text() == before


def test_a_run_trained_on_other_data_is_not_relabelled(call, run_folder, monkeypatch):
    """Trained on the subset while MNIST could not be had, and given MNIST afterwards."""
    from dataclasses import replace

    from ppl_bnn import experiment

    real = experiment.load

    def subset(*arguments, **keywords):
        return tuple(replace(images, title="MNIST (5,000-digit subset)") for images in real(*arguments, **keywords))

    monkeypatch.setattr(experiment, "load", subset)
    assert call()[0] == 0
    out = run_folder / "out"
    assert json.loads((out / "metrics.json").read_text())["data"]["title"] == "MNIST (5,000-digit subset)"
    monkeypatch.undo()
    for stage in ("train", "predict", "prune", "report"):
        assert_refused(call("--stages", stage), "is of another run", "600 images of MNIST (5,000-digit subset)")


def test_ctrl_c_before_the_stages_does_not_pass_for_a_failed_download(call, run_folder, monkeypatch):
    from ppl_bnn import experiment

    def interrupted(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(experiment, "load", interrupted)
    code, lines = call()
    assert code == 75
    assert lines == ["stopped at once; run the same command again to go on from what is saved"]
    assert not (run_folder / "out" / "checkpoints").exists()


def test_a_run_folder_may_have_any_name(run_folder, capsys):
    other = run_folder.rename(run_folder.parent / "[a]*{b}")
    assert main([str(other), "--stages", "train,predict", "--train.epochs", "1"]) == 0
    assert yaml.safe_load((other / "out" / "config.yaml").read_text())["model"]["prior"] == "normal(0, 0.1)"
    assert netcdf.read_attrs(other / "out" / "predictive.nc")["run"] == "[a]*{b}"


def test_bad_places_are_one_line(call, run_folder, tmp_path):
    assert_refused(call(run=tmp_path / "nowhere"), "there is no", "config.yaml")
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert_refused(call("--data.dir", blocked / "data"), "data folder", "cannot be used")
    assert_refused(call("--out", blocked / "out"), "out folder", "cannot be written")
    (run_folder / "config.yaml").write_text("train: {epoch: 3}")
    assert_refused(call(), "config.yaml", "train", "epoch", "did you mean train.epochs?")
    (run_folder / "config.yaml").write_text("train: [")
    assert_refused(call(), "config.yaml is not valid YAML")
    (run_folder / "config.yaml").write_text("- 1")
    assert_refused(call(), "must be a mapping")


def test_damaged_results_are_named_and_kept(call, run_folder):
    assert call("--stages", "train,predict")[0] == 0
    out = run_folder / "out"
    saved = checkpoint.find(out / "checkpoints")
    whole = saved.read_bytes()
    predictive = (out / "predictive.nc").read_bytes()

    saved.write_bytes(whole[: len(whole) // 2])
    for stage in ("train", "predict"):
        assert_refused(call("--stages", stage), saved.name, "is truncated", "delete it")
    assert (out / "predictive.nc").read_bytes() == predictive
    saved.write_bytes(whole)

    (out / "predictive.nc").write_bytes(predictive[:-100])
    assert_refused(call("--stages", "report"), "predictive.nc is truncated", "run its stage again")
    assert saved.read_bytes() == whole
    (out / "predictive.nc").unlink()
    assert call("--stages", "predict,report")[0] == 0


def test_a_layer_that_loses_everything_is_named_and_the_network_still_runs(call, run_folder):
    code, lines = call(
        "--stages", "train,prune", "--pruning.threshold", '{"fc2*":1e6,"*":0.0}', "--pruning.fractions", "[]"
    )
    assert code == 0
    warning = next(line for line in lines if "no weight is left in" in line)
    assert "fc2.weight" in warning
    levels = netcdf.read_group(run_folder / "out" / "pruning.nc", "pruning")
    assert levels["nonzero_by_layer"].values.tolist() == [[784 * 256, 0, 2560]]
    assert levels["threshold"].values.tolist() == [1e6]


def test_a_posterior_with_nan_is_refused_by_name(call, run_folder):
    call("--stages", "train,prune")
    out = run_folder / "out"
    before = (out / "pruning.nc").read_bytes()
    path = checkpoint.saved(out / "checkpoints")[-1]
    state = checkpoint.load(path)
    parts = {name: torch.nn.Module() for name in ("model", "guide")}
    for name, module in parts.items():
        tensors = state.part(name)
        if name == "guide":
            tensors["unconstrained_scale.fc2.weight"][0, 0] = float("nan")
        module.state_dict = lambda tensors=tensors: tensors
    checkpoint.save(out / "checkpoints", state.step, **parts, meta=state.meta)
    for criterion in ("snr", "evidence"):
        code, lines = call("--stages", "prune", "--pruning.criterion", criterion)
        assert code == 2
        assert lines[-1].startswith(
            "error: site 'fc2.weight' has a loc that is not finite or a scale that is not positive"
        )
    assert (out / "pruning.nc").read_bytes() == before


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


def test_criteria_structures_and_finetuning_from_the_command_line(call, run_folder):
    call("--stages", "train,predict,prune")
    plain = netcdf.read_group(run_folder / "out" / "pruning.nc", "pruning")
    choice = ["--pruning.criterion", "evidence", "--pruning.structure", "inputs", "--pruning.threshold", "-0.5"]
    choice += ["--pruning.finetune_epochs", 2, "--pruning.finetune_lr", "1e-3"]
    code, _ = call("--stages", "prune,report", *choice)
    assert code == 0
    tuned = netcdf.read_group(run_folder / "out" / "pruning.nc", "pruning")
    assert tuned["accuracy"].values[tuned["pruned_fraction"].values > 0.85].max() > plain["accuracy"].values[-2]
    assert {path.name for path in (run_folder / "out" / "figures").iterdir()} >= {"pruning.png", "pruning_answers.png"}


def test_the_saved_posterior_is_the_fine_tuned_level_and_is_tuned_once(call, run_folder, monkeypatch):
    call("--stages", "train")
    tuned = []
    monkeypatch.setattr(
        stage_prune, "finetune", lambda *args, **settings: tuned.append(args[1].fraction) or finetune(*args, **settings)
    )
    choice = ["--pruning.finetune_epochs", 1, "--pruning.save_fraction", "0.9", "--pruning.threshold", "0"]
    assert call("--stages", "prune", *choice)[0] == 0
    assert tuned == pytest.approx([0.5, 0.9], abs=1e-5)
    out = run_folder / "out"
    run = opened(out)
    run.restored("last")
    untouched = {name: value.clone() for name, value in run.model.state_dict().items()}
    guide = load_pruned(out / "pruned.safetensors", model=run.model, guide=run.guide)
    assert any(not torch.equal(value, untouched[name]) for name, value in run.model.state_dict().items())
    x, y = run.test_tensors()
    found = predict(run.model.net, guide, x, y, num_samples=3, method="draws", progress=False)
    there = netcdf.read_group(out / "pruning.nc", "pruning")
    torch.testing.assert_close(
        found.mean_probs.float(), torch.from_numpy(there["mean_probs"].values[-1]).float(), rtol=0, atol=1e-4
    )
    call("--stages", "prune", *choice)
    assert len(tuned) == 2
    (out / "pruned.safetensors").unlink()
    call("--stages", "prune", *choice)
    assert len(tuned) == 4
    choice[3] = "0.8"
    call("--stages", "prune", *choice)
    assert tuned[4:] == pytest.approx([0.5, 0.8, 0.9], abs=1e-5)


def test_a_fine_tuning_that_was_cut_off_goes_on_where_it_was(call, run_folder, monkeypatch):
    choice = ["--pruning.finetune_epochs", 2, "--pruning.threshold", "0", "--pruning.save_fraction", "0.9"]
    choice += ["--train.checkpoint_every", 1]
    call("--stages", "train,prune", *choice)
    out = run_folder / "out"
    whole = load_file(out / "pruned.safetensors")
    assert not (out / "finetuning").exists()
    for name in ("pruned.safetensors", "pruning.nc"):
        (out / name).unlink()
    seen = []

    def cut_off(*args, **settings):
        # In the second level's second epoch, as an exception between two steps: what a crash leaves behind.
        seen.append(args[1].fraction)
        asked = iter(range(100))
        settings["should_stop"] = lambda: len(seen) == 2 and next(asked) == 8 and 1 / 0
        return finetune(*args, **settings)

    monkeypatch.setattr(stage_prune, "finetune", cut_off)
    assert call("--stages", "prune", *choice)[0] == 1
    steps = {path.parent.parent.name[:6]: path.stem for path in sorted(out.glob("finetuning/*/checkpoints/*"))}
    assert steps == {"0.5000": "step-00000012", "0.9000": "step-00000006"}
    monkeypatch.undo()
    assert call("--stages", "prune", *choice)[0] == 0
    assert not (out / "finetuning").exists()
    again = load_file(out / "pruned.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_a_full_disk_costs_nothing_that_was_there(run_folder):
    """A limit on file size is what a full disk is to the writer: the checkpoint does not fit."""
    command = training_command(run_folder)
    limited = ["bash", "-c", f"ulimit -f 4000; exec {' '.join(command)}"]
    result = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "step-00000006.safetensors" in result.stderr.splitlines()[-1]
    assert "unharmed, run again to go on" in result.stderr.splitlines()[-1]
    assert not list((run_folder / "out").rglob("*.part"))
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize("stage", ["predict", "prune"])
def test_a_signal_during_draws_exits_75_and_the_same_command_goes_on(run_folder, tmp_path, stage):
    base = [sys.executable, "-m", "ppl_bnn.run", str(run_folder), "--predict.method", "draws", "--stages"]
    subprocess.run([*base, "train"], cwd=ROOT, check=True, capture_output=True)
    setting = {"predict": "--predict.num_samples", "prune": "--pruning.num_samples"}[stage]
    code = (
        "import os, signal, sys; from ppl_bnn import predictive, run; real = predictive.drawn_blocks\n"
        "def blocks(*a, **k):\n"
        "    size, logits = real(*a, **k)\n"
        "    def stopped(block, sign):\n"
        "        if block == 2: os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return logits(block, sign)\n"
        "    return predictive.Blocks(size, stopped)\n"
        "predictive.drawn_blocks = blocks; sys.exit(run.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *base[3:], stage, setting, "6"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 75, result.stderr
    assert "stopped after draw 3 of 6" in result.stderr.splitlines()[-1]
    out = run_folder / "out"
    assert [path.name for path in out.glob("*.nc")] == {"predict": ["predictive.partial.nc"], "prune": []}[stage]
    again = subprocess.run([*base, stage, setting, "6"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0
    assert ("going on from the 3 draws in predictive.partial.nc" in again.stderr) == (stage == "predict")
    assert len(list(out.glob("*.nc"))) == 1
    if stage == "predict":
        whole = [*base, stage, setting, "6", "--out", str(tmp_path / "whole")]
        (tmp_path / "whole").mkdir()
        (tmp_path / "whole" / "checkpoints").symlink_to(out / "checkpoints")
        subprocess.run(whole, cwd=ROOT, check=True, capture_output=True)
        for group in ("posterior_predictive", "log_likelihood", "uncertainty", "monte_carlo", "sample_stats"):
            one, other = (netcdf.read_group(path / "predictive.nc", group) for path in (out, tmp_path / "whole"))
            # Kept probabilities are stored in steps of 1/65534, and what is made of them again with them.
            made_again = [name for name in ("std_probs", "interval") if name in one]
            assert one.drop_vars(made_again).identical(other.drop_vars(made_again)), group
            for name in made_again:
                np.testing.assert_allclose(one[name], other[name], atol=1.6e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(run_folder, tmp_path, number):
    command = [sys.executable, "-m", "ppl_bnn.run", str(run_folder), "--stages", "train", "--train.epochs", "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    log = run_folder / "out" / "log.csv"
    deadline = time.monotonic() + 90
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "run the same command again" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert 0 < checkpoint.load(checkpoint.find(run_folder / "out" / "checkpoints")).step < 360
    assert subprocess.run(command, cwd=ROOT, capture_output=True, env=environment).returncode == 0
    whole = [*command, "--out", str(tmp_path / "whole")]
    subprocess.run(whole, cwd=ROOT, check=True, capture_output=True, env=environment)
    cut, uncut = (
        load_file(checkpoint.find(folder / "checkpoints")) for folder in (run_folder / "out", tmp_path / "whole")
    )
    assert cut.keys() == uncut.keys()
    for name, tensor in cut.items():
        assert torch.equal(tensor, uncut[name]), name


def test_killed_at_any_step_and_started_again_it_ends_bitwise_the_same(run_folder, tmp_path):
    settings = ["--train.epochs", "12", "--train.checkpoint_minutes", "0.001", "--train.keep_checkpoints", "3"]
    command = [*training_command(run_folder), *settings, "--threads", "1"]
    whole = [*command, "--out", str(tmp_path / "whole")]
    subprocess.run(whole, cwd=ROOT, check=True, capture_output=True)
    checkpoints = run_folder / "out" / "checkpoints"
    for steps in (0, 13, 50):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            if (found := checkpoint.saved(checkpoints)) and checkpoint.step_of(found[-1]) >= steps:
                break
            time.sleep(0.002)
        process.kill()
        process.wait()
    before = checkpoint.step_of(checkpoint.find(checkpoints))
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"going on from step-{before:08d}" in result.stderr
    assert 50 <= before < 72
    cut, uncut = (checkpoint.load(checkpoint.find(folder)) for folder in (checkpoints, tmp_path / "whole/checkpoints"))
    assert cut.tensors.keys() == uncut.tensors.keys()
    assert all(torch.equal(tensor, uncut.tensors[name]) for name, tensor in cut.tensors.items())
    for name in ("history", "step_records"):
        cut_rows, uncut_rows = (
            [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in state.meta[name]]
            for state in (cut, uncut)
        )
        assert cut_rows == uncut_rows
    assert len(checkpoint.saved(checkpoints)) == 4
    assert (run_folder / "out" / "log.csv").exists()


def test_a_divergence_exits_1_with_one_line(call):
    code, lines = call("--stages", "train", "--train.lr", "1e30")
    assert code == 1
    assert "error: training went bad at step" in lines[-1]
    assert "Traceback" not in "\n".join(lines)


def test_the_network_must_fit_the_images(call, tmp_path):
    import numpy as np
    from test_data import jpegs

    np.savez(tmp_path / "c.npz", **jpegs()[0])
    assert_refused(
        call("--data.name", "cifar10", "--data.file", tmp_path / "c.npz"),
        "bnn-fc takes images of shape [1, 28, 28], got [3, 32, 32]",
    )
