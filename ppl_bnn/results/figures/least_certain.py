"""The least certain examples as a table: `least_certain.html`, which loads nothing, and `least_certain.csv`."""

import csv
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ppl_bnn.files import write_text
from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.layout import Groups

# Columns of the data that the page has.
_SHOWN = 40

Columns = Mapping[str, Sequence[object]]
_PAGE = (Path(__file__).parent / "least_certain.html").read_text(encoding="utf-8")


def write_least_certain(
    predictive: Path,
    folder: Path,
    *,
    columns: Callable[[np.ndarray], Columns] | None = None,
    scale: tuple[float, float] | None = None,
    word: str = "examples",
    most: int = 300,
) -> list[Path]:
    """Write the examples of a ``predictive.nc`` with the most total uncertainty, the most first, as HTML and CSV.

    A row has the example's number, its columns, what was observed and predicted, and the three uncertainties: nats of
    classes, variances of numbers. An example with several labels or numbers has the mean of their uncertainties.

    Args:
        columns: gives the input columns of the examples at some positions [M], {name: M values}.
        scale: mean and standard deviation by which numeric targets were standardized: the table is in their own units.
        word: for the examples.
        most: number of rows at most.

    Raises:
        FileError: the result cannot be read.
        OSError: a file cannot be written.
    """
    idata = inference_data.load(predictive)
    groups = netcdf.groups_of(idata)
    total = _by_example(groups, "total")
    at = np.argsort(-total, kind="stable")[:most]
    inputs = columns(at) if columns is not None else {}
    found: dict[str, Sequence[object]] = {"#": at.tolist(), **inputs}
    answers, wrong = said(groups, at, scale)
    variance = scale[1] ** 2 if scale is not None and "mean" in groups["uncertainty"] else 1.0
    answers |= {
        name: (variance * _by_example(groups, name)[at]).tolist() for name in ("total", "aleatoric", "epistemic")
    }
    # A column of the data may have such a name.
    found |= {f"{name} (predictive)" if name in found else name: values for name, values in answers.items()}
    title, run = str(idata.attrs["title"]), str(idata.attrs.get("run", ""))
    text = io.StringIO()
    rows = ([_exact(value) for value in row] for row in zip(*found.values(), strict=True))
    csv.writer(text, lineterminator="\n").writerows([[*found], *rows])
    left_out = list(inputs)[_SHOWN:]
    shown = {name: values for name, values in found.items() if name not in left_out}
    content = {
        "TITLE": html.escape(f"{run}: {title}" if run else title),
        "COUNT": f"{len(at):,} of {len(total):,} test {word}",
        "UNITS": html.escape(str(idata.attrs.get("units", "nats"))),
        "MORE": f"{len(left_out)} more columns are in least_certain.csv." if left_out else "",
        "HEAD": "".join(f"<th><button>{html.escape(name)}</button></th>" for name in shown),
        "ROWS": "\n".join(_row(row, bad) for *row, bad in zip(*shown.values(), wrong, strict=True)),
    }
    page = _PAGE
    for name, value in content.items():
        page = page.replace(f"<!--{name}-->", value)
    paths = [folder / "least_certain.html", folder / "least_certain.csv"]
    for path, written in zip(paths, (page, text.getvalue()), strict=True):
        write_text(path, written)
    return paths


def said(
    groups: Groups, at: np.ndarray, scale: tuple[float, float] | None = None
) -> tuple[dict[str, Sequence[object]], list[bool]]:
    """What was observed and predicted of the examples at some positions [M], and whether the answer is wrong.

    The columns are observed and predicted (numbers: their mean, and std; in the units before `scale`), or probability
    of 1; none of several labels or numbers an example.
    """
    about, y = groups["uncertainty"], groups["observed_data"]["y"].values[at]
    right = [False] * len(at)
    if y.ndim > 1:
        return {}, right
    if "mean" in about:
        mean, std = scale or (0.0, 1.0)
        columns: dict[str, Sequence[object]] = {
            "observed": (y if scale is None else y * std + mean).tolist(),
            "predicted": (about["mean"].values[at] * std + mean).tolist(),
            "std": (about["std"].values[at] * std).tolist(),
        }
        return columns, right
    probs = about["mean_probs"].values[at]
    if probs.ndim == 1:
        return {"observed": y.astype(int).tolist(), "probability of 1": probs.tolist()}, ((probs > 0.5) != y).tolist()
    classes, choice = [str(name) for name in groups["posterior_predictive"]["class"].values], probs.argmax(1)
    columns = {
        "observed": [classes[label] for label in y],
        "predicted": [classes[label] for label in choice],
        "probability": probs.max(1).tolist(),
    }
    return columns, (choice != y).tolist()


def _by_example(groups: Groups, name: str) -> np.ndarray:
    values = groups["uncertainty"][name].values.astype(float)
    return values.reshape(len(values), -1).mean(1)


def _row(row: Sequence[object], wrong: bool) -> str:
    return f"<tr{' class=wrong' * wrong}>{''.join(_cell(value) for value in row)}</tr>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f'<td data-value="{value!r}">{value:.4g}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def _exact(value: object) -> object:
    return f"{value:.9g}" if isinstance(value, float) else value
