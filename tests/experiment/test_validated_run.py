"""A run with validation: examples kept out of training, an early end, and the best parameters for the later stages."""

import csv

import pytest
import torch

from ppl_bnn.experiment.setup import opened
from ppl_bnn.inference import checkpoint
from ppl_bnn.prediction.predictive import predict

VALIDATED = [
    "--train.validation",
    "20",
    "--train.validation_samples",
    "5",
    "--train.epochs",
    "12",
    "--train.lr",
    "0.02",
]


def test_it_ends_early_with_the_best_parameters_and_is_complete(call, run_folder):
    arguments = [*VALIDATED, "--train.patience", "2", "--train.kl_weight", "0.001"]
    code, lines = call("--stages", "train,predict", *arguments)
    assert code == 0, lines
    out = run_folder / "out"
    with (out / "log.csv").open() as file:
        nlls = [float(row["val_nll"]) for row in csv.DictReader(file)]
    best = nlls.index(min(nlls))
    assert len(nlls) == min(12, best + 1 + 2)
    run = opened(out)
    assert len(run.validation_data) == 20
    assert run.validation_data.split == "validation"
    assert len(run.train_data) == run.model.num_data
    run.restored("last")
    found = predict(run.model, run.guide, *run.tensors(run.validation_data), num_samples=5, progress=False)
    assert found.scores()["nll"] == pytest.approx(min(nlls), rel=1e-5)
    last, kept = (checkpoint.load(checkpoint.find(out / "checkpoints", name)) for name in ("last", "best"))
    assert last.step == len(nlls) * (kept.step // (best + 1))
    for name, tensor in kept.part("guide").items():
        assert torch.equal(tensor, last.part("guide")[name])
    # It is complete: the same command trains no further.
    _, lines = call("--stages", "train", *arguments)
    assert any("complete already" in line for line in lines)


def test_the_line_of_a_training_shows_the_weight_of_the_kl(call, run_folder):
    _, lines = call("--stages", "train", "--train.epochs", "1", "--train.kl_schedule", "linear", "--train.kl_ramp", "1")
    (line,) = (line for line in lines if line.startswith("train: 1 epochs"))
    numbers = dict(part.strip().split(" ")[:2] for part in line.split(";")[1].split(","))
    loss, nll, kl, weight = (float(numbers[name]) for name in ("loss", "nll", "kl", "kl_weight"))
    # The weight ramps to 0.1 at the end of the training, so the last step's is above the mean.
    assert 0.02 < weight < 0.08
    assert loss == pytest.approx(nll + weight * kl, abs=2e-4)


def test_tensorboards_files_are_in_the_out_folder(call, run_folder):
    pytest.importorskip("tensorboard")
    code, lines = call("--stages", "train", "--train.epochs", "1", "--train.tensorboard", "true")
    assert code == 0, lines
    assert list((run_folder / "out" / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.validation", "100000"], "train.validation must be below the number of training examples"),
        (["--train.patience", "2"], "train.patience 2 waits for a better score of a validation: set train.validation"),
        (["--train.validation", "20", "--train.monitor", "f1"], "monitor must be a score of the validation: one of"),
    ],
)
def test_what_cannot_be_is_refused(call, run_folder, arguments, message):
    code, lines = call("--stages", "train", *arguments)
    assert code == 2
    assert message in lines[-1]


def test_without_patience_later_stages_take_the_best_by_its_name(call, run_folder):
    code, lines = call("--stages", "train,predict", *VALIDATED, "--predict.checkpoint", "best")
    assert code == 0, lines
    out = run_folder / "out"
    assert (out / "predictive-best.nc").exists()
    with (out / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = min(rows, key=lambda row: float(row["val_nll"]))
    assert checkpoint.load(checkpoint.find(out / "checkpoints", "best")).step == int(best["step"])
    assert len(rows) == 12
