"""The table of coverage: every kind of network, and what works with it."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from coverage_columns import COLUMNS, Network
from coverage_networks import ROWS
from torch import nn
from torchvision import models

from ppl_bnn import bayesian
from ppl_bnn.errors import UserError

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # A reentrant checkpoint warns of inputs without gradients wherever it runs without, as in prediction.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(row, id=f"{row.group}: {row.name}", marks=[pytest.mark.slow, pytest.mark.large] * row.slow)
        for row in ROWS
    ],
)
def network(request):
    if request.param.needs is not None:
        pytest.importorskip(request.param.needs)
    return Network(request.param)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_network(network, column):
    message = network.row.refused.get(column)
    if message is None:
        COLUMNS[column](network)
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            COLUMNS[column](network)


def compiled():
    return torch.compile(nn.Sequential(nn.Linear(4, 3)), backend="eager")


def complex_parameter():
    return nn.ParameterDict({"weight": nn.Parameter(torch.zeros(4, 3, dtype=torch.cfloat))})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (compiled, "'the network' is compiled (OptimizedModule)"),
        (lambda: nn.Sequential(nn.Linear(4, 3), compiled()), "'1' is compiled (OptimizedModule)"),
        (complex_parameter, "parameter 'weight' is torch.complex64"),
        (lambda: nn.Embedding(7, 4, sparse=True), "Embedding has sparse gradients, and a draw of 'weight' none"),
        (lambda: nn.LazyLinear(3), "parameter 'weight' has no shape yet"),
        (
            lambda: nn.Linear(4, 3).requires_grad_(False),
            "Linear has no parameter to make random, for all of it is frozen",
        ),
    ],
)
def test_a_network_that_cannot_be_converted_is_refused_by_name(build, message):
    with pytest.raises(UserError, match=re.escape(message)):
        bayesian(build())


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "tools" / "coverage_table.py"))["table"](ROWS) in page


def test_every_family_of_torchvisions_classification_networks_has_a_row():
    rows = set()
    for row in ROWS:
        if row.group == "torchvision":
            # What is slow to fill with numbers has none.
            with torch.device("meta" if row.slow else "cpu"):
                rows.add(type(row.build()).__module__)
    families = {models.get_model_builder(name).__module__ for name in models.list_models(module=models)}
    assert rows == families
