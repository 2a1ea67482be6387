"""Pruning from the command line: the step, the criterion, fine-tuning, and what is saved."""

import pytest
import torch
from refusals import assert_refused

from ppl_bnn import predict
from ppl_bnn.experiment import stage_prune
from ppl_bnn.experiment.setup import opened
from ppl_bnn.inference import checkpoint
from ppl_bnn.inference.posterior_file import load_posterior
from ppl_bnn.pruning import finetune
from ppl_bnn.results import netcdf


def test_an_earlier_step_is_pruned_by_name(call, run_folder):
    call("--stages", "train,prune", "--train.checkpoint_every", "1")
    last = netcdf.read_attrs(run_folder / "out" / "pruning.nc")
    assert call("--stages", "prune", "--pruning.checkpoint", "step-00000006", "--train.checkpoint_every", "1")[0] == 0
    early = netcdf.read_attrs(run_folder / "out" / "pruning-step-00000006.nc")
    assert netcdf.read_attrs(run_folder / "out" / "pruning.nc") == last
    assert (last["step"], early["step"]) == (12, 6)
    assert_refused(
        call("--stages", "prune", "--pruning.checkpoint", "7"), "no checkpoint '7'", "step-00000006, step-00000012"
    )


def test_a_layer_that_loses_everything_is_named_and_the_network_still_runs(call, run_folder):
    code, lines = call(
        "--stages", "train,prune", "--pruning.threshold", '{"fc2*":1e6,"*":0.0}', "--pruning.fractions", "[]"
    )
    assert code == 0
    warning = next(line for line in lines if "no weight is left in" in line)
    assert "fc2.weight" in warning
    levels = netcdf.read_group(run_folder / "out" / "pruning.nc", "pruning")
    assert levels["nonzero_by_layer"].values.tolist() == [[784 * 256, 0, 2560]]
    assert levels["threshold"].values.tolist() == [1e6]


def test_a_posterior_with_nan_is_refused_by_name(call, run_folder):
    call("--stages", "train,prune")
    out = run_folder / "out"
    before = (out / "pruning.nc").read_bytes()
    path = checkpoint.saved(out / "checkpoints")[-1]
    state = checkpoint.load(path)
    parts = {name: torch.nn.Module() for name in ("model", "guide")}
    for name, module in parts.items():
        tensors = state.part(name)
        if name == "guide":
            tensors["unconstrained_scale.fc2.weight"][0, 0] = float("nan")
        module.state_dict = lambda tensors=tensors: tensors
    checkpoint.save(out / "checkpoints", state.step, **parts, meta=state.meta)
    for criterion in ("snr", "evidence"):
        code, lines = call("--stages", "prune", "--pruning.criterion", criterion)
        assert code == 2
        assert lines[-1].startswith(
            "error: site 'fc2.weight' has a loc that is not finite or a scale that is not positive"
        )
    assert (out / "pruning.nc").read_bytes() == before


@pytest.mark.slow
def test_criteria_structures_and_finetuning_from_the_command_line(call, run_folder):
    call("--stages", "train,predict,prune")
    plain = netcdf.read_group(run_folder / "out" / "pruning.nc", "pruning")
    choice = ["--pruning.criterion", "evidence", "--pruning.structure", "inputs", "--pruning.threshold", "-0.5"]
    choice += ["--pruning.finetune_epochs", 2, "--pruning.finetune_lr", "1e-3"]
    code, _ = call("--stages", "prune,report", *choice)
    assert code == 0
    tuned = netcdf.read_group(run_folder / "out" / "pruning.nc", "pruning")
    assert tuned["accuracy"].values[tuned["pruned_fraction"].values > 0.85].max() > plain["accuracy"].values[-2]
    assert {path.name for path in (run_folder / "out" / "figures").iterdir()} >= {"pruning.png", "pruning_answers.png"}


def test_a_sweep_that_was_cut_off_leaves_the_saved_posterior(call, run_folder, monkeypatch):
    assert call("--stages", "train,prune", "--pruning.save_fraction", "0.9")[0] == 0
    saved = run_folder / "out" / "pruned.safetensors"
    before = saved.read_bytes()

    def cut(*args, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage_prune, "sweep", cut)
        assert call("--stages", "prune", "--pruning.save_fraction", "0.5", "--pruning.seed", "1")[0] == 75
    assert saved.read_bytes() == before
    # It is written anew where the sweep is there already.
    assert call("--stages", "prune", "--pruning.save_fraction", "0.5")[0] == 0
    assert len(saved.read_bytes()) > 2 * len(before)


def test_the_saved_posterior_is_the_fine_tuned_level_and_is_tuned_once(call, run_folder, monkeypatch):
    call("--stages", "train")
    tuned = []
    monkeypatch.setattr(
        stage_prune, "finetune", lambda *args, **settings: tuned.append(args[1].fraction) or finetune(*args, **settings)
    )
    choice = ["--pruning.finetune_epochs", 1, "--pruning.save_fraction", "0.9", "--pruning.threshold", "0"]
    assert call("--stages", "prune", *choice)[0] == 0
    assert tuned == pytest.approx([0.5, 0.9], abs=1e-5)
    out = run_folder / "out"
    run = opened(out)
    run.restored("last")
    untouched = {name: value.clone() for name, value in run.model.state_dict().items()}
    guide = load_posterior(out / "pruned.safetensors", run.model, *run.example())
    assert any(not torch.equal(value, untouched[name]) for name, value in run.model.state_dict().items())
    x, y = run.tensors(run.test_data)
    found = predict(run.model.net, guide, x, y, num_samples=3, method="draws", progress=False)
    there = netcdf.read_group(out / "pruning.nc", "pruning")
    torch.testing.assert_close(
        found.mean_probs.float(), torch.from_numpy(there["mean_probs"].values[-1]).float(), rtol=0, atol=1e-4
    )
    call("--stages", "prune", *choice)
    assert len(tuned) == 2
    (out / "pruned.safetensors").unlink()
    call("--stages", "prune", *choice)
    assert len(tuned) == 4
    choice[3] = "0.8"
    call("--stages", "prune", *choice)
    assert tuned[4:] == pytest.approx([0.5, 0.8, 0.9], abs=1e-5)
