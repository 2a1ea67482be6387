"""A run follows its likelihood: numbers in a table, digits as numbers, classes in a table."""

import csv
import json

import pytest
import torch
import yaml
from refusals import assert_refused
from run_folders import written

from ppl_bnn.data import Table
from ppl_bnn.experiment.setup import opened
from ppl_bnn.export import main as export
from ppl_bnn.prediction.predictive import predict
from ppl_bnn.results import netcdf
from ppl_bnn.results.saved_draws import read_predictive

NUMBERS = {"nll", "rmse", "crps", "quantile_error", "coverage_95", "width_95", "interval_score_95"}


def table(target, title, classes=()):
    """Training and test rows whose target follows the first of two columns."""
    x = torch.randn(120, 2, generator=torch.Generator().manual_seed(0))
    whole = Table(x, target(x[:, 0].contiguous()), ("left", "right"), "target", title, "train", classes)
    return whole.first(90), whole.rows(slice(90, None), "test")


def stripes(folder, file, progress):
    """Three classes."""
    return table(lambda x: torch.bucketize(x, torch.tensor([-0.4, 0.4])), "Stripes", ("low", "middle", "high"))


def signs(folder, file, progress):
    """Yes or no."""
    return table(lambda x: (x > 0).float(), "Signs")


def counts(folder, file, progress):
    """Counts."""
    generator = torch.Generator().manual_seed(0)
    return table(lambda x: torch.poisson(x.exp(), generator=generator).long(), "Counts")


@pytest.fixture
def diabetes(tmp_path):
    """A regression of seconds on scikit-learn's table."""
    config = {
        "data": {"name": "diabetes", "num_train": 96, "num_test": 24},
        "model": {"name": "mlp", "prior": "normal(0, 0.2)", "likelihood": "normal(predicted)"},
        "train": {"epochs": 3, "batch_size": 32, "optimizer": "adam", "lr": 0.01, "estimator": "local"},
        "predict": {"num_samples": 6},
        "pruning": {"num_samples": 4, "threshold": 0.5, "fractions": [0.0, 0.5]},
    }
    return written(tmp_path / "table", config)


@pytest.mark.any_python
def test_a_regression_goes_through_every_stage(call, diabetes):
    code, lines = call("--stages", "summary,train,diagnose,predict,prune,report", run=diabetes)
    assert code == 0
    out = diabetes / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["data"] == {"title": "Diabetes (standardized)", "train": 96, "test": 24}
    assert metrics["model"] == {"parameters": 6302, "trainable": 6302}
    assert set(metrics["train"]) == {"epochs", "seconds", "samples_per_second"}
    assert {"num_samples", "seconds", "method", "mc_error"} | NUMBERS <= metrics["test"].keys()
    assert not {"accuracy", "ece", "brier"} & metrics["test"].keys()
    assert 0.4 < metrics["test"]["rmse"] < 1.5
    assert [row.keys() >= NUMBERS for row in metrics["pruning"]] == [True] * 3
    assert metrics["convergence"] == []
    assert (out / "figures" / "posterior.png").exists()
    assert not any("accuracy" in line for line in lines)
    assert any("predict: 6 draws" in line and "of 24 rows" in line and "rmse 0." in line for line in lines)
    assert any("prune: 50% pruned" in line and "crps 0." in line for line in lines)
    assert any("figures in" in line and "gallery" not in line for line in lines)
    drawn = [path for path in (out / "figures").glob("*.png") if path.name != "posterior.png"]
    assert any(f"{len(drawn)} figures in" in line for line in lines)
    assert len(drawn) >= 4
    assert yaml.safe_load((out / "config.yaml").read_text())["model"]["likelihood"] == "normal(predicted)"
    assert netcdf.read_attrs(out / "predictive.nc")["inputs"]["model.likelihood"] == "normal(predicted)"
    assert [row["accuracy"] for row in csv.DictReader((out / "log.csv").read_text().splitlines())] == ["nan"] * 3

    code, lines = call(run=diabetes)
    assert code == 0
    assert sum("up to date" in line or "complete already" in line for line in lines) == 5


def test_draws_of_a_regression_are_added_to_and_another_likelihood_is_refused(call, diabetes, tmp_path):
    assert call("--stages", "train,predict", run=diabetes)[0] == 0
    assert call("--stages", "predict", "--predict.num_samples", "10", "--out", tmp_path / "b", run=diabetes)[0] == 2
    code, lines = call("--stages", "predict", "--predict.num_samples", "10", run=diabetes)
    assert code == 0
    assert any("resuming from the 6 draws in predictive.nc" in line for line in lines)
    out = diabetes / "out"
    likelihood = opened(out).model.likelihood
    added = read_predictive(out / "predictive.nc", likelihood)
    (out / "predictive.nc").unlink()
    assert call("--stages", "predict", "--predict.num_samples", "10", run=diabetes)[0] == 0
    whole = read_predictive(out / "predictive.nc", likelihood)
    for name in ("means", "samples", "log_likelihood", "squares", "reference"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name), atol=0, rtol=0)
    assert added.scores() == whole.scores()
    before = (out / "predictive.nc").read_bytes()
    assert_refused(
        call("--model.likelihood", "normal", run=diabetes),
        "model.likelihood: saved 'normal(predicted)', now 'normal'", "--out",
    )  # fmt: skip
    assert (out / "predictive.nc").read_bytes() == before


def test_a_learnt_scale_is_trained_saved_and_pruned_with(call, diabetes):
    arguments = ("--model.likelihood", "normal(learnt)", "--pruning.finetune_epochs", "1")
    assert call("--stages", "train,prune", "--pruning.save_fraction", "0.5", *arguments, run=diabetes)[0] == 0
    run = opened(diabetes / "out")
    start = run.model.likelihood.noise.unconstrained.item()
    run.restored("last")
    assert run.model.likelihood.noise.unconstrained.item() != start
    assert (diabetes / "out" / "pruned.safetensors").exists()


