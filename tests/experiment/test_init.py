"""`ppl_bnn init`: a run folder for a file of the user's own, and what it refuses."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ppl_bnn.experiment.config import Config
from ppl_bnn.experiment.config_check import check
from ppl_bnn.experiment.init import main
from ppl_bnn.experiment.recipes import recipes
from ppl_bnn.experiment.setup import network
from ppl_bnn.run import _parser
from ppl_bnn.run import main as run

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def table(path="my.csv", rows=60, **columns):
    """A CSV of two numbers, a text and what else is asked for."""
    a, b = RANDOM.normal(size=(2, rows))
    made = {"a": a.round(4), "b": b.round(4), "town": np.array(["x", "y"])[np.arange(rows) % 2], **columns}
    lines = [",".join(made), *(",".join(map(str, row)) for row in zip(*made.values(), strict=True))]
    Path(path).write_text("\n".join(lines) + "\n")
    return path


def images(folder, size=(20, 24), count=8, mode="L"):
    shape = size if mode == "L" else (*size, 3)
    for name in ("cats", "dogs"):
        (Path(folder) / name).mkdir(parents=True)
        for at in range(count):
            pixels = RANDOM.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder) / name / f"{at}.png")
    return folder


def written(folder="my-run"):
    return yaml.safe_load((Path(folder) / "config.yaml").read_text())


def init(capsys, *arguments):
    capsys.readouterr()
    code = main([*map(str, arguments)])
    return code, capsys.readouterr().err.strip().splitlines()


def classes_of(count, rows=60):
    return RANDOM.permutation(np.arange(rows) % count)


@pytest.mark.parametrize(
    ("target", "likelihood"),
    [
        (np.array(["yes", "no"])[classes_of(2)], "categorical"),
        (classes_of(3), "categorical"),
        (RANDOM.normal(size=60).round(3), "normal"),
        (RANDOM.permutation(60), "normal"),
    ],
    ids=["text", "few integers", "numbers", "many integers"],
)
def test_the_likelihood_follows_the_kind_of_target(capsys, target, likelihood):
    table(price=target)
    code, lines = init(capsys, "my-run", "--data", "my.csv", "--target", "price")
    assert code == 0
    assert lines == ["init: my-run/config.yaml is written: every setting has a comment", "next: ppl_bnn run my-run"]
    found = written()
    assert found["data"]["target"] == "price"
    assert found["model"]["likelihood"] == likelihood
    assert found["model"]["name"] == "mlp"
    # Two numbers and two towns come in, then 50 units: 1 / sqrt(fan_in), and twice that for logits.
    scales = ("1", "0.28", "0.28") if likelihood == "categorical" else ("0.5", "0.14", "0.14")
    assert found["model"]["prior"] == {f"fc{at + 1}*": f"normal(0, {scale})" for at, scale in enumerate(scales)}


def test_what_init_writes_runs_and_says_what_each_line_is(capsys):
    table(price=RANDOM.normal(size=60).round(3))
    assert init(capsys, "my-run", "--data", "my.csv", "--target", "price")[0] == 0
    lines = Path("my-run/config.yaml").read_text().splitlines()
    settings = [line for line in lines if line.startswith("  ") and not line.startswith("    ")]
    assert len(settings) > 15
    assert [line for line in settings if " # " not in line] == []
    # As the command reads it.
    parser = _parser()
    parser.default_config_files = ["my-run/config.yaml"]
    made = parser.instantiate(parser.parse_args(["my-run"]))
    check(Config(**{name: made[name] for name in Config.__dataclass_fields__}))
    arguments = ["my-run", "--stages", "train,predict", "--train.epochs", "2", "--predict.num_samples", "2"]
    assert run(arguments) == 0
    assert Path("my-run/out/predictive.nc").exists()


def test_a_likelihood_that_is_asked_for_and_columns_that_are_named(capsys):
    table(visits=RANDOM.permutation(60))
    asked = ("my-run", "--data", "my.csv", "--target", "visits", "--likelihood", "poisson", "--features", "a", "town")
    assert init(capsys, *asked)[0] == 0
    found = written()
    assert found["model"]["likelihood"] == "poisson"
    assert found["data"]["features"] == ["a", "town"]
    assert found["model"]["prior"]["fc1*"] == "normal(0, 0.58)"


def test_a_likelihood_of_ones_own_in_the_working_directory(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_likelihood.py").write_text("from ppl_bnn import Poisson\nmake = Poisson\n")
    table(visits=RANDOM.permutation(60))
    code, lines = init(capsys, "my-run", "--data", "my.csv", "--target", "visits", "--likelihood", "my_likelihood:make")
    assert (code, lines[0]) == (0, "this run executes code of its own: model.likelihood my_likelihood:make")
    assert written()["model"]["likelihood"] == "my_likelihood:make"


def test_missing_values_and_categories_of_test_rows_alone_are_provided_for(capsys):
    towns = np.array(["x", "y"])[classes_of(2)].astype(object)
    # The test rows are the first fifth of a fixed permutation.
    towns[np.random.default_rng(0).permutation(60)[0]] = "z"
    a = RANDOM.normal(size=60).round(3).astype(object)
    a[3] = ""
    table(a=a, town=towns, price=RANDOM.normal(size=60).round(3))
    code, lines = init(capsys, "my-run", "--data", "my.csv", "--target", "price")
    assert code == 0
    assert lines[:2] == [
        "init: data.missing is median, which these data need",
        "init: data.unknown_categories is ignore, which these data need",
    ]
    assert {"missing": "median", "unknown_categories": "ignore"}.items() <= written()["data"].items()


@pytest.mark.parametrize(
    ("size", "mode", "shape", "image_size"),
    [((20, 24), "L", (1, 20, 24), None), ((120, 130), "RGB", (3, 64, 64), 64)],
    ids=["as they are", "scaled down"],
)
def test_a_folder_of_images(capsys, size, mode, shape, image_size):
    images("pets", size=size, mode=mode)
    assert init(capsys, "my-run", "--data", "pets")[0] == 0
    found = written()
    assert found["data"].get("image_size") == image_size
    assert found["model"]["name"] == "lenet"
    config = Config()
    config.model.name = "lenet"
    assert network(config, shape, 2)[0].in_channels == shape[0]
    assert run(["my-run", "--stages", "train,predict", "--train.epochs", "1", "--predict.num_samples", "2"]) == 0


@pytest.mark.parametrize("kind", ["float32", "int64"])
def test_arrays_of_vectors(capsys, kind):
    np.savez("arrays.npz", x=(9 * RANDOM.normal(size=(50, 7))).astype(kind), y=classes_of(2, 50))
    assert init(capsys, "my-run", "--data", "arrays.npz")[0] == 0
    assert {"name": "mlp", "likelihood": "categorical"}.items() <= written()["model"].items()
    assert run(["my-run", "--stages", "train", "--train.epochs", "1"]) == 0


@pytest.mark.parametrize(("num", "steps"), [(60, 4000), (5000, 4000), (60_000, 4000)])
def test_the_number_of_updates_hardly_depends_on_the_number_of_rows(capsys, num, steps):
    np.savez("arrays.npz", x=RANDOM.normal(size=(num, 3)).astype("float32"), y=RANDOM.normal(size=num))
    assert init(capsys, "my-run", "--data", "arrays.npz")[0] == 0
    train = written()["train"]
    updates = train["epochs"] * -(-round(0.8 * num) // train["batch_size"])
    assert 0.3 * steps <= updates <= 1.1 * steps


def test_a_recipe_is_copied_as_it_is(capsys):
    assert init(capsys, "mine", "--recipe", "mnist-fc")[0] == 0
    assert Path("mine/config.yaml").read_text() == recipes()["mnist-fc"].read_text()


def test_nothing_is_overwritten(capsys):
    table(price=RANDOM.normal(size=60))
    Path("my-run").mkdir()
    Path("my-run/config.yaml").write_text("device: cpu\n")
    code, lines = init(capsys, "my-run", "--data", "my.csv", "--target", "price")
    assert (code, lines) == (
        2,
        ["error: my-run/config.yaml exists already: choose another folder, or delete that file"],
    )
    assert Path("my-run/config.yaml").read_text() == "device: cpu\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "init takes a file or folder with --data, or a recipe's name with --recipe: give one of them"),
        (["--data", "my.csv", "--recipe", "mnist-fc"], "give one of them"),
        (["--data", "none.csv"], "--data none.csv is not there: give a file or a folder of images"),
        (["--data", "notes.md"], "--data notes.md is of no known kind: give a folder of images, or one of .csv"),
        (["--data", "my.csv"], "--target must name the column to predict: one of 'a', 'b', 'town', 'price'"),
        (["--data", "my.csv", "--target", "prize"], "--target 'prize' is no column of the file: did you mean 'price'?"),
        (["--data", "my.csv", "--target", "price", "--features", "c"], "--features 'c' is no column of the file"),
        (["--data", "my.csv", "--target", "price", "--likelihood", "categorical"], "use --likelihood normal"),
        (["--data", "my.csv", "--target", "price", "--likelihood", "norml"], "likelihood 'norml' is not understood"),
        (["--recipe", "mnist-cf"], "got 'mnist-cf' (did you mean mnist-fc?)"),
        (["--recipe", "mnist-fc", "--target", "price"], "--target is for --data; a recipe has its own"),
        (["--data", "empty.csv", "--target", "price"], "empty.csv"),
        (["--data", "empty"], "empty"),
    ],
)
def test_what_init_refuses_in_one_line(capsys, arguments, message):
    table(price=RANDOM.normal(size=60).round(3))
    Path("notes.md").write_text("notes\n")
    Path("empty.csv").write_text("")
    Path("empty").mkdir()
    code, lines = init(capsys, "my-run", *arguments)
    assert code == 2
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not Path("my-run").exists()


def test_inputs_that_need_a_network_of_ones_own(capsys):
    np.savez("arrays.npz", left=RANDOM.normal(size=(30, 3)), right=RANDOM.normal(size=(30, 2, 2)), y=classes_of(2, 30))
    code, lines = init(capsys, "my-run", "--data", "arrays.npz")
    assert code == 2
    assert "write a network of your own, and a config.yaml with model.name nets:Net" in lines[0]
