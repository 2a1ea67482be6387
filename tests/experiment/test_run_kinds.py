"""Runs on every kind of data go through every stage: tables, sequences, tokens, several inputs, files."""

import base64
import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import assert_refused
from run_folders import written

from ppl_bnn.experiment.setup import opened
from ppl_bnn.results import netcdf

CLASSES = {"accuracy", "nll", "ece", "brier"}
NUMBERS = {"nll", "rmse", "crps", "coverage_90", "width_90", "quantile_error"}
OF_ROWS = {"feature_noise", "missing", "covariate"}
OF_CLASSES = {"training.png", "snr.png", "reliability.png", "risk_coverage.png", "convergence.png"}
EVERY = {"posterior.png", "pruning.png", "shift.png", "ood.png"}
TABLE = {"least_certain.html", "least_certain.csv"}
KINDS = {
    "classes_in_rows": ("mlp", "categorical", "rows", CLASSES, OF_ROWS, OF_CLASSES | TABLE),
    "numbers_in_rows": (
        "mlp", "normal(predicted)", "rows", NUMBERS, OF_ROWS,
        TABLE | {"training.png", "snr.png", "bands.png", "predicted_observed.png", "pit.png"},
    ),
    "waves": (
        "kinds_of_data:recurrent", "categorical", "sequences", CLASSES, {"feature_noise", "dropped", "truncated"},
        OF_CLASSES | TABLE | {"least_certain.png"},
    ),
    "sentences": (
        "kinds_of_data:bag_of_words", "categorical", "sequences", CLASSES, {"dropped", "truncated", "replaced"},
        OF_CLASSES | TABLE,
    ),
    "pairs": (
        "kinds_of_data:of_two_inputs", "normal(learnt)", "examples", NUMBERS,
        {"feature_noise", "dropped", "truncated", "missing"}, TABLE | {"training.png", "predicted_observed.png"},
    ),
    "pictures": (
        "mlp", "categorical", "images", CLASSES, {"rotation", "noise", "blur"}, OF_CLASSES | {"gallery.html"},
    ),
}  # fmt: skip
# On every Python.
ANYWHERE = ("numbers_in_rows", "waves")


def folder_of(tmp_path, kind, **shift):
    """A run of seconds on data of a kind."""
    model, likelihood, *_ = KINDS[kind]
    return written(tmp_path / kind, {
        "data": {"name": f"kinds_of_data:{kind}"},
        "model": {"name": model, "prior": "normal(0, 0.5)", "likelihood": likelihood},
        "train": {"epochs": 30, "batch_size": 32, "optimizer": "adam", "lr": 0.02, "kl_weight": 0.1},
        "predict": {"num_samples": 20, "train_log_likelihood": True},
        "shift": {"num_samples": 8, **shift},
        "pruning": {"num_samples": 8, "threshold": 0.5, "fractions": [0.0, 0.5]},
    })  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.any_python] * (kind in ANYWHERE)) for kind in KINDS]
)
def test_every_kind_of_data_goes_through_every_stage(call, tmp_path, kind):
    _, _, word, scores, shifts, figures = KINDS[kind]
    folder, out = folder_of(tmp_path, kind), tmp_path / kind / "out"
    code, lines = call("--stages", "summary,train,diagnose,predict,shift,prune,report", run=folder)
    assert code == 0, lines[-1]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["data"] == {"title": metrics["data"]["title"], "train": 160, "test": 60}
    assert scores <= metrics["test"].keys()
    assert all(scores - {"brier"} <= row.keys() for row in metrics["pruning"])
    assert len(metrics["pruning"]) == 3
    assert {row["kind"] for row in metrics["shift"]} == {"none", *shifts}
    assert all(scores | {"total", "aleatoric", "epistemic"} <= row.keys() for row in metrics["shift"])
    assert [row["score"] for row in metrics["ood"]] == ["total", "aleatoric", "epistemic"]
    assert {path.name for path in (out / "figures").iterdir()} >= figures | EVERY
    assert any(f"of 60 {word} in" in line for line in lines)
    # What is learnt is learnt: the scores are those of a network that answers.
    if "accuracy" in scores:
        assert metrics["test"]["accuracy"] > 0.9
        worst = max(metrics["shift"], key=lambda row: row["nll"])
        assert worst["nll"] > metrics["shift"][0]["nll"]
        assert metrics["convergence"]
    else:
        assert metrics["test"]["rmse"] < 0.5
    assert netcdf.read_group(out / "train_log_likelihood.nc", "log_likelihood")["y"].sizes["obs_id"] == 160

    before = {path: path.stat().st_mtime_ns for path in out.glob("*.nc")}
    code, lines = call("--stages", "train,diagnose,predict,shift,prune,report", run=folder)
    assert code == 0
    assert sum("up to date" in line or "complete already" in line for line in lines) == 7
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.nc")}
    assert opened(out).examples == word


