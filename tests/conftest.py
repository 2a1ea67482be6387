"""Shared fixtures: a clean parameter store and seed for every test, and the real digits."""

import os
from pathlib import Path

# Workers side by side share the cores: threads of each would wait for the others'.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro
import pytest
import torch

from ppl_bnn.data import Images, load

DATA = Path(os.environ.get("PPL_BNN_DATA", Path(__file__).parent.parent / "data"))


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
