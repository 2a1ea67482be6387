"""The command: a real study of two ranks, points that fail beside points that do not, and bad commands."""

import csv
import json
import sys

import pytest
import yaml

from ppl_bnn.results import netcdf
from ppl_bnn.scaling.__main__ import main
from ppl_bnn.scaling.point import Setting


@pytest.mark.slow
def test_a_study_of_two_ranks_is_launched_once(tmp_path, data_dir, capsys):
    run, out = tmp_path / "bnn", tmp_path / "out"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"dir": str(data_dir)}, "train": {"estimator": "local"}}))

    def study(launcher):
        options = ["--batches", "64", "--steps", "3", "--threads", "1", "--launcher", launcher, "--out", str(out)]
        return main([str(run), *options, "--", "--train.optimizer", "adam"])

    assert study("torch") == 0
    with (out / "scaling.csv").open() as file:
        alone, two = list(csv.DictReader(file))
    assert [(row["ranks"], row["backend"]) for row in (alone, two)] == [("1", "one process"), ("2", "Gloo")]
    # loc and scale of 268,800 weights, and 522 biases.
    assert (float(alone["bytes"]), float(two["bytes"])) == (0, 4 * (2 * 268_800 + 522))
    counts = {kind: float(two[f"{kind}_count"]) for kind in ("gradients", "step_message", "batch_norm", "broadcast")}
    # Of all weights one message a step, and one of the biases.
    assert counts == {"gradients": 8, "step_message": 4, "batch_norm": 0, "broadcast": 9}
    assert 0 < float(two["communication_share"]) < 1
    assert float(alone["step_seconds"]) / float(two["step_seconds"]) == pytest.approx(float(two["efficiency"]))
    assert netcdf.read_group(out / "scaling.nc", "scaling").sizes["point"] == 2
    figures = {path.stem for path in (out / "figures").iterdir()}
    assert figures == {"throughput", "fixed_epochs", "efficiency", "prediction"}
    # Done again, nothing is launched; with another launcher, only the two ranks are.
    times = {path: path.stat().st_mtime_ns for path in (out / "points").glob("*/performance.json")}
    assert len(times) == 2
    assert study("torch") == 0
    assert times == {path: path.stat().st_mtime_ns for path in (out / "points").glob("*/performance.json")}
    assert study("false {ranks}") == 1
    assert "bnn-cpu-batch64-ranks2-0 failed: it printed nothing and ended with exit code 1 (" in capsys.readouterr().err
    assert len(list((out / "points").glob("*/performance.json"))) == 1


def test_bad_commands_are_told_apart_from_failures(tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path / "nothing")]) == 2
    assert main([str(tmp_path), "--steps", "one"]) == 2
    assert main(["runs/mnist-fc", "--ranks", "0"]) == 2
    assert main(["runs/mnist-fc", "elsewhere/mnist-fc"]) == 2
    assert main(["runs/mnist-fc", "--launcher", "srun -n {size} python"]) == 2
    assert "--launcher takes a command with {ranks} in it, got 'srun -n {size} python'" in capsys.readouterr().err
    assert main(["runs/mnist-fc", "--launcher", ""]) == 2
    assert main(["runs/mnist-fc", "--latency_ms", "5"]) == 2
    assert "error: --latency_ms is of rehearsed hosts: give them a bandwidth with --mbit" in capsys.readouterr().err
    assert main(["runs/mnist-fc", "--cycle_ms", "5", "--launcher", "torch"]) == 2
    assert "error: --cycle_ms and --fusion_mb are settings of Horovod; --launcher torch has no such settings" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr("ppl_bnn.scaling.launch.find_spec", lambda name: None)
    assert main(["runs/mnist-fc", "--fusion_mb", "64"]) == 2
    assert "Horovod is not installed here, so --launcher auto takes torchrun, which has no such settings" in (
        capsys.readouterr().err
    )
    assert main(["runs/mnist-fc", "--cycle_ms", "0", "--launcher", "horovod"]) == 2
    assert main(["runs/mnist-fc", "--cycle_ms", "5", "--launcher", "horovod", "--mbit", "100"]) == 2
    assert "the ranks on rehearsed hosts (--mbit) use torch.distributed" in capsys.readouterr().err
    assert main(["runs/mnist-fc", "--accuracy", "60"]) == 2
    assert "--accuracy is a share above 0 and at most 1, got 60" in capsys.readouterr().err
    assert main(["runs/mnist-fc", "--estimators", "groups", "flip"]) == 2
    assert "--estimators must be one of plain, " in capsys.readouterr().err
    assert main(["runs/mnist-fc", "--estimators", "groups", "--", "--train.estimator", "plain"]) == 2
    assert main(["runs/mnist-fc", "--", "--train.optimise", "adam"]) == 2
    assert "train.optimise" in capsys.readouterr().err
    with pytest.raises(SystemExit) as code:
        main(["--help"])
    assert code.value.code == 0
    assert "rehearsed hosts" in capsys.readouterr().out


def test_points_that_fail_are_told_and_the_others_make_the_table(tmp_path, data_dir, capsys):
    run, out = tmp_path / "bnn", tmp_path / "out"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"dir": str(data_dir)}}))
    study = [str(run), "--batches", "16", "--steps", "2", "--threads", "1", "--out", str(out)]
    assert main([*study, "--devices", "cpu", "nothing", "--launcher", "not-there {ranks}"]) == 1
    told = capsys.readouterr().err
    reasons = json.loads((out / "failed.json").read_text())
    assert reasons["bnn-cpu-batch16-ranks2-0"] == "not-there cannot be started: No such file or directory"
    assert reasons["bnn-nothing-batch16-ranks1-0"].startswith("device 'nothing' cannot be used: ")
    assert set(reasons) == {
        f"bnn-{name}-0" for name in ("cpu-batch16-ranks2", "nothing-batch16-ranks1", "nothing-batch16-ranks2")
    }
    assert "bnn-nothing-batch16-ranks1-0 failed: device 'nothing' cannot be used: " in told
    with (out / "scaling.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["device"], row["ranks"], row["estimator"]) == ("cpu", "1", "groups")
    assert {"cycle_ms", "fusion_mb", "communication_efficiency", "fixed_epochs_measured"} <= row.keys()
    assert row["seconds_to_accuracy_0.6"] == ""
    assert "no point on several ranks was measured, so nothing is predicted" in told
    # A launcher that is stopped stops the study, which is no failure of its points.
    stopped = tmp_path / "stopped.py"
    stopped.write_text("raise SystemExit(75)")
    assert main([*study, "--ranks", "2", "--launcher", f"{sys.executable} {stopped} {{ranks}}"]) == 75
    assert "the ranks were stopped; run the same command again to resume" in capsys.readouterr().err
    # Without the point that fails, the same table is no failure.
    assert main([*study, "--ranks", "1"]) == 0
    assert json.loads((out / "failed.json").read_text()) == {}
    assert netcdf.read_group(out / "scaling.nc", "prediction") is None
    # If none is left, the table of before is not theirs. The trainings stay.
    assert main([*study, "--devices", "nothing", "--ranks", "1"]) == 1
    assert f"so there is no table; the table and figures of before were deleted from {out}" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"failed.json", "figures", "points"}
    assert not list((out / "figures").iterdir())
    trained = Setting(str(run), "cpu", 16, 1).name
    assert (out / "points" / trained / "performance.json").exists()