def test_the_least_certain_rows_are_listed_with_their_columns(call, tmp_path):
    folder = folder_of(tmp_path, "classes_in_rows")
    assert call("--stages", "train,predict,report", run=folder)[0] == 0
    figures = folder / "out" / "figures"
    rows = list(csv.DictReader((figures / "least_certain.csv").read_text().splitlines()))
    assert list(rows[0]) == [
        "#", "width", "height", "colour", "observed", "predicted", "probability", "total", "aleatoric", "epistemic"
    ]  # fmt: skip
    total = [float(row["total"]) for row in rows]
    assert total == sorted(total, reverse=True)
    assert {row["colour"] for row in rows} == {"blue", "green", "red"}
    data = opened(folder / "out").test_data
    for row in rows:
        at = int(row["#"])
        assert float(row["width"]) == pytest.approx(data.x[at, 0].item(), rel=1e-6)
        assert row["observed"] == data.classes[data.y[at]]
    page = (figures / "least_certain.html").read_text()
    assert page.count("<tr") == 61
    wrong = sum(row["observed"] != row["predicted"] for row in rows)
    assert page.count("<tr class=wrong>") == wrong
    constant = netcdf.read_group(folder / "out" / "predictive.nc", "constant_data")["x"]
    assert [str(name) for name in constant["x_dim_0"].values] == list(data.features)


def test_the_gallery_shows_images_that_are_not_in_memory(call, tmp_path):
    folder = folder_of(tmp_path, "pictures")
    off = ("--predict.train_log_likelihood", "false")
    assert call("--stages", "train,predict,report", *off, run=folder)[0] == 0
    page, data = (folder / "out" / "figures" / "gallery.html").read_text(), opened(folder / "out").test_data
    cards = re.findall(r'data-label="(\w+)".*?data-image="(\d+)".*?base64,([^"]+)"', page)
    assert len(cards) == page.count("<article") == 60
    for label, number, encoded in cards:
        # Grey images are shown dark on white.
        shown = 255 - np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
        expected, _ = data.examples().take(torch.tensor([int(number)]))
        assert np.array_equal(shown, expected[0, 0].numpy())
        assert label == data.classes[data.targets[int(number)]]


def test_the_covariate_shift_takes_the_column_that_decides_the_target_or_a_named_one(call, tmp_path):
    folder = folder_of(tmp_path, "numbers_in_rows", covariate=[1.0], missing=[], feature_noise=[], ood=[])
    assert call("--stages", "train,shift", run=folder)[0] == 0
    path = folder / "out" / "shift.nc"
    assert netcdf.read_attrs(path)["column"] == "width"
    code, lines = call("--stages", "shift", "--shift.column", "height", run=folder)
    assert code == 0
    assert any("shift: recomputing shift.nc (settings.column: saved None, now 'height')" in line for line in lines)
    assert netcdf.read_attrs(path)["column"] == "height"


def fog(x, severity):
    """A shift of one's own."""
    return x + severity


def test_a_shift_of_ones_own_and_other_data_by_import_path(call, tmp_path):
    folder = folder_of(
        tmp_path, "classes_in_rows", own={f"{__name__}:fog": [1.0, 2.0]}, ood=["kinds_of_data:numbers_in_rows", "noise"]
    )  # fmt: skip
    assert call("--stages", "train,predict,shift,report", run=folder)[0] == 0
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert [row["severity"] for row in metrics["shift"] if row["kind"] == f"{__name__}:fog"] == [1.0, 2.0]
    assert {row["set"] for row in metrics["ood"]} == {"Parcels", "Parcels with noise of 2"}
    # The same rows: nothing tells them from the test set.
    assert all(row["auroc"] == 0.5 for row in metrics["ood"] if row["set"] == "Parcels")


def test_a_temperature_is_fitted_to_classes_in_a_table(call, tmp_path):
    folder = folder_of(tmp_path, "classes_in_rows", temperature_on=20)
    assert call("--stages", "train,predict,shift,report", run=folder)[0] == 0
    temperature = json.loads((folder / "out" / "metrics.json").read_text())["temperature"]
    assert temperature["measured"] == 40
    assert 0.01 < temperature["temperature"] < 100


