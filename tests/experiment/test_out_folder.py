"""An out folder alone is a run: its own settings, and results into that same folder."""

import json
import shutil

import pytest
import yaml
from refusals import assert_refused

from ppl_bnn.experiment.jobs import main as jobs
from ppl_bnn.experiment.out_folder import run_name
from ppl_bnn.results import netcdf


@pytest.fixture
def out(call, tmp_path):
    """What a training with an override left in a folder given by --out."""
    assert call("--stages", "train", "--train.epochs", 1, "--out", tmp_path / "colder")[0] == 0
    return tmp_path / "colder"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.usefixtures("drawings")
def test_an_out_folder_is_predicted_pruned_and_reported_without_its_overrides(call, out):
    trained = contents(out / "checkpoints")
    code, lines = call("--pruning.fractions", "[0.5]", run=out)
    assert code == 0
    assert "train: complete already (1 epochs)" in lines[0]
    assert contents(out / "checkpoints") == trained
    assert not (out / "out").exists()
    assert {path.name for path in out.iterdir()} >= {"predictive.nc", "pruning.nc", "metrics.json", "figures"}
    assert json.loads((out / "metrics.json").read_text())["run"] == "tiny"
    # What was overridden is one of its settings now.
    code, lines = call(run=out)
    assert code == 0
    assert sum("up to date" in line for line in lines) == 4
    assert call("--stages", "prune", "--out", out, run=out)[0] == 0


def test_a_folder_that_was_moved_keeps_the_runs_name_and_finds_data_that_moved(call, out, run_folder, tmp_path):
    shutil.rmtree(run_folder)
    moved = out.rename(tmp_path / "elsewhere")
    (tmp_path / "digits").symlink_to(yaml.safe_load((moved / "config.yaml").read_text())["data"]["dir"])
    content = yaml.safe_load((moved / "config.yaml").read_text())
    content["data"]["dir"] = str(tmp_path / "gone" / "data")
    (moved / "config.yaml").write_text(yaml.safe_dump(content))
    assert call("--stages", "predict", "--data.dir", tmp_path / "digits", run=moved)[0] == 0
    assert netcdf.read_attrs(moved / "predictive.nc")["run"] == "tiny"


def test_a_training_that_was_cut_off_resumes_there(call, out):
    last = sorted((out / "checkpoints").iterdir())[-1]
    last.unlink()
    assert "resuming from step-00000000" in call("--stages", "train", run=out)[1][0]
    assert last.exists()


def test_other_settings_of_the_training_are_refused(call, out):
    before = contents(out)
    assert_refused(call("--train.lr", 0.1, run=out), "train.lr: saved 0.001, now 0.1", "--out")
    assert contents(out) == before


def test_settings_of_another_version_are_one_line_and_nothing_is_lost(call, out):
    path = out / "config.yaml"
    content = yaml.safe_load(path.read_text())
    del content["pruning"]["keep_images"], content["train"]["compare_every"], content["channels_last"]
    path.write_text(yaml.safe_dump(content))
    assert call("--stages", "predict", run=out)[0] == 0
    content["train"]["epoch"] = 3
    path.write_text(yaml.safe_dump(content))
    before = contents(out)
    assert_refused(call("--stages", "predict", run=out), "another version of ppl_bnn", "did you mean train.epochs?")
    path.write_text("train: [")
    assert_refused(call("--stages", "predict", run=out), "config.yaml is not valid YAML")
    path.unlink()
    assert_refused(call("--stages", "predict", run=out), "there is no", "config.yaml")
    assert {path: content for path, content in before.items() if path.name != "config.yaml"} == contents(out)


def test_a_run_folder_is_told_from_an_out_folder(call, run_folder, tmp_path):
    assert run_name(run_folder) == "tiny"
    assert call("--stages", "train", "--train.epochs", 1)[0] == 0
    assert call("--stages", "predict", "--predict.num_samples", 3, run=run_folder / "out")[0] == 0
    assert (run_folder / "out" / "predictive.nc").exists()
    assert run_name(run_folder / "out") == "tiny"
    # Settings written by hand stay what they are, whatever lies beside them.
    (run_folder / "manifest.json").write_text("{}")
    before = (run_folder / "config.yaml").read_bytes()
    assert call("--stages", "train", "--train.epochs", 1)[0] == 0
    assert (run_folder / "config.yaml").read_bytes() == before
    # A name that no checkpoint remembers, or a damaged one.
    for path in (run_folder / "out" / "checkpoints").iterdir():
        path.write_bytes(b"")
    assert run_name(run_folder / "out") == "tiny"
    assert run_name((run_folder / "out").rename(tmp_path / "kept")) == "kept"


def test_jobs_of_an_out_folder_share_its_training(out):
    arguments = ["--vary", "pruning.checkpoint=0,last", "--stages", "prune", "--pruning.fractions", "[0.5]"]
    assert jobs([str(out), *arguments]) == 0
    found = {path.relative_to(out / "jobs"): netcdf.read_attrs(path)["step"] for path in out.glob("jobs/*/*.nc")}
    assert {str(path): step for path, step in found.items()} == {
        "pruning.checkpoint=0/pruning-step-00000000.nc": 0,
        "pruning.checkpoint=last/pruning.nc": 6,
    }
