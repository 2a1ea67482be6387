"""Commands on several ranks: a rank that is killed or stopped, torchrun, horovodrun, and elastic training."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from ranks import Ranks
from run_folders import written

from ppl_bnn.distributed.horovod_backend import import_horovod
from ppl_bnn.inference import checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_folder(tmp_path, data_dir):
    """A run of seconds on real MNIST: 600 training digits, 6 steps an epoch on one rank."""
    config = {
        "data": {"dir": str(data_dir), "num_train": 600, "num_test": 200},
        "train": {"epochs": 2, "optimizer": "adam", "estimator": "local", "checkpoint_every": 1},
    }
    return written(tmp_path / "tiny", config)


def command_line(*arguments):
    from ppl_bnn.run import main

    sys.exit(main(list(arguments)))


def start(run_folder, *arguments):
    """Start two ranks of a long training and come back when its first epoch is done."""
    checkpoints = run_folder / "out" / "checkpoints"
    command = (str(run_folder), "--stages", "train", "--train.epochs", "5000", *arguments)
    ranks = Ranks(run_folder / "ranks", 2, command_line, *command, connected=False)
    deadline = time.monotonic() + 60
    while len(checkpoint.saved(checkpoints)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return ranks


def with_a_prior_of_its_own(*arguments):
    command_line(*arguments, "--model.prior", f"normal(0, {1 + int(os.environ['RANK'])})")


def test_ranks_with_other_settings_are_refused(run_folder):
    ranks = Ranks(run_folder / "ranks", 2, with_a_prior_of_its_own, str(run_folder), connected=False)
    assert ranks.wait(seconds=60) == [2, 2], ranks.errors()
    message = "the ranks were not started alike: settings or stages of rank 1 differ from rank 0's"
    assert all(message in error.splitlines()[-1] for error in ranks.errors())
    assert not (run_folder / "out").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_rank_is_killed_the_others_end_soon_and_say_why(run_folder, rank):
    ranks = start(run_folder)
    os.kill(ranks.processes[rank].pid, signal.SIGKILL)
    codes = ranks.wait(seconds=45)
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 1), ranks.errors()
    last = ranks.errors()[1 - rank].splitlines()[-1]
    assert "error: another rank is gone" in last
    assert last.endswith("run the same command again to resume from the last checkpoint")
    assert last.startswith("rank 1: ") == (rank == 0)
    assert checkpoint.step_of(checkpoint.find(run_folder / "out" / "checkpoints")) >= 3


def test_when_a_rank_is_stopped_the_others_end_within_the_bound(run_folder):
    ranks = start(run_folder, "--train.rank_timeout", "3")
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    ranks.processes[0].join(20)
    assert ranks.processes[0].exitcode == 1
    last = ranks.errors()[0].splitlines()[-1]
    assert "error: another rank is gone" in last
    # It goes on one day, and ends too.
    os.kill(ranks.processes[1].pid, signal.SIGCONT)
    assert ranks.wait() == [1, 1]


def test_a_signal_to_one_rank_stops_both_with_one_checkpoint(run_folder):
    ranks = start(run_folder, "--train.keep_checkpoints", "1")
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.wait() == [75, 75], ranks.errors()
    main, other = ranks.errors()
    assert "stopped" in main.splitlines()[-1]
    assert other == ""
    steps = [checkpoint.step_of(path) for path in checkpoint.saved(run_folder / "out" / "checkpoints")]
    assert len(steps) == 2
    assert f"step {steps[1]} of" in main or f"epoch {steps[1] // 3} of" in main


def rows_of(out):
    """log.csv without times."""
    rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    return [[value for column, value in enumerate(row) if column not in (2, 9)] for row in rows]


def launched(run_folder, launcher):
    """Run a launcher's command on the run: what it wrote, and its log.csv without times."""
    out = run_folder / "out"
    command = [*launcher, "ppl_bnn.run", str(run_folder), "--out", str(out), "--stages", "train,posterior"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert (out / "posterior.json").exists()
    assert "diagnose: run by rank 0 alone" in output
    return output, rows_of(out)


@pytest.mark.slow
def test_torchrun_runs_a_run(run_folder):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    output, rows = launched(run_folder, launcher)
    assert "2 ranks over Gloo: " in output
    assert [row[1] for row in rows[1:]] == ["3", "6"]


@pytest.fixture
def horovodrun():
    """The launcher, where Horovod is installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_horovod()
    except ImportError as error:
        pytest.skip(str(error))
    return str(Path(sys.executable).parent / "horovodrun")


@pytest.mark.parametrize("controller", ["gloo", "mpi"])
def test_horovodrun_runs_the_same_training(run_folder, horovodrun, controller):
    if controller == "mpi" and not import_horovod().mpi_built():
        pytest.skip("Horovod was built without MPI here")
    output, rows = launched(run_folder, [horovodrun, "-np", "2", f"--{controller}", sys.executable, "-m"])
    assert f"2 ranks over Horovod ({controller}".lower() in output.lower()
    other = run_folder / "other"
    arguments = (str(run_folder), "--stages", "train", "--out", str(other))
    ranks = Ranks(run_folder / "ranks", 2, command_line, *arguments, connected=False)
    assert ranks.wait() == [0, 0], ranks.errors()
    assert rows == rows_of(other)


class Horovodrun:
    """A launcher's process, what it and its ranks wrote, and the ranks."""

    def __init__(self, launcher, run_folder, *arguments):
        self.log = run_folder / "launcher.log"
        command = [*launcher, sys.executable, "-m", "ppl_bnn.run", str(run_folder), "--stages", "train", *arguments]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)

    def rank(self, **environment):
        """The process whose environment has these."""
        import psutil

        for process in psutil.Process(self.process.pid).children(recursive=True):
            if process.cmdline()[1:3] == ["-m", "ppl_bnn.run"] and environment.items() <= process.environ().items():
                return process
        raise AssertionError(f"no rank has {environment}; {self.log.read_text()}")

    def wait_for(self, condition, seconds=90):
        """Wait until something is so."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline and self.process.poll() is None:
            time.sleep(0.05)
        assert condition(), self.log.read_text()

    def wait(self, seconds):
        """The exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def test_a_stopped_rank_ends_a_horovodrun_within_the_bound(run_folder, horovodrun):
    run = Horovodrun(
        [horovodrun, "-np", "2", "--gloo"], run_folder, "--train.epochs", "5000", "--train.rank_timeout", "10"
    )
    run.wait_for(lambda: len(checkpoint.saved(run_folder / "out" / "checkpoints")) > 1)
    run.rank(HOROVOD_RANK="1").suspend()
    assert run.wait(60) == 1
    assert "error: another rank is gone" in run.log.read_text()


def test_an_elastic_training_outlives_a_killed_rank_and_takes_in_a_new_one(run_folder, horovodrun):
    # One machine under two names: Horovod gives up the host of a rank that died.
    hosts, discover = run_folder / "hosts", run_folder / "discover.sh"
    hosts.write_text("localhost:1\n127.0.0.1:1\n")
    discover.write_text(f"#!/bin/sh\ncat {hosts}\n")
    discover.chmod(0o755)
    launcher = [horovodrun, "-np", "2", "--min-np", "1", "--max-np", "2", "--host-discovery-script", str(discover)]
    run = Horovodrun(launcher, run_folder, "--elastic", "--train.epochs", "100")
    run.wait_for(lambda: len(checkpoint.saved(run_folder / "out" / "checkpoints")) > 3)
    run.rank(HOROVOD_HOSTNAME="127.0.0.1").kill()
    run.wait_for(lambda: "1 ranks instead of 2" in run.log.read_text())
    hosts.write_text("localhost:2\n")
    run.wait_for(lambda: "2 ranks instead of 1" in run.log.read_text())
    assert run.wait(120) == 0, run.log.read_text()
    assert "a rank is gone" in run.log.read_text()
    assert len(rows_of(run_folder / "out")) == 1 + 100
