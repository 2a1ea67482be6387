"""A point is measured again when something that decides its speed changed, and a failed one says why."""

import json
from pathlib import Path

import pytest
import yaml

from ppl_bnn.errors import Interrupted, UserError
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


def measured(tmp_path, run, *, settings=(), launcher="horovod", steps=3, epochs=None, threads=1, **setting):
    point = Setting(**{"run": str(run), "device": "cpu", "batch": 8, "ranks": 2, **setting})
    measure(
        point, tmp_path / "points" / point.name, run_settings=run_settings(str(run), settings), steps=steps,
        epochs=epochs, threads=threads, launcher=launcher, settings=settings,
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


def test_a_whole_training_is_the_same_on_other_threads_devices_and_data_folders(tmp_path, launches, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run = write_run(tmp_path / "run", lr=0.1)
    measured(tmp_path, run, epochs=4, settings=["--data.dir", "here"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    measured(tmp_path, run, epochs=4, threads=7, settings=["--data.dir", "misspelt", "--threads", "2"])
    assert len(launches) == 1
    # Of steps that are timed, only the folder does not count.
    for settings, threads, times in ((["--data.dir", "here"], 1, 2), ([], 1, 2), ([], 2, 3)):
        measured(tmp_path, run, settings=settings, threads=threads)
        assert len(launches) == times
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    measured(tmp_path, run, threads=2)
    assert len(launches) == 4


def test_a_whole_training_is_moved_aside_and_never_deleted(tmp_path, launches, caplog):
    run = write_run(tmp_path / "run", lr=0.1)
    folder = tmp_path / "points" / measured(tmp_path, run, epochs=4).name

    def aside(number):
        return folder.with_name(f"{folder.name}-before{number}")

    def mark(name):
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / name).touch()

    mark("first")
    write_run(run, lr=0.2)
    measured(tmp_path, run, epochs=4)
    assert (aside("") / "checkpoints" / "first").exists()
    assert not (folder / "checkpoints").exists()
    assert f"settings.train.lr: before 0.1, now 0.2); the training before is now {aside('')}" in caplog.text
    mark("second")
    # Steps that are timed have the same folder.
    measured(tmp_path, run)
    assert (aside("-2") / "checkpoints" / "second").exists()
    # A whole training that was not finished, too.
    measured(tmp_path, run, epochs=4, launcher="torch")
    mark("third")
    record = json.loads((folder / "point.json").read_text())
    (folder / "point.json").write_text(json.dumps(record | {"done": False}))
    measured(tmp_path, run, epochs=5, launcher="torch")
    assert (aside("-4") / "checkpoints" / "third").exists()
    assert "options.--train.epochs: before '4', now '5'" in caplog.text
    # Nobody knows what a damaged record is of.
    mark("fourth")
    (folder / "point.json").write_text("{")
    measured(tmp_path, run)
    assert (aside("-5") / "checkpoints" / "fourth").exists()


def test_other_trainings_decide_another_network(tmp_path, launches):
    """The folder of the twin that training starts from is of a host, and decides what is trained."""
    run = write_run(tmp_path / "run")
    for twin, times in (("one", 1), ("one", 1), ("two", 2)):
        measured(tmp_path, run, epochs=4, settings=["--guide.init_from", twin])
        assert len(launches) == times


@pytest.mark.parametrize(("epochs", "kept"), [(None, False), (4, True)])
def test_an_interrupted_training_resumes_unless_its_steps_are_timed(tmp_path, monkeypatch, epochs, kept):
    found = []

    def launched(arguments, output, *, ranks, **_):
        out = Path(arguments[-1])
        found.append((out / "checkpoints").exists())
        (out / "checkpoints").mkdir(exist_ok=True)
        if len(found) == 1:
            raise Interrupted("stopped")
        content = {"ranks": ranks, "backend": "Gloo", "seconds": [1.0] * 4, "starts": [0]}
        (out / "performance.json").write_text(json.dumps(content))

    monkeypatch.setattr(point_module, "launch", launched)
    run = write_run(tmp_path / "run")
    with pytest.raises(Interrupted):
        measured(tmp_path, run, epochs=epochs)
    measured(tmp_path, run, epochs=epochs)
    assert found == [False, kept]


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
