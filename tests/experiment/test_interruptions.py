"""A run that is interrupted by a signal, a kill or a full disk resumes where it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ppl_bnn.experiment import stage_prune
from ppl_bnn.inference import checkpoint
from ppl_bnn.prediction import drawing
from ppl_bnn.pruning import finetune
from ppl_bnn.results import netcdf

ROOT = Path(__file__).parents[2]


# A training with a checkpoint every epoch.
TRAINING = ["--stages", "train", "--train.checkpoint_every", "1"]


def test_ctrl_c_before_the_stages_does_not_pass_for_a_failed_download(call, run_folder, monkeypatch):
    from ppl_bnn.experiment import run_data as experiment

    def interrupted(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(experiment, "load", interrupted)
    code, lines = call()
    assert code == 75
    assert lines == ["stopped at once; run the same command again to resume from the last saved state"]
    assert not (run_folder / "out" / "checkpoints").exists()


def test_a_fine_tuning_that_was_cut_off_goes_on_where_it_was(call, run_folder, monkeypatch):
    choice = ["--pruning.finetune_epochs", 2, "--pruning.threshold", "0", "--pruning.save_fraction", "0.9"]
    choice += ["--train.checkpoint_every", 1]
    call("--stages", "train,prune", *choice)
    out = run_folder / "out"
    whole = load_file(out / "pruned.safetensors")
    assert not (out / "finetuning").exists()
    for name in ("pruned.safetensors", "pruning.nc"):
        (out / name).unlink()
    seen = []

    def cut_off(*args, **settings):
        # In the second level's second epoch, as an exception between two steps: what a crash leaves behind.
        seen.append(args[1].fraction)
        asked = iter(range(100))
        settings["should_stop"] = lambda: len(seen) == 2 and next(asked) == 8 and 1 / 0
        return finetune(*args, **settings)

    monkeypatch.setattr(stage_prune, "finetune", cut_off)
    assert call("--stages", "prune", *choice)[0] == 1
    steps = {path.parent.parent.name[:6]: path.stem for path in sorted(out.glob("finetuning/*/checkpoints/*"))}
    assert steps == {"0.5000": "step-00000012", "0.9000": "step-00000006"}
    monkeypatch.undo()
    assert call("--stages", "prune", *choice)[0] == 0
    assert not (out / "finetuning").exists()
    again = load_file(out / "pruned.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_a_full_disk_costs_nothing_that_was_there(call, run_folder):
    """A limit on file size is what a full disk is to the writer: the checkpoint does not fit."""
    command = [sys.executable, "-m", "ppl_bnn.run", str(run_folder), *TRAINING]
    limited = ["bash", "-c", f"ulimit -f 4000; exec {' '.join(command)}"]
    result = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "step-00000006.safetensors" in result.stderr.splitlines()[-1]
    assert "existing results are intact; run the same command again to resume" in result.stderr.splitlines()[-1]
    assert not list((run_folder / "out").rglob("*.part"))
    assert call(*TRAINING)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["predict", "prune"])
def test_a_signal_during_draws_exits_75_and_the_same_command_goes_on(call, run_folder, tmp_path, monkeypatch, stage):
    base = ["--predict.method", "draws", "--stages"]
    assert call(*base, "train")[0] == 0
    setting = {"predict": "--predict.num_samples", "prune": "--pruning.num_samples"}[stage]
    real = drawing.drawn_blocks

    def blocks(*arguments, **keywords):
        size, logits = real(*arguments, **keywords)

        def stopped(block, sign):
            if block == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return logits(block, sign)

        return drawing.Blocks(size, stopped)

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "drawn_blocks", blocks)
        code, lines = call(*base, stage, setting, 6)
    assert code == 75
    assert "stopped after draw 3 of 6" in lines[-1]
    out = run_folder / "out"
    assert [path.name for path in out.glob("*.nc")] == {"predict": ["predictive.partial.nc"], "prune": []}[stage]
    code, lines = call(*base, stage, setting, 6)
    assert code == 0
    assert ("resuming from the 3 draws in predictive.partial.nc" in "\n".join(lines)) == (stage == "predict")
    assert len(list(out.glob("*.nc"))) == 1
    if stage == "predict":
        (tmp_path / "whole").mkdir()
        (tmp_path / "whole" / "checkpoints").symlink_to(out / "checkpoints")
        assert call(*base, stage, setting, 6, "--out", tmp_path / "whole")[0] == 0
        for group in ("posterior_predictive", "log_likelihood", "uncertainty", "monte_carlo", "sample_stats"):
            one, other = (netcdf.read_group(path / "predictive.nc", group) for path in (out, tmp_path / "whole"))
            # Kept probabilities are stored in steps of 1/65534, and what is made of them again with them.
            made_again = [name for name in ("std_probs", "interval") if name in one]
            assert one.drop_vars(made_again).identical(other.drop_vars(made_again)), group
            for name in made_again:
                np.testing.assert_allclose(one[name], other[name], atol=1.6e-5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(call, run_folder, tmp_path, number):
    arguments = ["--stages", "train", "--train.epochs", "60", "--threads", "1"]
    command = [sys.executable, "-m", "ppl_bnn.run", str(run_folder), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = run_folder / "out" / "log.csv"
    deadline = time.monotonic() + 90
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "run the same command again" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert 0 < checkpoint.load(checkpoint.find(run_folder / "out" / "checkpoints")).step < 360
    assert call(*arguments)[0] == 0
    assert call(*arguments, "--out", tmp_path / "whole")[0] == 0
    cut, uncut = (
        load_file(checkpoint.find(folder / "checkpoints")) for folder in (run_folder / "out", tmp_path / "whole")
    )
    assert cut.keys() == uncut.keys()
    for name, tensor in cut.items():
        assert torch.equal(tensor, uncut[name]), name


@pytest.mark.slow
def test_killed_at_any_step_and_started_again_it_ends_bitwise_the_same(call, run_folder, tmp_path):
    settings = ["--train.epochs", "12", "--train.checkpoint_minutes", "0.001", "--train.keep_checkpoints", "3"]
    arguments = [*TRAINING, *settings, "--threads", "1"]
    command = [sys.executable, "-m", "ppl_bnn.run", str(run_folder), *arguments]
    assert call(*arguments, "--out", tmp_path / "whole")[0] == 0
    checkpoints = run_folder / "out" / "checkpoints"
    for steps in (0, 13, 50):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            if (found := checkpoint.saved(checkpoints)) and checkpoint.step_of(found[-1]) >= steps:
                break
            time.sleep(0.002)
        process.kill()
        process.wait()
    before = checkpoint.step_of(checkpoint.find(checkpoints))
    code, lines = call(*arguments)
    assert code == 0
    assert any(f"resuming from step-{before:08d}" in line for line in lines)
    assert 50 <= before < 72
    cut, uncut = (checkpoint.load(checkpoint.find(folder)) for folder in (checkpoints, tmp_path / "whole/checkpoints"))
    assert cut.tensors.keys() == uncut.tensors.keys()
    assert all(torch.equal(tensor, uncut.tensors[name]) for name, tensor in cut.tensors.items())
    for name in ("history", "step_records"):
        cut_rows, uncut_rows = (
            [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in state.meta[name]]
            for state in (cut, uncut)
        )
        assert cut_rows == uncut_rows
    assert len(checkpoint.saved(checkpoints)) == 4
    assert (run_folder / "out" / "log.csv").exists()
