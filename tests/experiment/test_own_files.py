"""Files of the user's own at the command line: a CSV from training to report, and what is refused."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from refusals import assert_refused
from run_folders import written
from sklearn.datasets import load_diabetes, load_wine

from ppl_bnn import open_run
from ppl_bnn.errors import FileError
from ppl_bnn.experiment.config import Config, DataConfig, ModelConfig, TrainConfig
from ppl_bnn.experiment.run_data import load_data
from ppl_bnn.experiment.setup import opened
from ppl_bnn.experiment.shift_kinds import other_data
from ppl_bnn.results import netcdf
from ppl_bnn.run import main

SHORT = {
    "train": {"epochs": 2},
    "predict": {"num_samples": 4},
    "pruning": {"num_samples": 2, "threshold": [], "fractions": [0.0, 0.5]},
}


@pytest.fixture
def diabetes(tmp_path):
    """A run folder with scikit-learn's table as a CSV in it."""
    data = {"name": "csv", "file": "patients.csv", "target": "target"}
    folder = written(tmp_path / "diabetes", {"data": data, "model": {"name": "mlp", "likelihood": "normal"}, **SHORT})
    load_diabetes(as_frame=True, scaled=False).frame.to_csv(folder / "patients.csv", index=False)
    return folder


@pytest.fixture
def wine(tmp_path):
    """A run folder with scikit-learn's wines, whose cultivars are texts, in a CSV elsewhere."""
    bunch = load_wine(as_frame=True)
    frame = bunch.frame.assign(target=[bunch.target_names[label] for label in bunch.target])
    frame.to_csv(tmp_path / "wine.csv", index=False)
    data = {"name": "csv", "file": str(tmp_path / "wine.csv"), "target": "target"}
    return written(tmp_path / "wine", {"data": data, "model": {"name": "mlp"}, **SHORT})


@pytest.mark.any_python
def test_a_csv_of_numbers_goes_from_training_to_report(diabetes, call, tmp_path, monkeypatch):
    code, lines = call("--quiet", run=diabetes)
    assert code == 0, lines
    assert any(line.startswith("data: target standardized: mean 151.446, standard deviation 76.9703") for line in lines)
    metrics = json.loads((diabetes / "out" / "metrics.json").read_text())
    assert metrics["data"] == {**metrics["data"], "title": "patients", "train": 354, "test": 88}
    assert 0 < metrics["test"]["rmse"] < 2
    known = netcdf.read_attrs(diabetes / "out" / "predictive.nc")
    assert known["y_label"] == "target (training standard deviations)"
    assert len(known["inputs"]["data"]["checksum"]) == 8
    # The out folder alone tells where the file is, from anywhere.
    monkeypatch.chdir(tmp_path)
    assert yaml.safe_load((diabetes / "out" / "config.yaml").read_text())["data"]["file"] == str(
        diabetes / "patients.csv"
    )
    code, lines = call("--stages", "train,predict", "--quiet", run=diabetes / "out")
    assert code == 0
    assert any("predictive.nc is up to date" in line for line in lines)
    run = opened(diabetes / "out")
    assert (run.train_data.title, run.examples) == ("patients", "rows")
    x, y = run.examples_of(run.test_data)
    assert (x.shape, y.shape) == ((88, 10), (88,))
    # A file that moved is looked for by its name.
    moved = tmp_path / "moved"
    moved.mkdir()
    (diabetes / "patients.csv").rename(tmp_path / "patients.csv")
    found = open_run(diabetes / "out", data_dir=str(moved))
    with pytest.raises(FileError, match=r"data.file .*/diabetes/patients.csv is not there, and neither is .*/moved/pa"):
        found.test_data  # noqa: B018
    (tmp_path / "patients.csv").rename(moved / "patients.csv")
    assert torch.equal(opened(diabetes / "out", data_dir=str(moved)).test_data.inputs(), x)


def test_a_csv_of_classes_goes_from_training_to_report(wine, call):
    code, lines = call("--quiet", run=wine)
    assert code == 0, lines
    metrics = json.loads((wine / "out" / "metrics.json").read_text())
    assert 0 <= metrics["test"]["accuracy"] <= 1
    found = netcdf.read_group(wine / "out" / "predictive.nc", "posterior_predictive")
    assert found["class"].values.tolist() == ["class_0", "class_1", "class_2"]


