"""Every way the command line can be given something wrong: one line, and what was there stays."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from jpeg_files import jpegs
from refusals import assert_refused

from ppl_bnn.export import main as export
from ppl_bnn.files import alone_in
from ppl_bnn.inference import checkpoint
from ppl_bnn.results import netcdf


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--train.epoch", "3"], ["--train.epoch", "did you mean train.epochs?"]),
        (["--train.lr", "fast"], ['"train.lr"', "fast"]),
        (["--train.precision", "float16"], ['"train.precision"', "'float32', 'bfloat16'", "float16"]),
        (["--model.name", "my_package.nets:build"], ["model.name must be importable, got 'my_package.nets:build'"]),
        (["--train.optimizer", "math:pi"], ["train.optimizer must name something callable, got 'math:pi', a float"]),
        (["--train.epochs", "0"], ["train.epochs must be at least 1, got 0"]),
        (["--predict.num_samples", "0"], ["predict.num_samples must be at least 1, got 0"]),
        (["--pruning.threshold", "-1"], ["pruning.threshold must be at least 0"]),
        (["--pruning.threshold", '{"fc1*":.nan}'], ["pruning.threshold must be at least 0 and finite; got nan"]),
        (["--pruning.criterion", "magnitude"], ["pruning.criterion must be one of snr, kl, evidence"]),
        (["--pruning.structure", "rows"], ["pruning.structure must be one of weights, units, inputs; got 'rows'"]),
        (["--pruning.finetune_lr", "0"], ["pruning.finetune_lr must be positive"]),
        (["--pruning.fractions", "[0.5,1.0]"], ["pruning.fractions must lie in [0, 1), got 1.0"]),
        (["--pruning.fractions", "[]", "--pruning.threshold", "[]"], ["at least one threshold or fraction"]),
        (["--guide.init_loc", ".inf"], ["guide.init_loc must be 'he' or a standard deviation of at least 0, got inf"]),
        (["--train.seed", str(2**64)], ["train.seed must be at least 0 and below 2^63"]),
        (["--model.prior", "normal(0)"], ["normal(loc, scale)"]),
        (["--model.prior", '{"conv*": "normal(0, 1)"}'], ["the prior's pattern 'conv*' matches no parameter"]),
        (
            ["--model.name", "alexnet"],
            ["model.name must be one of bnn-fc, bnn-conv, lenet, vgg16, resnet18, mlp; got 'alexnet'"],
        ),
        (["--data.name", "svhn"], ["data.name must be one of mnist"]),
        (
            ["--train.estimator", "magic"],
            ["train.estimator must be one of plain, flipout, flipout-bfloat16, groups, local"],
        ),
        (["--train.kl_weight", "0"], ["train.kl_weight must be positive"]),
        (["--guide.init_loc", "xavier"], ["guide.init_loc must be 'he' or a standard deviation", "got 'xavier'"]),
        (["--guide.init_loc", "-1"], ["guide.init_loc must be 'he' or a standard deviation of at least 0, got -1"]),
        (["--train.kl_ramp", "0"], ["train.kl_ramp must be a fraction in (0, 1], got 0"]),
        (
            ["--shift.blur", "[1,10]", "--stages", "train,shift"],
            ["shift.blur must be at most 9 for images of 28 pixels"],
        ),
        (
            ["--shift.temperature_on", "200", "--stages", "train,shift"],
            ["shift.temperature_on must leave test images to measure on: below 200, got 200"],
        ),
        (["--pruning.threshold", '{"fc1*": 1.0}'], ["pruning.threshold has none for 'fc2.weight'", "add '*'"]),
        (["--pruning.threshold", '{"fc9*": 1.0, "*": 2.0}'], ["pruning.threshold has 'fc9*', which is none of"]),
        (["--stages", "predict", "--predict.checkpoint", ""], ["there is no checkpoint ''"]),
        (
            ["--stages", "train,dance"],
            ["unknown stage 'dance'", "summary, train, diagnose, predict, shift, prune, report"],
        ),
        (["--device", "tpu9"], ["device 'tpu9' cannot be used: Invalid device string: 'tpu9'; choose another"]),
        (
            ["--device", "gpu"],
            ["device 'gpu' cannot be used: Expected one of cpu, cuda", "string: gpu; choose another"],
        ),
        (["--device", "hpu"], ["device 'hpu' cannot be used: No module named 'torch.hpu'; choose another"]),
        (["--device", "meta"], ["device 'meta' cannot be used: ", "meta tensors; choose another"]),
        (["--stages", "predict"], ["no checkpoint", "run the train stage first"]),
        (["--stages", "report"], ["no checkpoint", "run the train stage first"]),
    ],
)
def test_bad_settings_are_one_line(call, arguments, parts):
    assert_refused(call(*arguments), *parts)


def test_nothing_is_written_before_the_check(call, run_folder):
    assert_refused(call("--pruning.threshold", '{"fc9*": 1.0}'), "pruning.threshold")
    assert not (run_folder / "out" / "checkpoints").exists()


def test_the_run_folder_is_no_out_folder(call, run_folder):
    before = (run_folder / "config.yaml").read_text()
    assert_refused(call("--out", run_folder / "." / "out" / ".."), "is the run folder itself")
    assert (run_folder / "config.yaml").read_text() == before


def test_one_command_at_a_time_works_in_a_folder(call, run_folder):
    out = run_folder / "out"
    out.mkdir()
    with alone_in(out):
        assert_refused(call("--stages", "train", "--train.seed", "3"), f"another command is at work in {out}")
    assert {path.name for path in out.iterdir()} == {".lock"}
    assert call("--stages", "train", "--train.epochs", "1")[0] == 0


def test_settings_where_a_number_belongs_and_the_other_way_round(call, run_folder, tmp_path):
    (tmp_path / "more.yaml").write_text("train: 3")
    assert_refused(
        call("--config", tmp_path / "more.yaml"), "more.yaml: train must hold settings, such as train.epochs"
    )
    assert call("--config", "{train: {epochs: 1}}", "--stages", "train")[0] == 0
    assert yaml.safe_load((run_folder / "out" / "config.yaml").read_text())["train"]["epochs"] == 1
    (run_folder / "config.yaml").write_text("model: {prior: {1: 'normal(0, 1)'}}")
    assert_refused(call(), "a prior maps patterns of site names to texts such as normal(0, 1), got (1, 'normal(0, 1)')")
    (run_folder / "config.yaml").write_text("predict: [1]")
    assert_refused(
        call("--predict.num_samples", "3"), "predict must hold settings, such as predict.num_samples; got [1]"
    )


def test_weights_of_another_network_do_not_start_one(call, tmp_path):
    assert call("--model.deterministic", "true", "--stages", "train", "--out", tmp_path / "twin")[0] == 0
    arguments = ("--guide.init_from", tmp_path / "twin", "--model.name", "lenet", "--out", tmp_path / "b")
    assert_refused(call(*arguments), "guide.init_from", "from another network: 'net.fc1.bias': saved [256], now [500]")
    (tmp_path / "notes").write_text("x")
    arguments = ("--guide.init_from", tmp_path / "notes", "--out", tmp_path / "c")
    code, lines = call(*arguments)
    assert code == 2
    assert "guide.init_from takes a run's out folder, or one of its checkpoints" in lines[-1]
    assert "delete" not in lines[-1]


def test_files_that_look_like_checkpoints_are_left_alone(call, run_folder):
    assert call("--stages", "train")[0] == 0
    folder = run_folder / "out" / "checkpoints"
    (folder / "step-best.safetensors").write_bytes((folder / "step-00000000.safetensors").read_bytes())
    code, lines = call("--stages", "train,predict")
    assert code == 0
    assert "train: complete already" in lines[0]
    assert netcdf.read_attrs(run_folder / "out" / "predictive.nc")["step"] == 12


@pytest.mark.usefixtures("drawings")
def test_a_posterior_table_of_another_step_is_not_reported(call, run_folder):
    assert call("--stages", "train,predict")[0] == 0
    assert call("--stages", "posterior", "--predict.checkpoint", "step-00000000")[0] == 0
    assert_refused(call("--stages", "report"), "posterior.json is out of date: it is of step 0", "stage diagnose again")
    assert call("--stages", "diagnose,report")[0] == 0
    (run_folder / "out" / "posterior.json").write_text("")
    assert_refused(call("--stages", "report"), "posterior.json is damaged")


def test_prune_before_predict_is_reported(call, run_folder):
    assert call("--stages", "train,prune,predict,report")[0] == 0


def test_damaged_settings_of_a_run_are_named(call, run_folder, capsys):
    assert call("--stages", "train")[0] == 0
    path = run_folder / "out" / "config.yaml"
    good = path.read_text()
    for damage in ("data: 3", "unknown: {a: 1}", "train: {unknown: 1}", "predict: {num_samples: many}"):
        path.write_text(f"{good}\n{damage}\n")
        assert export([str(path.parent)]) == 2
        assert "config.yaml is damaged, or of another version" in capsys.readouterr().err
    path.write_text("data:")
    assert_refused(call("--stages", "train"), "holds a run with other settings")


def _with_origin(state, origin):
    return replace(state, meta={**state.meta, "origin": origin})


def test_data_of_a_file_are_known_by_their_content(call, run_folder, tmp_path, monkeypatch):
    # Each class is trained on.
    arrays, _ = jpegs(14)
    np.savez(tmp_path / "c.npz", **arrays)
    how = ("--data.name", "cifar10", "--model.name", "vgg16", "--model.deterministic", "true", "--stages")
    how += ("train,predict", "--train.epochs", "1", "--data.file")
    assert call(*how, tmp_path / "c.npz")[0] == 0
    (tmp_path / "c.npz").rename(tmp_path / "d.npz")
    code, lines = call(*how, tmp_path / "d.npz")
    assert code == 0
    assert "train: complete already" in lines[0]
    # As it was before the checksum.
    last = checkpoint.find(run_folder / "out" / "checkpoints")
    content = checkpoint.load(last)
    known = content.meta["origin"]["trained on"]
    assert {**known, "checksum": None} == {"title": "CIFAR-10 (JPEG)", "split": "train", "count": 10, "checksum": None}
    assert len(known["checksum"]) == 8
    origin = {**content.meta["origin"], "trained on": "10 images of CIFAR-10 (JPEG)"}
    monkeypatch.setattr(
        "ppl_bnn.inference.checkpoint.load", lambda path, load=checkpoint.load: _with_origin(load(path), origin)
    )
    assert call(*how, tmp_path / "d.npz")[0] == 0
    monkeypatch.undo()
    np.savez(tmp_path / "d.npz", **{**arrays, "labels": arrays["labels"][::-1]})
    assert_refused(
        call(*how, tmp_path / "d.npz"), "belongs to another run: trained on.checksum: saved", known["checksum"]
    )


def test_a_refused_first_try_does_not_stand_in_the_way(call, run_folder):
    assert_refused(call("--stages", "train", "--model.prior", '{"conv*": "normal(0, 1)"}'), "matches no parameter")
    assert call("--stages", "train", "--train.epochs", "1")[0] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("drawings")
def test_a_report_is_not_made_of_results_with_other_settings(call, run_folder):
    assert call("--stages", "train,predict,prune,report")[0] == 0
    out = run_folder / "out"
    before = (out / "metrics.json").read_text()
    assert_refused(
        call("--stages", "report", "--predict.num_samples", 9),
        "predictive.nc is out of date (settings.num_samples: saved 5, now 9)",
    )
    assert_refused(call("--stages", "report", "--pruning.seed", 3), "pruning.nc is out of date", "settings.seed")
    for path in (out / "checkpoints").iterdir():
        path.unlink()
    assert_refused(call("--stages", "report", "--model.prior", "laplace(0, 3)"), "holds a run with other settings")
    assert (out / "metrics.json").read_text() == before


@pytest.mark.usefixtures("drawings")
def test_a_run_trained_on_other_data_is_not_relabelled(call, run_folder, monkeypatch):
    """Trained on the subset while MNIST could not be had, and given MNIST afterwards."""
    from ppl_bnn.experiment import run_data as experiment

    real = experiment.load

    def subset(*arguments, **keywords):
        return tuple(replace(images, title="MNIST (5,000-digit subset)") for images in real(*arguments, **keywords))

    monkeypatch.setattr(experiment, "load", subset)
    assert call()[0] == 0
    out = run_folder / "out"
    assert json.loads((out / "metrics.json").read_text())["data"]["title"] == "MNIST (5,000-digit subset)"
    monkeypatch.undo()
    for stage in ("train", "predict", "prune", "report"):
        assert_refused(
            call("--stages", stage), "belongs to another run: trained on.title: saved 'MNIST (5,000-digit subset)'"
        )


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


@pytest.mark.usefixtures("drawings")
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


def test_a_divergence_exits_1_with_one_line(call):
    code, lines = call("--stages", "train", "--train.lr", "1e30")
    assert code == 1
    assert "error: training went bad at step" in lines[-1]
    assert "Traceback" not in "\n".join(lines)


def test_the_network_must_fit_the_images(call, tmp_path):
    np.savez(tmp_path / "c.npz", **jpegs(14)[0])
    assert_refused(
        call("--data.name", "cifar10", "--data.file", tmp_path / "c.npz"),
        "bnn-fc takes images of shape [1, 28, 28], got [3, 32, 32]",
    )
