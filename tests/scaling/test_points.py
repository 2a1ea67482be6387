"""A point is measured again when something that decides its speed changed, and a failed one says why."""

import json
from pathlib import Path

import pytest
import yaml

from ppl_bnn.errors import UserError
from ppl_bnn.scaling import point as point_module
from ppl_bnn.scaling.launch import PointFailed, checked_launcher, launch, reason
from ppl_bnn.scaling.point import Setting, measure
from ppl_bnn.scaling.run_settings import run_settings

TORCHRUN = """
error: device 'cuda' cannot be used: Torch not compiled with CUDA enabled
E1128 elastic/multiprocessing/api.py:1010] failed (exitcode: 2) local_rank: 0 (pid: 7) of binary: python
Traceback (most recent call last):
  File "torch/distributed/launcher/api.py", line 278, in launch_agent
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Root Cause (first observed failure):
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
"""
CRASHED = """
Traceback (most recent call last):
  File "worker.py", line 3, in <module>
ValueError: bad weights: nan
srun: error_handler done
"""


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (TORCHRUN, "device 'cuda' cannot be used: Torch not compiled with CUDA enabled"),
        ("[1]<stderr>:rank 1: error: no data\n[0]<stderr>:error: another rank is gone (...)", "no data"),
        ("error: another rank is gone (nothing for 5 s)\n", "another rank is gone (nothing for 5 s)"),
        (CRASHED, "ValueError: bad weights: nan"),
        ("There are not enough slots available\n\n", "There are not enough slots available"),
        ("", ""),
    ],
    ids=["torchrun", "horovodrun", "lost rank", "crash", "launcher", "nothing"],
)
def test_the_line_that_says_why_is_found(output, expected):
    assert reason(output) == expected


@pytest.fixture
def launches(monkeypatch):
    """The environments of the launches; each leaves the results of a training of four steps."""
    found = []

    def launched(arguments, output, *, ranks, launcher, environment):
        found.append(dict(environment))
        content = {"ranks": ranks, "backend": "Horovod (Gloo)", "seconds": [1.0] * 4, "starts": [0]}
        (Path(arguments[-1]) / "performance.json").write_text(json.dumps(content))

    monkeypatch.setattr(point_module, "launch", launched)
    return found


def measured(tmp_path, run, *, settings=(), launcher="horovod", steps=3, **setting):
    point = Setting(**{"run": str(run), "device": "cpu", "batch": 8, "ranks": 2, **setting})
    measure(
        point, tmp_path / "points" / point.name, run_settings=run_settings(str(run), settings), steps=steps,
        epochs=None, threads=1, launcher=launcher, settings=settings,
    )  # fmt: skip
    return point


def write_run(folder, **train):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": train}))
    return folder


def test_a_point_is_measured_again_when_its_settings_or_environment_change(tmp_path, launches, monkeypatch):
    for name in ("HOROVOD_CYCLE_TIME", "OMP_PROC_BIND", "LANG"):
        monkeypatch.delenv(name, raising=False)
    run = write_run(tmp_path / "run", lr=0.1)
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"train": {"epochs": 5}}))

    def again(**others):
        before = len(launches)
        measured(tmp_path, run, **others)
        return len(launches) - before

    assert (again(), again()) == (1, 0)
    write_run(run, lr=0.2)
    assert (again(), again()) == (1, 0)
    assert (again(settings=["--config", str(more)]), again(settings=["--config", str(more)])) == (1, 0)
    more.write_text(yaml.safe_dump({"train": {"epochs": 6}}))
    assert again(settings=["--config", str(more)]) == 1
    assert (again(), again(launcher="torch"), again(), again(steps=4), again()) == (1, 1, 1, 1, 1)
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "30")
    assert (again(), again()) == (1, 0)
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    assert again() == 0
    # One rank sends no messages.
    assert again(ranks=1) == 1
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "5")
    assert (again(ranks=1), again()) == (0, 1)
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert (again(ranks=1), again()) == (1, 1)


def test_swept_settings_of_horovod_reach_the_ranks(tmp_path, launches):
    run = write_run(tmp_path / "run")
    first = measured(tmp_path, run, cycle_ms=2.5, fusion_mb=64, estimator="flipout")
    assert launches[-1]["HOROVOD_CYCLE_TIME"] == "2.5"
    assert launches[-1]["HOROVOD_FUSION_THRESHOLD"] == str(64 * 2**20)
    other = measured(tmp_path, run, cycle_ms=5, fusion_mb=64, estimator="flipout")
    assert first.name.endswith("run-cpu-flipout-batch8-ranks2-cycle2.5ms-fusion64mb-0")
    assert first.name != other.name
    assert len(launches) == 2


@pytest.mark.parametrize(
    ("content", "others", "message"),
    [
        ({"seconds": [1.0] * 2}, {}, "at least 2 steps are needed after the first of each process, got 1"),
        ({"ranks": 1}, {}, "the launcher started 1 ranks, not 2"),
        ({"backend": "Gloo"}, {"cycle_ms": 5}, "cycle_ms and fusion_mb are settings of Horovod; .* used Gloo"),
        (None, {}, "no .*performance.json"),
    ],
)
def test_a_training_that_does_not_give_what_was_asked_for_failed(tmp_path, monkeypatch, content, others, message):
    whole = {"ranks": 2, "backend": "Horovod (Gloo)", "seconds": [1.0] * 4, "starts": [0]}

    def launched(arguments, output, **_):
        if content is not None:
            (Path(arguments[-1]) / "performance.json").write_text(json.dumps(whole | content))

    monkeypatch.setattr(point_module, "launch", launched)
    with pytest.raises(PointFailed, match=message):
        measured(tmp_path, write_run(tmp_path / "run"), **others)


def test_a_launcher_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PointFailed, match="nothing-like-it cannot be started: No such file or directory"):
        launch(["-c", ""], tmp_path / "output", ranks=2, launcher="nothing-like-it {ranks}", environment={})


def test_auto_is_what_is_installed(monkeypatch):
    for installed, launcher in ((None, "torch"), (object(), "horovod")):
        monkeypatch.setattr("ppl_bnn.scaling.launch.find_spec", lambda name, found=installed: found)
        assert checked_launcher("auto") == launcher
    with pytest.raises(UserError, match=r"--launcher takes a command with \{ranks\} in it"):
        checked_launcher("srun -n {size}")