def test_a_regression_is_exported(call, diabetes):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    assert call("--stages", "train", run=diabetes)[0] == 0
    out = diabetes / "out"
    assert export([str(out), "--draws", "4"]) == 0
    run = opened(out)
    run.restored("last")
    x = run.tensors(run.test_data)[0]
    session = runtime.InferenceSession(out / "predictive.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["mean", "std"]
    found = predict(run.model, run.guide, x, num_samples=4, method="draws", progress=False)
    for exported, expected in zip(session.run(None, {"x": x.numpy()}), (found.mean, found.std), strict=True):
        torch.testing.assert_close(torch.from_numpy(exported).double(), expected.double(), atol=1e-4, rtol=1e-4)


def test_digits_may_be_numbers(call, run_folder):
    arguments = (
        "--model.name",
        "mlp",
        "--model.likelihood",
        "normal",
        "--stages",
        "train,predict",
        "--train.lr",
        "0.01",
    )
    code, lines = call(*arguments)
    assert code == 0
    assert any("of 200 images" in line and "rmse" in line for line in lines)
    assert netcdf.read_attrs(run_folder / "out" / "predictive.nc")["rmse"] < 3


def test_a_table_may_have_classes(call, diabetes):
    arguments = ("--data.name", f"{__name__}:stripes", "--model.likelihood", "categorical")
    arguments += ("--train.epochs", "40", "--train.kl_weight", "0.01", "--guide.init_scale", "0.01")
    code, lines = call("--stages", "train,predict,prune,report", *arguments, run=diabetes)
    assert code == 0
    assert any("of 24 rows" in line and "brier" in line for line in lines)
    metrics = json.loads((diabetes / "out" / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] > 0.7
    assert metrics["train"]["accuracy"] > 0.7
    assert metrics["data"]["title"] == "Stripes"
    figures = {path.name for path in (diabetes / "out" / "figures").iterdir()}
    assert {"reliability.png", "risk_coverage.png", "training.png", "snr.png"} <= figures


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model.likelihood", "norml"], ["likelihood 'norml' is not understood; write one of categorical"]),
        (["--model.likelihood", "normal(-1)"], ["likelihood 'normal(-1)': scale must be positive and finite, got -1"]),
        (
            ["--model.likelihood", "categorical"],
            ["model.likelihood categorical does not fit data.name diabetes", "the targets are numbers"],
        ),
        (
            ["--model.likelihood", "normal(log_normal(-1, 1))", "--model.deterministic", "true"],
            ["model.deterministic is trained by maximum likelihood", "has a prior on its scale"],
        ),
        (["--model.name", "bnn-fc"], ["bnn-fc takes images of shape [1, 28, 28], got [10]; mlp takes inputs of any"]),
        (["--model.name", "vgg16"], ["vgg16 takes images of shape", "got [10]; mlp takes inputs of any shape"]),
        (["--stages", "train,shift", "--shift.blur", "[1]"], ["shift.blur does not fit the rows of data.name"]),
        (["--channels_last", "true"], ["channels_last is for images, and data.name diabetes is a table"]),
        (["--train.augment", "crop_flip"], ["train.augment is for images, and data.name diabetes is a table"]),
        (["--pruning.keep_images", "[24]"], ["pruning.keep_images must be numbers of test rows, from 0 to 23; got 24"]),
        (["--predict.tolerance", "0"], ["predict.tolerance must be positive and finite, got 0"]),
        (["--data.file", "x.npz"], ["it cannot be used with 'diabetes'"]),
        (["--data.holdout", "400"], ["data.holdout must be from 0 to 331, got 400"]),
        (
            ["--data.name", "mnist", "--model.name", "bnn-fc"],
            ["model.name bnn-fc gives outputs [N, 10], and model.likelihood normal(predicted) needs [N, 2]", "mlp"],
        ),
        (
            ["--data.name", "mnist", "--model.name", "bnn-fc", "--model.likelihood", "categorical",
             "--predict.tolerance", "1"],
            ["predict.tolerance must be above 0 and below 1 for probabilities, got 1"],
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_any_work(call, diabetes, data_dir, arguments, parts):
    assert_refused(call("--data.dir", data_dir, *arguments, run=diabetes), *parts)
    assert not (diabetes / "out" / "checkpoints").exists()


def test_a_tolerance_is_in_units_of_the_target(call, diabetes):
    arguments = ("--predict.num_samples", "400", "--predict.tolerance", "1.5")
    code, lines = call("--stages", "train,predict", *arguments, run=diabetes)
    assert code == 0
    assert any("draws per row: mean" in line and "100.0% of the rows stopped early" in line for line in lines)


@pytest.mark.parametrize(
    "likelihood",
    ["normal(0.5)", "student_t(5, learnt)", "normal(log_normal(-1, 0.5))", "negative_binomial", "bernoulli"],
)
def test_every_family_goes_from_training_to_the_report(call, diabetes, likelihood):
    data = {"negative_binomial": "counts", "bernoulli": "signs"}.get(likelihood)
    arguments = ["--model.likelihood", likelihood, "--train.epochs", "1"]
    arguments += ["--data.name", f"{__name__}:{data}"] if data else []
    assert call(*arguments, run=diabetes)[0] == 0
    metrics = json.loads((diabetes / "out" / "metrics.json").read_text())
    expected = {"nll", "accuracy"} if data == "signs" else {"nll", "rmse", "crps"}
    assert expected <= metrics["test"].keys()
    assert all(expected <= row.keys() for row in metrics["pruning"])
