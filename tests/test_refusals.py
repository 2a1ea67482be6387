"""Every way the command line can be given something wrong: one line, and what was there stays."""

import json

import pytest
from refusals import assert_refused

from ppl_bnn import checkpoint


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
        (
            ["--train.estimator", "magic"],
            ["train.estimator must be one of plain, flipout, flipout-bfloat16, groups, local"],
        ),
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
