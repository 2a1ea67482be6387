"""Launched trainings that end early: what stopped or killed them is told apart from what failed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ppl_bnn.errors import Interrupted, UserError
from ppl_bnn.scaling.launch import PointFailed, checked_launcher, launch, reason

CHILD = """
import os, signal, sys, time
def told(number, frame):
    with open({signals!r}, "a") as file:
        file.write(signal.Signals(number).name + "\\n")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, told)
open({signals!r}, "w").close()
while not os.path.getsize({signals!r}):
    time.sleep(0.02)
time.sleep(1)
open({signals!r}, "a").write("checkpoint\\n")
sys.exit(75)
"""
# A shell's background job ignores SIGINT, and so would the parent that it starts.
PARENT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from ppl_bnn.errors import Interrupted
from ppl_bnn.scaling.launch import launch
try:
    launch(["-c", sys.argv[1]], Path(sys.argv[2]), ranks=1, launcher="torch", environment=dict(os.environ))
except Interrupted:
    sys.exit(75)
"""


def launched(tmp_path, code, *, ranks=1, launcher="torch"):
    launch(["-c", code], tmp_path / "output", ranks=ranks, launcher=launcher, environment=dict(os.environ))


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_reaches_the_ranks_as_one_sigterm_and_they_save_a_checkpoint(tmp_path, times):
    """A terminal sends SIGINT to its whole process group. The second may come from a parent that passes it on."""
    signals = tmp_path / "signals"
    command = [sys.executable, "-c", PARENT, CHILD.format(signals=str(signals)), str(tmp_path / "output")]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 60
    while not signals.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
    assert process.wait(60) == 75
    assert signals.read_text().split() == ["SIGTERM", "checkpoint"]


def test_ranks_that_were_stopped_are_no_failure(tmp_path):
    with pytest.raises(Interrupted, match="the ranks were stopped"):
        launched(tmp_path, "raise SystemExit(75)")
    # torchrun and horovodrun end with a code of their own, and list those of the ranks.
    script = tmp_path / "launcher"
    for listed in ("  exitcode  : {} (pid: 7)", "Exit code: {}"):
        script.write_text(f"print('rank: 0\\n{listed.format(75)}')\nraise SystemExit(1)")
        with pytest.raises(Interrupted):
            launched(tmp_path, "", ranks=2, launcher=f"{sys.executable} {script} {{ranks}}")
        script.write_text(f"print('error: no data\\n{listed.format(75)}\\n{listed.format(2)}')\nraise SystemExit(1)")
        with pytest.raises(PointFailed, match=r"^no data$"):
            launched(tmp_path, "", ranks=2, launcher=f"{sys.executable} {script} {{ranks}}")


@pytest.mark.slow
def test_torchrun_tells_that_its_ranks_were_stopped(tmp_path):
    # The second rank is then terminated.
    script = tmp_path / "rank.py"
    script.write_text("import os, time\ntime.sleep(60 * int(os.environ['RANK']))\nraise SystemExit(75)")
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {{ranks}} {script}"
    with pytest.raises(Interrupted, match="the ranks were stopped"):
        launched(tmp_path, "", ranks=2, launcher=launcher)


def test_the_signal_that_killed_a_rank_is_named(tmp_path):
    killed = "killed by SIGKILL, often for want of memory"
    with pytest.raises(PointFailed, match=rf"^{killed}$"):
        launched(tmp_path, "import os; print('step 3: standard error 0.01', flush=True); os.kill(os.getpid(), 9)")
    # Of several ranks, the others only miss it.
    assert reason("step 3\nerror: another rank is gone (nothing for 5 s)", {1, -9}) == killed
    assert reason("step 3", {137}) == killed
    assert reason("error: no data\nstep 3", {-15}) == "no data"
    assert reason("step 3: standard error 0.01\n[rank1]: ValueError: bad weights\nstep 4", {1}) == (
        "ValueError: bad weights"
    )


@pytest.mark.parametrize("launcher", ["srun -n 4 python", "mpirun python", "python", ""])
def test_a_launcher_that_is_not_told_the_number_of_ranks_is_refused(launcher):
    with pytest.raises(UserError, match=r"--launcher must be .* a command with \{ranks\} in it; got"):
        checked_launcher(launcher)
    assert checked_launcher("srun -n {ranks} python") == "srun -n {ranks} python"
