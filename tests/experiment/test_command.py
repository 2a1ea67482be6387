"""The boundary of all commands: one line an error, an exit code, and a host program's log left alone."""

import io
import logging
import subprocess
import sys

import pytest
import torch

from ppl_bnn import export, import_posterior
from ppl_bnn.distributed import RankLost
from ppl_bnn.errors import Diverged, Interrupted, UserError
from ppl_bnn.experiment import jobs, stage_check, stages
from ppl_bnn.experiment.command import guarded
from ppl_bnn.scaling import __main__ as scaling


def failing(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("lr must be\npositive"), 2, "error: lr must be positive"),
        (Diverged("at step 3"), 1, "error: at step 3"),
        (RankLost("closed"), 1, "error: another rank is gone (closed); run the same command again to resume from the"),
        (OSError(28, "No space left", "a.nc"), 1, "error: a.nc: No space left; existing results are intact"),
        (MemoryError("8 GB"), 1, "error: out of memory: ask for fewer draws"),
        (RuntimeError("[enforce fail] can't allocate memory"), 1, "error: out of memory"),
        (ValueError("bad shape"), 1, "error: ValueError: bad shape (an error of ppl_bnn's own; --debug shows where)"),
        (Interrupted("stopped at step 3"), 75, "stopped at step 3; run the same command again to resume"),
        (KeyboardInterrupt(), 75, "stopped at once; run the same command again to resume"),
    ],
)
def test_every_error_is_one_line_and_an_exit_code(capsys, error, code, line):
    assert guarded(failing(error)) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(line)


def test_debug_shows_where(capsys):
    assert guarded(failing(ValueError("bad shape")), debug=True) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "in run" in err
    assert guarded(lambda: None) == 0
    assert guarded(lambda: 75) == 75


@pytest.mark.parametrize("main", [export.main, import_posterior.main, jobs.main, scaling.main])
def test_bad_commands_are_one_line_everywhere(main, capsys):
    for arguments in (["runs/none", "--workers", "many", "--steps", "many", "--draws", "many", "--run", "none"], []):
        assert main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")


def test_a_host_programs_log_stays_as_it_is(capsys):
    root, package, stream = logging.getLogger(), logging.getLogger("ppl_bnn"), io.StringIO()
    own = logging.StreamHandler(stream)
    root.addHandler(own)
    before = [*root.handlers], root.level, [*package.handlers], package.level
    try:
        assert guarded(failing(UserError("no"))) == 2
        assert ([*root.handlers], root.level, [*package.handlers], package.level) == before
    finally:
        root.removeHandler(own)
    assert stream.getvalue() == "error: no\n"
    assert capsys.readouterr().err == "error: no\n"


def test_a_host_program_that_logs_to_standard_error_does_not_see_a_line_twice(capsys):
    own = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(own)
    try:
        guarded(failing(UserError("no")))
    finally:
        logging.getLogger().removeHandler(own)
    assert capsys.readouterr().err == "error: no\n"


def test_the_stages_are_those_that_are_named_and_the_old_name_is_known():
    # The summary is made of the settings alone, before a run is set up.
    assert ("summary", *stages.STAGES) == stage_check.STAGES
    assert stage_check.stage_names("train, posterior") == ["train", "diagnose"]


def test_help_does_without_stages_results_and_figures():
    # What `import ppl_bnn` itself brings along does not count.
    code = (
        "import sys, importlib; import ppl_bnn; before = set(sys.modules)\n"
        "for name in ('run', 'export', 'import_posterior', 'experiment.jobs', 'scaling.__main__'):\n"
        "    try: importlib.import_module(f'ppl_bnn.{name}').main(['--help'])\n"
        "    except SystemExit as end: assert end.code == 0, name\n"
        "    new = set(sys.modules) - before\n"
        "    found = {module for module in new if module.split('.')[0] in ('arviz', 'matplotlib', 'xarray')}\n"
        "    found |= new & {'ppl_bnn.experiment.stages', 'ppl_bnn.results.netcdf', 'ppl_bnn.results.idata'}\n"
        "    assert not found, (name, found)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_memory_that_torch_cannot_have_is_told(capsys):
    assert guarded(lambda: torch.empty(2**60).sum() and None) == 1
    assert "out of memory" in capsys.readouterr().err