@pytest.mark.parametrize(
    ("kind", "arguments", "parts"),
    [
        ("classes_in_rows", ["--shift.rotation", "[10]"], ["shift.rotation does not fit the rows of data.name"]),
        ("waves", ["--shift.missing", "[0.3]"], ["shift.missing does not fit the sequences of data.name"]),
        ("classes_in_rows", ["--shift.column", "depth"], ["shift.column must be a column of numbers, one of width"]),
        ("waves", ["--shift.column", "depth"], ["shift.column is for tables", "has sequences"]),
        ("numbers_in_rows", ["--shift.temperature_on", "5"], ["shift.temperature_on is for classes"]),
        ("sentences", ["--shift.ood", "[noise]"], ["shift.ood has noise, but no input of the network is a number"]),
        ("waves", ["--shift.ood", "[noise]", "--shift.feature_noise", "[]"], ["shift.feature_noise has no severity"]),
        ("pictures", ["--shift.ood", "[shuffled]"], ["shift.ood shuffled does not fit images"]),
        ("waves", ["--shift.own", "{fog: [1.0]}"], ["shift.own must map import paths", "got 'fog'"]),
        ("waves", ["--shift.own", "{no_such_module:fog: [1.0]}"], ["shift.own must be importable", "no_such_module"]),
        ("waves", ["--shift.own", "{math:sqrt: []}"], ["shift.own must give math:sqrt one finite severity or more"]),
        ("classes_in_rows", ["--shift.ood", "[mnist]"], ["shift.ood mnist has inputs [1, 28, 28], and"]),
        ("classes_in_rows", ["--shift.ood", "[csv:gone.csv]"], ["shift.ood csv:/", "gone.csv cannot be used: "]),
        ("classes_in_rows", ["--shift.ood", "[kinds_of_data:waves]"], ["shift.ood kinds_of_data:waves has inputs"]),
        ("pictures", ["--shift.ood", "[kinds_of_data:waves]"], ["waves has inputs float [*, *], and the network"]),
        (
            "classes_in_rows",
            ["--shift.ood", "[kinds_of_data:numbers_in_rows,kinds_of_data:numbers_in_rows]"],
            ["shift.ood kinds_of_data:numbers_in_rows and kinds_of_data:numbers_in_rows are both called 'Parcels'"],
        ),
        ("classes_in_rows", ["--shift.missing", "[1.5]"], ["shift.missing must be a fraction in (0, 1], got 1.5"]),
    ],
)  # fmt: skip
def test_settings_of_another_kind_of_data_take_one_line(call, tmp_path, data_dir, kind, arguments, parts):
    folder = folder_of(tmp_path, kind)
    trained = ["--train.epochs", "1", "--data.dir", data_dir]
    assert_refused(call("--stages", "train,shift", *trained, *arguments, run=folder), *parts)
    # Before any work.
    assert not (folder / "out" / "checkpoints").exists()


def parcels(path, widths):
    """A CSV of parcels whose size follows their width in metres."""
    lines = ["width,colour,size"]
    lines += [f"{width:.3f},{'red' if at % 2 else 'blue'},{2 * width + at % 2:.3f}" for at, width in enumerate(widths)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_table_in_a_file_is_listed_in_its_own_units_and_another_file_is_read_as_it_was(call, tmp_path):
    pytest.importorskip("pandas")
    near = parcels(tmp_path / "near.csv", [2 + (at % 37) / 10 for at in range(150)])
    folder, out, far = tmp_path / "run", tmp_path / "elsewhere" / "out", tmp_path / "run" / "far.csv"
    written(folder, {
        "data": {"name": "csv", "file": str(near), "target": "size"},
        "model": {"name": "mlp", "prior": "normal(0, 0.5)", "likelihood": "normal(learnt)"},
        "train": {"epochs": 20, "batch_size": 32, "optimizer": "adam", "lr": 0.02, "kl_weight": 0.1},
        "predict": {"num_samples": 10},
        "shift": {"num_samples": 10, "ood": ["csv:far.csv"], "feature_noise": [1.0], "missing": [], "covariate": []},
    })  # fmt: skip
    # Neither the target nor a known category.
    far.write_text("width,colour\n" + "".join(f"{50 + at},green\n" for at in range(20)))
    code, lines = call("--stages", "train,predict,shift,report", "--out", out, run=folder)
    assert code == 0, lines[-1]
    far.write_text("width,colour\n" + "".join(f"{51 + at},green\n" for at in range(20)))
    code, lines = call("--stages", "shift,report", run=out)
    assert (code, any("recomputing shift.nc (shift.ood.csv:far.csv" in line for line in lines)) == (0, True)
    # Where it lies does not count.
    far = far.rename(tmp_path / "far.csv")
    code, lines = call("--stages", "shift", "--data.dir", tmp_path, run=out)
    assert (code, lines[-1]) == (0, "shift: shift.nc is up to date")
    run = opened(out)
    rows = list(csv.DictReader((out / "figures" / "least_certain.csv").read_text().splitlines()))
    table = [line.split(",") for line in near.read_text().splitlines()[1:]]
    assert len(rows) == len(run.test_data) == 30
    for row in rows:
        assert [f"{float(row['width']):.3f}", row["colour"], f"{float(row['observed']):.3f}"] in table
    metrics = json.loads((out / "metrics.json").read_text())
    assert {row["set"] for row in metrics["ood"]} == {"far"}
    assert min(row["auroc"] for row in metrics["ood"] if row["score"] == "epistemic") == 1
    # By the mean and the standard deviation of the training rows, and of no other.
    from ppl_bnn.experiment.shift_kinds import other_data

    found, (mean, std) = other_data(run, f"csv:{far}"), run.train_data.feature_scale["width"]
    assert found.x[3].tolist() == pytest.approx([(54 - mean) / std, 0, 0], rel=1e-5)
    original = sorted(float(width) for width, _, _ in table)
    assert min(original) < mean < max(original)
