"""Where jobs run: through submitit, Slurm's commands, Dask and threads."""

import concurrent.futures
import json
import os
import sys

import pytest
from run_folders import quick

from ppl_bnn.errors import UserError
from ppl_bnn.experiment.executors import opened_executor
from ppl_bnn.experiment.job_plan import Job
from ppl_bnn.experiment.jobs import _Jobs, main
from ppl_bnn.results import idata


@pytest.fixture
def run_folder(tmp_path, data_dir):
    return quick(tmp_path, data_dir)


@pytest.fixture
def two_chains(run_folder):
    """Run two trainings and their predictions with some options; check that they are merged."""

    def run(*options):
        command = [str(run_folder), "--vary", "train.seed=0,1", "--stages", "train,predict", *options]
        assert main(command) == 0
        merged = idata.load(run_folder / "out" / "merged" / "predictive.nc")
        assert merged["posterior_predictive"]["probs"].sizes["chain"] == 2
        assert not list((run_folder / "out").glob(".stop-*"))
        return command

    return run


def test_submitits_local_executor_runs_the_jobs_and_finds_them_done(two_chains, run_folder, capsys):
    pytest.importorskip("submitit")
    command = two_chains("--executor", "submitit-local", "--workers", "2")
    written = [path.stat().st_mtime_ns for path in run_folder.glob("out/jobs/*/predictive.nc")]
    assert len(written) == 2
    capsys.readouterr()
    assert main(command) == 0
    assert "train.seed=0, train: done" in capsys.readouterr().err
    assert [path.stat().st_mtime_ns for path in run_folder.glob("out/jobs/*/predictive.nc")] == written
    # Each has half of the cores.
    used = json.loads((run_folder / "out" / "jobs" / "train.seed=0" / "performance.json").read_text())["threads"]
    assert used == max(1, len(os.sched_getaffinity(0)) // 2)


# Dask closes its sockets after its event loop.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_executor_of_ones_own_dasks_client_is_named_by_its_import_path(two_chains, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    (tmp_path / "dask_cluster.py").write_text(
        "from distributed import Client\n"
        "def make():\n    return Client(n_workers=2, threads_per_worker=1, dashboard_address=None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    two_chains("--executor", "dask_cluster:make")


SBATCH = """
#!{python}
# A cluster of this host alone: runs an array's tasks at once, as the script says, each with Slurm's variables.
import os, re, subprocess, sys
script = open(sys.argv[1]).read()
with open({log!r}, "a+") as log:
    log.write(script)
    log.seek(0)
    number = str(log.read().count("# command"))
tasks = re.search(r"--array=0-(\\d+)", script)
names = [str(n) for n in range(int(tasks[1]) + 1)] if tasks else [None]
for name in names:
    task = {{}} if name is None else {{"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": name}}
    known = {{"SLURM_JOB_ID": number, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0",
             "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "here"}}
    subprocess.Popen(["bash", sys.argv[1]], env={{**os.environ, **known, **task}}, start_new_session=True,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
print("Submitted batch job " + number)
"""
SRUN = """
#!{python}
import os, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words = words[1:] if words[0] == "--unbuffered" else words[2:]
os.execvp(words[0], words)
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands of Slurm that run jobs on this host; returns the file of all scripts that were submitted."""
    folder, log = tmp_path / "bin", tmp_path / "submitted"
    folder.mkdir()
    texts = {"sbatch": SBATCH, "srun": SRUN, "sacct": "#!/bin/sh\necho 'JobID|State|NodeList'\n"}
    for name, text in texts.items():
        (folder / name).write_text(text.lstrip().format(python=sys.executable, log=str(log)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return log


@pytest.mark.slow
def test_slurm_gets_one_array_of_the_trainings_and_one_of_what_follows(two_chains, slurm):
    pytest.importorskip("submitit")
    two_chains("--executor", "slurm", "--slurm.partition", "gpu", "--slurm.time=60", "--slurm.cpus_per_task", "2",
               "--workers", "2")  # fmt: skip
    text = slurm.read_text()
    assert text.count("#SBATCH --array=0-1%2") == 2
    for option in ("partition=gpu", "time=60", "cpus-per-task=2", "job-name=ppl_bnn"):
        assert f"#SBATCH --{option}\n" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--executor", "slum"], "--executor must be one of local, slurm, submitit-local; got 'slum'"),
        (["--executor", "no_such_module:make"], "--executor must be importable, got 'no_such_module:make'"),
        (["--executor", "builtins:dict"], "must return an object with submit(function, *arguments)"),
        (["--slurm.time", "60"], "--slurm.time is for --executor slurm, got --executor local: leave it out"),
        (["--executor", "slurm", "--slurm.time"], "--slurm.NAME VALUE, got --slurm.time without a value"),
        (["--executor", "slurm"], "needs --slurm.time, the minutes of a job, got None"),
        (["--executor", "slurm", "--slurm.time", "1:00:00"], "needs --slurm.time, the minutes of a job, got '1:00:00'"),
        (["--executor", "slurm", "--slurm.time", "9", "--slurm.cpus", "2"], "--slurm.cpus is unknown to submitit"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_an_executor_that_cannot_be_is_one_clear_line(run_folder, options, message, slurm, capsys):
    pytest.importorskip("submitit")
    assert main([str(run_folder), "--vary", "train.seed=0", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (run_folder / "out" / "jobs").exists()


def test_what_is_not_installed_is_named(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main([str(run_folder), "--vary", "train.seed=0", "--executor", "submitit-local"]) == 2
    assert "needs submitit: pip install 'ppl_bnn[jobs]'" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(UserError, match="needs Slurm's commands on this host, and sbatch is not there"),
        opened_executor("slurm", workers=None, options={"time": 5}, folder=tmp_path),
    ):
        pass


class _Losing:
    """An executor whose jobs are lost, but the first."""

    def __init__(self):
        self.count = 0

    def submit(self, function, *arguments):
        future = concurrent.futures.Future()
        self.count += 1
        if self.count == 1:
            future.set_result((0, "fine"))
        else:
            future.set_exception(RuntimeError("Traceback:\n  ...\nthe host is gone"))
        return future


def test_a_job_that_its_executor_loses_fails_and_the_others_count(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "losing", type("losing", (), {"make": _Losing}))
    caplog.set_level("INFO")
    with (
        opened_executor("losing:make", workers=None, options={}, folder=tmp_path) as engine,
        _Jobs(engine, ["runs/x"], tmp_path) as jobs,
    ):
        done = jobs.run([Job(tmp_path / str(number), ["train"], {}) for number in (0, 1)])
        assert done == {tmp_path / "0"}
        assert jobs.exit_code() == 1
    assert "failed with exit code 1: RuntimeError: the host is gone" in caplog.text


def test_submitit_runs_a_preempted_job_again(tmp_path):
    utils = pytest.importorskip("submitit.core.utils")
    from ppl_bnn.experiment.job_process import run_job

    arguments = (["runs/x"], "log", "stop", ".", 1)
    again = utils.DelayedSubmission(run_job, *arguments)._checkpoint_function()
    assert (again.function, again.args) == (run_job, arguments)
