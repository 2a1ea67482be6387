"""Shared fixtures: a clean parameter store and seed for every test, the real digits, and a run on a few of them."""

import os
from pathlib import Path

# Workers side by side share the cores: threads of each would wait for the others'.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro
import pytest
import torch
from run_folders import written

from ppl_bnn.data import Images, load
from ppl_bnn.run import main

DATA = Path(os.environ.get("PPL_BNN_DATA", Path(__file__).parent.parent / "data"))

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


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    torch.manual_seed(0)


@pytest.fixture
def data_dir() -> Path:
    return DATA


@pytest.fixture(scope="session")
def mnist() -> tuple[Images, Images]:
    return load("mnist", DATA)


@pytest.fixture
def run_folder(tmp_path, data_dir):
    """A run of seconds on real MNIST: 600 training and 200 test digits."""
    config = {
        "data": {"dir": str(data_dir), "num_train": 600, "num_test": 200},
        "model": {"prior": "normal(0, 0.1)"},
        "train": {"epochs": 2, "optimizer": "adam", "estimator": "local", "kl_weight": 0.1},
        "predict": {"num_samples": 5},
        "pruning": {"num_samples": 3, "threshold": [0.5, 10.0], "fractions": [0.0, 0.5, 0.9]},
    }
    return written(tmp_path / "tiny", config)


@pytest.fixture
def call(run_folder, capsys):
    """Run the command line in this process: (exit code, the lines it wrote to standard error)."""

    def _call(*arguments, run=run_folder):
        capsys.readouterr()
        code = main([str(run), *map(str, arguments)])
        return code, capsys.readouterr().err.strip().splitlines()

    return _call
