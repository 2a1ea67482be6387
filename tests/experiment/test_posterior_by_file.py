"""A run's posterior by its file: opened, predicted with and exported like that of a checkpoint."""

import json

import pytest
import torch
from ranks import Ranks
from refusals import assert_refused

from ppl_bnn import Classifier, StoredPosterior, bayesian, open_run, predict, save_posterior
from ppl_bnn.errors import FileError
from ppl_bnn.export import main as export
from ppl_bnn.models.networks import bnn_fc
from ppl_bnn.results import netcdf
from ppl_bnn.run import main

QUICK = ("--train.epochs", 1, "--pruning.threshold", "[]", "--pruning.fractions", "[0.5]", "--predict.method", "draws")


def same(here, there):
    assert torch.equal(here.mean, there.mean)
    assert here.scores() == there.scores()


@pytest.fixture
def tuned(call, run_folder):
    """The out folder of a run with a fine-tuned pruned posterior, 90% pruned."""
    choice = ("--pruning.finetune_epochs", 1, "--pruning.save_fraction", "0.9", "--pruning.num_samples", 3)
    assert call("--stages", "train,prune", *QUICK, *choice)[0] == 0
    return run_folder / "out"


def test_a_fine_tuned_pruned_posterior_predicts_bitwise_what_its_sweep_has(tuned):
    run = open_run(tuned)
    pruned = run.pruned()
    assert pruned.posterior.is_pruned
    assert not run.posterior.is_pruned
    bias = run.model.net.fc1.bias.clone()
    assert not torch.equal(pruned.model.net.fc1.bias, bias)
    found = predict(
        pruned.model, pruned.posterior, run.test_data.inputs(), run.test_data.targets, num_samples=3, method="draws",
        progress=False,
    )  # fmt: skip
    assert torch.equal(run.model.net.fc1.bias, bias)
    there = netcdf.read_group(tuned / "pruning.nc", "pruning").isel(level=-1)
    assert torch.equal(found.mean_probs.float(), torch.from_numpy(there["mean_probs"].values))
    assert found.summary()["nll"] == float(there["nll"])


def test_a_pruned_posterior_is_predicted_with_and_exported_by_its_file(tuned, call):
    file = tuned / "pruned.safetensors"
    how = ("--stages", "predict,report", "--predict.posterior", file)
    assert call(*how, run=tuned)[0] == 0
    metrics = json.loads((tuned / "metrics.json").read_text())
    assert metrics["predicted_with"] == {"checkpoint": "last", "posterior": "pruned.safetensors"}
    assert "predict: predictive-pruned.nc is up to date" in call(*how, run=tuned)[1]
    pruned = open_run(tuned).pruned()
    assert pruned.metrics == metrics
    for other, message in (
        (open_run(tuned), r"metrics.json is of predictive-pruned.nc, and this posterior's results are predictive.nc"),
        (open_run(tuned).pruned(0.5), "pruned just now has no saved predictive or report"),
    ):
        with pytest.raises(FileError, match=message):
            other.metrics  # noqa: B018
    x, y = pruned.test_data.inputs(), pruned.test_data.targets
    same(predict(pruned.model, pruned.posterior, x, y, num_samples=5, method="draws", progress=False),
         pruned.predictive())  # fmt: skip
    # Another file of that name is another posterior.
    save_posterior(file, pruned.model, open_run(tuned).pruned(0.5).posterior)
    assert "predict: recomputing predictive-pruned.nc (posterior: saved" in "\n".join(call(*how, run=tuned)[1])
    file.unlink()
    assert_refused(call("--stages", "report", run=tuned), "pruned.safetensors cannot be read (No such file or direct")
    with pytest.raises(FileError, match="pruned just now has no saved predictive"):
        open_run(tuned).pruned(0.5).predictive()
    assert_refused(
        call(*how, "--predict.train_log_likelihood", "true", run=tuned), "train_log_likelihood is of a checkpoint's"
    )


def test_the_two_ways_to_export_a_pruned_posterior_write_the_same(tuned, tmp_path, capsys):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    assert export([str(tuned), "--pruned", "--draws", "3"]) == 0
    assert export([str(tuned), "--posterior", str(tuned / "pruned.safetensors"), "--draws", "3",
                   "--file", str(tmp_path / "p.onnx")]) == 0  # fmt: skip
    run = open_run(tuned).pruned()
    x = run.test_data.inputs()
    expected = predict(run.model, run.posterior, x, num_samples=3, method="draws", progress=False).mean_probs.float()
    for path in (tuned / "predictive.onnx", tmp_path / "p.onnx"):
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    capsys.readouterr()
    assert export([str(tuned), "--pruned", "--fraction", "0.5"]) == 2
    assert "give one of --fraction, --pruned and --posterior" in capsys.readouterr().err


def _predict_by_file(run, file):
    return main([run, "--stages", "predict", "--predict.posterior", file, "--quiet"])


@pytest.mark.slow
def test_two_ranks_predict_with_a_file_that_rank_0_reads(tuned, tmp_path):
    file = str(tuned / "pruned.safetensors")
    assert _predict_by_file(str(tuned), file) == 0
    alone = netcdf.read_attrs(tuned / "predictive-pruned.nc")
    (tuned / "predictive-pruned.nc").unlink()
    codes = Ranks(tmp_path / "ranks", 2, _predict_by_file, str(tuned), file, connected=False).results()
    assert codes == [0, 0]
    together = netcdf.read_attrs(tuned / "predictive-pruned.nc")
    assert together["accuracy"] == alone["accuracy"]
    assert together["nll"] == pytest.approx(alone["nll"], rel=1e-6)


def test_stored_draws_are_opened_in_python_and_refused_by_the_stage(call, run_folder, tmp_path):
    assert call("--stages", "train", *QUICK)[0] == 0
    net = bayesian(bnn_fc())
    samples = {f"fc{n}.weight": torch.randn(4, *net.get_parameter(f"fc{n}.weight").shape) for n in (1, 2, 3)}
    save_posterior(tmp_path / "hmc", Classifier(net, 600), StoredPosterior(samples))
    found = open_run(run_folder).pruned(file=tmp_path / "hmc")
    assert torch.equal(found.posterior.draw(3)["fc2.weight"], samples["fc2.weight"][3])
    how = ("--stages", "predict", *QUICK, "--predict.posterior", tmp_path / "hmc")
    assert_refused(call(*how), "predict.posterior takes a mean-field posterior")
