"""Shared fixtures: a clean store, seed and threads for every test, the real digits, and a run on a few of them."""

import os
from pathlib import Path

# Workers side by side share the cores: threads of each would wait for the others'.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro
import pytest
import torch
from run_folders import DATA, few_digits

from ppl_bnn.data import Images, load, sources
from ppl_bnn.experiment import report
from ppl_bnn.results import netcdf
from ppl_bnn.run import main

# What a failed assert compared is shown for those of the helpers too.
pytest.register_assert_rewrite(
    "door_models",
    "examples_conformance",
    "likelihood_conformance",
    "own_models",
    "posterior_conformance",
    "ranks",
    "refusals",
    "small_posteriors",
    "small_ranks",
    "small_training",
)


def pytest_collection_modifyitems(items):
    """Slow tests first: quick ones then share out what time is left, and no worker waits for a slow one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _checksums_once():
    """The real data sets are read by hundreds of tests; a file that has not changed is hashed once."""
    check, known = sources._check_md5, set()

    def check_once(raw, expected, path):
        # What is downloaded has a name before it is a file.
        there = (path, path.stat().st_mtime_ns, expected) if Path(path).is_relative_to(DATA) else None
        if there not in known:
            check(raw, expected, path)
        if there:
            known.add(there)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_check_md5", check_once)
        yield


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    # A command's --threads is not for the tests after it.
    torch.set_num_threads(threads)


@pytest.fixture
def data_dir() -> Path:
    return DATA


@pytest.fixture(scope="session")
def mnist() -> tuple[Images, Images]:
    return load("mnist", DATA)


@pytest.fixture
def run_folder(tmp_path, data_dir):
    """A run of seconds on real MNIST."""
    return few_digits(tmp_path, data_dir)


@pytest.fixture
def call(run_folder, capsys):
    """Run the command line in this process: (exit code, the lines it wrote to standard error)."""

    def _call(*arguments, run=run_folder):
        capsys.readouterr()
        code = main([str(run), *map(str, arguments)])
        return code, capsys.readouterr().err.strip().splitlines()

    return _call


@pytest.fixture
def drawings(monkeypatch):
    """How often a report drew; what it draws are two small files that tell the number of draws.

    For tests of what a report is made of: the figures themselves take seconds to draw.
    """
    drawn = []

    def draw(run, rows, predictive, *_):
        drawn.append(netcdf.read_attrs(predictive)["num_samples"])
        paths = [run.out / "figures" / name for name in ("reliability.png", "gallery.html")]
        paths[0].parent.mkdir(exist_ok=True)
        for path in paths:
            path.write_text(f"{drawn[-1]} draws")
        return paths

    monkeypatch.setattr(report, "draw_all", draw)
    return drawn
