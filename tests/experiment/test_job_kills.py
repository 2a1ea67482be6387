"""Jobs that are stopped or killed: what is left of them, and that the same command resumes."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from run_folders import written

from ppl_bnn.experiment.jobs import main
from ppl_bnn.inference import checkpoint

needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux's list of processes")


@pytest.fixture
def run_folder(tmp_path, data_dir):
    config = {
        "data": {"dir": str(data_dir), "num_train": 200, "num_test": 60},
        "train": {"epochs": 1, "optimizer": "adam", "estimator": "local"},
    }
    return written(tmp_path / "tiny", config)


LONG = ("--stages", "train", "--train.epochs", "150", "--train.checkpoint_every", "1", "--train.keep_checkpoints", "3")


def processes_at_work_in(folder):
    """The processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(str(folder).encode() in word for word in words):
            found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def trains(folder, seconds=60):
    """Wait until a training has written a few checkpoints."""
    deadline = time.monotonic() + seconds
    while len(saved := checkpoint.saved(folder / "checkpoints")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return checkpoint.step_of(saved[-1])


@needs_proc
def test_a_killed_command_leaves_no_training_behind_and_the_same_command_finishes(run_folder):
    command = [
        sys.executable,
        "-m",
        "ppl_bnn.jobs",
        str(run_folder),
        "--vary",
        "train.seed=0,1",
        "--workers",
        "2",
        *LONG,
    ]
    folders = [run_folder / "out" / "jobs" / f"train.seed={seed}" for seed in (0, 1)]
    started = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for folder in folders:
        trains(folder)
    assert len(processes_at_work_in(run_folder)) == 3
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    deadline = time.monotonic() + 10
    while left := processes_at_work_in(run_folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    steps = [checkpoint.step_of(checkpoint.saved(folder / "checkpoints")[-1]) for folder in folders]
    assert max(steps) < 300
    # Each has a checkpoint of where it was.
    for folder in folders:
        assert "run the same command again to resume" in (folder / "job.log").read_text()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for folder in folders:
        assert checkpoint.step_of(checkpoint.saved(folder / "checkpoints")[-1]) == 300
        assert "train: resuming from step-" in (folder / "job.log").read_text()


@pytest.mark.parametrize("executor", ["local", "submitit-local"])
def test_a_signal_ends_the_jobs_of_any_executor_with_a_checkpoint(run_folder, executor, capsys):
    pytest.importorskip("submitit")
    folder = run_folder / "out" / "jobs" / "train.seed=0"

    def stop_when_it_trains():
        trains(folder)
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop_when_it_trains)
    stopping.start()
    code = main(
        [str(run_folder), "--vary", "train.seed=0,1", "--executor", executor, *LONG, "--train.epochs", "100000"]
    )
    stopping.join()
    assert code == 75
    lines = capsys.readouterr().err.splitlines()
    assert f"{folder}, train: stopped" in lines
    assert lines[-1] == "stopped; run the same command again to resume"
    assert "run the same command again to resume" in (folder / "job.log").read_text()
    assert not (run_folder / "out" / "jobs" / "train.seed=1").exists()
    assert not list((run_folder / "out").glob(".stop-*"))


@needs_proc
def test_a_job_ends_with_an_executors_process_that_is_killed(run_folder):
    """As a host's job is when its time is up."""
    arguments = [str(run_folder), "--out", str(run_folder / "out"), "--quiet", *LONG, "--train.epochs", "100000"]
    code = f"""
        from ppl_bnn.experiment.job_process import run_job
        print(run_job({arguments!r}, {str(run_folder / "job.log")!r}, {str(run_folder / ".stop")!r}, ".", 1))
    """
    worker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    trains(run_folder / "out")
    worker.kill()
    worker.wait()
    deadline = time.monotonic() + 10
    while processes_at_work_in(run_folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "run the same command again to resume" in (run_folder / "job.log").read_text()


@needs_proc
def test_slurms_signal_before_the_time_is_up_makes_a_checkpoint(run_folder):
    log = run_folder / "job.log"
    arguments = [str(run_folder), "--out", str(run_folder / "out"), "--quiet", *LONG, "--train.epochs", "100000"]
    with log.open("wb") as file:
        job = subprocess.Popen(
            [sys.executable, "-m", "ppl_bnn.experiment.job_process", *arguments], stdin=subprocess.PIPE, stderr=file
        )
        trains(run_folder / "out")
        job.send_signal(signal.SIGUSR2)
        assert job.wait(30) == 75
        job.stdin.close()
    assert "run the same command again to resume" in log.read_text()