def test_the_layer_table_needs_no_training(wine, call, capsys):
    assert main([str(wine), "--stages", "summary", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "mlp (Bayesian) on wine" in text
    assert "Total parameters:" in text
    assert not (wine / "out").exists()


def test_a_file_that_changed_is_not_mixed_with_results_of_before(wine, call, tmp_path):
    assert call("--stages", "train", "--quiet", run=wine)[0] == 0
    frame = pd.read_csv(tmp_path / "wine.csv")
    frame.loc[:, "hue"] = np.roll(frame["hue"], 1)
    frame.to_csv(tmp_path / "wine.csv", index=False)
    assert_refused(call("--quiet", run=wine), "belongs to another run: trained on.checksum: saved '")


def test_settings_of_the_columns_are_those_of_the_training(wine, call):
    assert call("--stages", "train", "--quiet", run=wine)[0] == 0
    assert_refused(call("--data.features", "[hue]", run=wine), "data.features: saved None, now ['hue']; choose another")


def test_rows_may_be_held_out_and_left_out(diabetes, call):
    arguments = ["--stages", "train,predict", "--quiet", "--data.holdout", "50", "--data.num_train", "100"]
    assert call(*arguments, "--data.num_test", "20", run=diabetes)[0] == 0
    assert netcdf.read_attrs(diabetes / "out" / "predictive.nc")["inputs"]["data"]["split"] == "validation"
    assert netcdf.read_attrs(diabetes / "out" / "predictive.nc")["inputs"]["data"]["count"] == 20


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--data.file", "nowhere.csv"], ["data.file", "nowhere.csv is not there"]),
        (["--data.target", "targit"], ["data.target 'targit' is no column of the file: did you mean 'target'"]),
        (["--model.likelihood", "normal"], ["is text ('class_0', ", "--model.likelihood categorical"]),
        (["--data.target", "alcohol"], ["has numbers such as", "use --model.likelihood normal"]),
        (["--data.test_fraction", "1.5"], ["data.test_fraction must lie in (0, 1), got 1.5"]),
        (["--data.image_size", "32"], ["data.image_size is for data.name folder; it cannot be used with"]),
        (["--data.missing", "zero"], ["data.missing"]),
        (["--data.options", "{sepp: x}"], ["data.options are not understood by pandas' reader of csv"]),
        (["--train.augment", "crop_flip"], ["train.augment is for images, and data.name csv is a table: leave it out"]),
        (["--model.name", "lenet"], ["lenet takes images of shape", "16 pixels, got [13]; mlp takes inputs"]),
        (["--data.name", "parquet"], ["cannot be read as parquet"]),
        (["--data.name", "npz"], ["cannot be read as npz"]),
        (["--data.name", "folder", "--data.target", "null"], ["wine.csv is not a folder"]),
        (["--data.name", "mnist"], ["data.file is for data.name csv, ", "it cannot be used with 'mnist'"]),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_in_one_line(wine, call, arguments, parts):
    if arguments[1] == "parquet":
        pytest.importorskip("pyarrow")
    assert_refused(call("--quiet", *arguments, run=wine), *parts)
    assert not list((wine / "out").glob("c*"))


def test_arrays_on_disk_are_trained_on_as_those_in_memory(tmp_path, call):
    rng = np.random.default_rng(1)
    x = rng.normal(4, 3, (300, 6))
    config = {"data": {"name": "npz", "file": "rows.npz"}, "model": {"name": "mlp", "likelihood": "normal"}, **SHORT}
    folder = written(tmp_path / "rows", config)
    np.savez(folder / "rows.npz", x=x, y=x @ rng.normal(size=6))
    arguments = ["--stages", "train", "--quiet", "--train.checkpoint_every", "1"]
    assert call(*arguments, "--out", tmp_path / "memory", run=folder)[0] == 0
    disk = ["--out", tmp_path / "disk", "--data.max_memory", "0.001"]
    assert call(*arguments, *disk, run=folder)[0] == 0
    logs = [pd.read_csv(tmp_path / name / "log.csv")[["loss", "nll", "kl"]] for name in ("memory", "disk")]
    np.testing.assert_allclose(logs[1], logs[0], rtol=1e-5)
    os.utime(folder / "rows.npz", (0, 0))
    code, lines = call(*arguments, *disk, run=folder)
    assert code == 0, lines
    assert lines[-1] == "train: complete already (2 epochs)"
    assert_refused(call("--data.max_memory", "1", *disk[:2], run=folder), "data.max_memory: saved 0.001, now 1.0")
    np.savez(folder / "rows.npz", x=x + 1, y=x.sum(1))
    code, lines = call(*disk, run=folder)
    assert code == 2
    assert "belongs to another run: trained on.fingerprint: saved '300 rows of [6] torch.float64" in lines[-1]


@pytest.mark.parametrize("kind", ["csv", "npz"])
def test_statistics_are_of_the_rows_trained_on_also_of_out_of_distribution_data(tmp_path, kind):
    values = np.random.default_rng(2).normal(3, 2, (50, 2)).astype(np.float32)
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        pd.DataFrame({"a": values[:, 0], "y": values[:, 1]}).to_csv(path, index=False)
    else:
        np.savez(path, x=values[:, :1], y=values[:, 1])
    data = DataConfig(name=kind, file=str(path), target="y", holdout=4, num_train=30)
    config = Config(data, ModelConfig(likelihood="normal"), train=TrainConfig(validation=10))
    found = load_data(config, progress=False)
    assert (len(found.train), len(found.validation)) == (20, 10)
    for part in (found.train.x, found.train.y):
        torch.testing.assert_close(part.mean(0), torch.zeros(part.shape[1:]), atol=1e-6, rtol=0)
    run = SimpleNamespace(config=config, out=tmp_path / "out", others={}, test_data=range(50))
    other = other_data(run, f"{kind}:{path}")
    assert (len(other), other.title) == (50, "rows")
    assert set(found.train.x[:, 0].tolist()) <= set(other.x[:, 0].tolist())


def test_a_validation_of_one_class_is_told(tmp_path, caplog):
    pd.DataFrame({"a": np.arange(50.0), "y": ["b", "c"] * 25}).to_csv(tmp_path / "rows.csv", index=False)
    config = Config(
        DataConfig(name="csv", file=str(tmp_path / "rows.csv"), target="y"), train=TrainConfig(validation=1)
    )
    load_data(config, progress=False)
    assert "the last 1 examples, which are held out, have 1 classes, and the training examples 2" in caplog.text


def test_named_data_lie_in_the_cache_unless_a_folder_is_named(tmp_path, data_dir, call, monkeypatch):
    monkeypatch.setenv("PPL_BNN_DATA", str(data_dir.absolute()))
    monkeypatch.chdir(tmp_path)
    config = {"data": {"num_train": 60, "num_test": 10}, "train": {"epochs": 1}}
    folder = written(tmp_path / "digits", config)
    assert call("--stages", "train", "--quiet", run=folder)[0] == 0
    assert yaml.safe_load((folder / "out" / "config.yaml").read_text())["data"]["dir"] is None
