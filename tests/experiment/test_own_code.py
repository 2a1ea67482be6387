"""Networks, priors, likelihoods, optimizers, estimators and augmentations of the user's own, beside a config.yaml."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from own_runs import NETS, own_run, ran
from refusals import assert_refused

from ppl_bnn.errors import FileError
from ppl_bnn.experiment.setup import opened
from ppl_bnn.export import main as export
from ppl_bnn.run import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    with own_run(tmp_path, monkeypatch) as made:
        yield made


def weights(folder, out="out"):
    guide = opened(folder / out).restored("last").part("guide")
    return {name.removeprefix("loc."): tuple(value.shape) for name, value in guide.items() if name.startswith("loc.")}


def test_modules_beside_the_settings_train_predict_and_export(folder, capsys):
    code, lines = ran(capsys, folder, "--stages", "summary,train,predict,report", "--model.options", '{"width": 5}')
    assert code == 0
    told = [line for line in lines if "executes code" in line]
    assert told == [
        "this run executes code of its own: data.name nets:tables, model.name nets:Net, model.prior nets:fan_in"
    ]
    assert weights(folder) == {"0.weight": (5, 3), "2.weight": (2, 5)}
    assert json.loads((folder / "out" / "metrics.json").read_text())["test"]["accuracy"] > 0.4
    # The out folder alone finds the code in the folder around it.
    assert main([str(folder / "out"), "--stages", "predict", "--predict.num_samples", "6"]) == 0
    capsys.readouterr()
    assert export([str(folder), "--draws", "2"]) == 0
    assert capsys.readouterr().err.count("executes code of its own") == 1
    assert (folder / "out" / "predictive.onnx").exists()


def test_results_are_made_anew_after_a_change_of_the_code_and_the_checkpoint_warns(folder, capsys):
    assert ran(capsys, folder, "--stages", "train,predict")[0] == 0
    code, lines = ran(capsys, folder, "--stages", "predict")
    assert (code, lines[-1]) == (0, "predict: predictive.nc is up to date")
    sys.modules.pop("nets")
    (folder / "nets.py").write_text(NETS.replace("nn.ReLU()", "nn.Tanh()"))
    code, lines = ran(capsys, folder, "--stages", "predict")
    assert code == 0
    assert "'nets' changed after step-00000004.safetensors was trained, and goes on with its numbers" in lines
    assert any("predict: recomputing predictive.nc (code.nets: saved" in line for line in lines)
    code, lines = ran(capsys, folder, "--stages", "predict")
    assert lines[-1] == "predict: predictive.nc is up to date"


def test_settings_of_the_network_are_settings_of_the_training(folder, capsys):
    assert ran(capsys, folder, "--model.options.width", "5")[0] == 0
    for arguments, now in ((["--model.options.width", "6"], "{'width': 6}"), ([], "{}")):
        code, lines = ran(capsys, folder, *arguments)
        assert code == 2
        assert f"model.options: saved {{'width': 5}}, now {now}; choose another folder" in lines[-1]


@pytest.mark.parametrize(
    "settings",
    [
        {"model.prior": "nets:by_layer"},
        {"model.prior": '{"0.*": "nets:fan_in", "*": "normal(0, 1)"}'},
        {"model.likelihood": "nets:likelihood"},
        {"train.optimizer": "nets:SGD"},
        {"train.estimator": "contextlib:nullcontext"},
        {"model.name": "nets:NoShape", "model.options": '{"width": 4}'},
        {"model.name": "nets:NoShape"},
        {"model.name": "nets:already", "model.prior": "normal(0, 1)"},
    ],
    ids=str,
)
def test_each_kind_of_own_code_trains(folder, capsys, settings):
    assert ran(capsys, folder, *(part for name, value in settings.items() for part in (f"--{name}", value)))[0] == 0
    assert (folder / "out" / "checkpoints").is_dir()


def test_an_augmentation_of_ones_own_changes_the_training(call, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_augmentation.py").write_text(NETS)
    losses = []
    for augment in ("none", "own_augmentation:jitter"):
        out = tmp_path / augment.replace(":", "-")
        assert call("--stages", "train", "--train.epochs", 1, "--train.augment", augment, "--out", out)[0] == 0
        losses.append((out / "log.csv").read_text())
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.name", "nets:Nett"], "model.name must be importable, got 'nets:Nett': AttributeError"),
        (["--model.name", "mets:Net"], "got 'mets:Net': ModuleNotFoundError: No module named 'mets'"),
        (["--model.options", "{widht: 4}"], "model.options has 'widht' (did you mean width?), and nets:Net takes"),
        (["--model.options", "{width: wide}"], "the network nets:Net((3,), width='wide', num_outputs=2) cannot be"),
        (["--model.name", "nets:failing"], "the network nets:failing((3,)) cannot be made: RuntimeError: no such"),
        (["--model.name", "nets:no_network"], "nets:no_network must be a torch.nn.Module or return one, got 'a n"),
        (["--model.name", "nets:already"], "a network that is Bayesian already, with priors of its own: leave out"),
        (["--model.name", "mlp", "--model.options", "{depth: 3}"], "model.options has 'depth', and mlp takes input"),
        (["--model.prior", "nets:fan_out"], "model.prior must be importable, got 'nets:fan_out': AttributeError"),
        (["--model.prior", "nets:failing_prior"], "model.prior nets:failing_prior(0.weight, torch.Size([8, 3])) fail"),
        (["--model.likelihood", "nets:failing_likelihood"], "cannot be made: KeyError: 'scale'"),
        (["--data.name", "nets:not_finite", "--quiet"], "error: example 41: its inputs have NaN or infinite values ("),
        (["--model.name", "nets:Unfit"], "model.name nets:Unfit does not fit data.name nets:tables: the network fails"),
        (["--model.name", "nets:Unfit", "--stages", "summary"], "fails on x of float32 [N, 3] (RuntimeError: mat1 and"),
    ],
)  # fmt: skip
def test_own_code_that_fails_is_refused_in_one_line(folder, capsys, arguments, message):
    assert_refused(ran(capsys, folder, *arguments), message)


def test_debug_shows_the_traceback_of_a_module_that_does_not_import(folder, capsys):
    (folder / "nets.py").write_text("import not_installed_here\n")
    code, lines = ran(capsys, folder)
    assert code == 2
    # It says whose code it is before it imports that.
    assert lines == [
        "this run executes code of its own: data.name nets:tables, model.name nets:Net, model.prior nets:fan_in",
        "error: data.name must be importable, got 'nets:tables': ModuleNotFoundError: No module named "
        "'not_installed_here'",
    ]
    code, lines = ran(capsys, folder, "--debug")
    assert any('nets.py", line 1' in line for line in lines)


def test_the_page_on_the_command_line_shows_a_network_and_a_prior_that_train(folder, capsys):
    text = (Path(__file__).parent.parent.parent / "docs" / "command-line.md").read_text()
    (code,), (settings,) = (re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL) for kind in ("python", "yaml"))
    (folder / "nets.py").write_text(code)
    data = {"data": {"name": "diabetes"}, "train": {"epochs": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**data, **yaml.safe_load(settings)}))
    assert ran(capsys, folder, "--model.likelihood", "normal")[0] == 0
    assert weights(folder) == {"0.weight": (64, 10), "2.weight": (1, 64)}


def test_an_out_folder_whose_code_is_gone_says_so(folder, capsys):
    assert ran(capsys, folder)[0] == 0
    (folder / "nets.py").unlink()
    sys.modules.pop("nets")
    with pytest.raises(FileError, match=r"config.yaml: \S+ must be importable, got 'nets:\w+': ModuleNotFoundError"):
        opened(folder / "out")


def test_the_modules_of_two_runs_are_told_apart(folder, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text((folder / "config.yaml").read_text())
    (other / "nets.py").write_text(NETS.replace("width=8", "width=9"))
    for run, width in ((folder, 8), (other, 9), (folder, 8)):
        assert ran(capsys, run, "--out", str(run / str(width)))[0] == 0
        assert weights(run, str(width))["0.weight"] == (width, 3)


def test_the_working_directory_is_importable_from_the_console_script(folder, tmp_path):
    (folder / "nets.py").rename(tmp_path / "nets.py")
    command = "import sys; sys.path.pop(0); from ppl_bnn.__main__ import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", command, "run", str(folder), "--stages", "summary"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "nets:Net (Bayesian) on Signs" in done.stdout
