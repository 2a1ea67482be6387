"""The table of the least certain examples, from a result alone."""

import csv
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from pyro.distributions import Normal as Prior
from torch import nn

from ppl_bnn import MeanFieldNormal, Model, bayesian, predict, to_inference_data
from ppl_bnn.models.likelihoods import Bernoulli, Normal
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.least_certain import write_least_certain

pytestmark = pytest.mark.any_python


class Cells(HTMLParser):
    """The cells of a page's table, row by row."""

    def __init__(self, page):
        super().__init__()
        self.rows = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if self.rows and data.strip() and self.get_starttag_text().startswith(("<td", "<button")):
            self.rows[-1].append(data)


def written(folder, likelihood, outputs, y, **options):
    """The table of 30 examples under a linear network, and their predictive."""
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    model = Model(bayesian(nn.Sequential(nn.Linear(2, outputs)), prior=Prior(0.0, 0.5)), likelihood, 30)
    guide = MeanFieldNormal(model, x[:1], y(x)[:1], init_scale=0.3)
    found = predict(model, guide, x, y(x), num_samples=8, progress=False)
    netcdf.save(to_inference_data(found, x=x, attrs={"title": "<Rows>", "run": "a & b"}), folder / "predictive.nc")
    paths = write_least_certain(folder / "predictive.nc", folder, **options)
    assert [path.name for path in paths] == ["least_certain.html", "least_certain.csv"]
    page, table = (path.read_text() for path in paths)
    assert "a &amp; b: &lt;Rows&gt;" in page
    return found, page, list(csv.reader(table.splitlines()))


def test_numbers_are_in_their_own_units_and_ranked_by_their_variance(tmp_path):
    found, page, (head, *rows) = written(
        tmp_path, Normal(0.5), 1, lambda x: x[:, 0], scale=(100.0, 20.0), word="rows", most=12,
        columns=lambda at: {"total": (2 * at).tolist(), "name": [f"<{place}>" for place in at]},
    )  # fmt: skip
    assert head == [
        "#", "total", "name", "observed", "predicted", "std", "total (predictive)", "aleatoric", "epistemic"
    ]  # fmt: skip
    order = found.std.argsort(descending=True)[:12].tolist()
    assert [int(row[0]) for row in rows] == order
    for row, at in zip(rows, order, strict=True):
        assert row[1:3] == [str(2 * at), f"<{at}>"]
        expected = [100 + 20 * found.y[at], 100 + 20 * found.mean[at], 20 * found.std[at], (20 * found.std[at]) ** 2]
        assert [float(value) for value in row[3:7]] == pytest.approx([float(one) for one in expected], rel=1e-5)
        assert float(row[7]) + float(row[8]) == pytest.approx(float(row[6]), rel=1e-5)
    assert "12 of 30 test rows" in page
    assert "variance of y" in page
    cells = Cells(page).rows
    assert cells[0] == head
    assert [row[0] for row in cells[1:]] == [row[0] for row in rows]


def test_labels_of_yes_or_no_have_a_probability_and_wrong_answers_are_marked(tmp_path):
    found, page, (head, *rows) = written(tmp_path, Bernoulli(), 1, lambda x: (x[:, 0] > 0).float())
    assert head == ["#", "observed", "probability of 1", "total", "aleatoric", "epistemic"]
    wrong = (found.mean > 0.5) != found.y.bool()
    assert page.count("<tr class=wrong>") == int(wrong.sum()) > 0
    assert {row[1] for row in rows} == {"0", "1"}


def test_several_numbers_an_example_have_their_uncertainties_alone(tmp_path):
    found, _, (head, *rows) = written(tmp_path, Normal(0.5), 3, lambda x: torch.stack([x[:, 0]] * 3, 1))
    assert head == ["#", "total", "aleatoric", "epistemic"]
    total = found.uncertainties()[0].mean(1)
    assert [float(row[1]) for row in rows] == pytest.approx(total.sort(descending=True).values.tolist(), rel=1e-5)


def test_a_wide_table_has_all_its_columns_in_the_csv_alone(tmp_path):
    def columns(at):
        return {f"c{number}": np.zeros(len(at)).tolist() for number in range(60)}

    _, page, (head, *_) = written(tmp_path, Normal(0.5), 1, lambda x: x[:, 0], columns=columns)
    assert {f"c{number}" for number in range(60)} <= set(head)
    shown = Cells(page).rows[0]
    assert "c39" in shown
    assert "c40" not in shown
    assert "20 more columns are in least_certain.csv." in page
