"""Columns of a data frame as numbers: imputed, one-hot, standardized, with statistics of the training rows alone."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ppl_bnn.data.settings import DataSettings
from ppl_bnn.errors import UserError, some

# A column of text with more categories than this, and more than this share of the rows, names rows rather than kinds.
_MANY_CATEGORIES, _SHARE_OF_ROWS = 50, 0.1
_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}[/.]\d{1,2}[/.]\d{2,4}")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Rows of one or two files as one data frame.

    Attributes:
        frame: all rows, and the columns that are used.
        train: numbers of the training rows, in their order, from 0.
        test: numbers of the test rows.
        known: numbers of the training rows that statistics are taken of.
        where: what a message calls the row of a number.
    """

    frame: pd.DataFrame
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    known: NDArray[np.int64]
    where: Callable[[int], str]


@dataclass(frozen=True)
class Encoded:
    """Columns as numbers.

    Attributes:
        x: float32 [N, D]: numbers standardized by the known rows, categories and booleans as 0 and 1.
        features: the name of each column of x: ``age``, ``port=Cherbourg``.
        columns: {column of the frame: its columns of x}.
        scales: {feature: mean and standard deviation by which it was standardized}; not of categories and booleans.
    """

    x: NDArray[np.float32]
    features: tuple[str, ...]
    columns: dict[str, tuple[int, ...]]
    scales: dict[str, tuple[float, float]]


def encode(rows: Rows, features: Sequence[str], settings: DataSettings) -> Encoded:
    """Encode the columns `features`.

    Raises:
        UserError: a column of dates, of other values than numbers, texts and booleans, or of texts that are hardly
            categories; missing or infinite values; a category that no known row has; no column that varies.
    """
    kinds = {name: _kind(rows, name, settings) for name in features}
    numbers = [name for name in features if kinds[name] != "categories"]
    standardized = [kinds[name] == "numbers" for name in numbers]
    parts, scales = _numbers(rows, numbers, standardized, settings) if numbers else ({}, {})
    columns: list[NDArray[np.float32]] = []
    names: list[str] = []
    places: dict[str, tuple[int, ...]] = {}
    constant = []
    for name in features:
        if kinds[name] == "categories":
            found = _one_hot(rows, name, settings)
        else:
            found = {} if (values := parts[name]) is None else {name: values}
        if not found:
            constant.append(name)
            continue
        places[name] = tuple(range(len(names), len(names) + len(found)))
        names += found
        columns += found.values()
    if constant:
        log.info("data: left out, the same in all training rows: %s", some(constant))
    if not columns:
        raise UserError(f"no column varies in the training rows: {some(features)} have one value each")
    return Encoded(np.column_stack(columns), tuple(names), places, scales)


def _kind(rows: Rows, name: str, settings: DataSettings) -> str:
    """``numbers``, ``booleans`` or ``categories``."""
    values = rows.frame[name]
    chosen = settings.categorical
    if chosen is not None and name in chosen:
        return "categories"
    if pd.api.types.is_bool_dtype(values):
        return "booleans"
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_complex_dtype(values):
        return "numbers"
    if set(map(type, values.dropna())) == {bool}:
        return "booleans"
    if _is_dates(values):
        raise UserError(
            f"column {name!r} has dates: leave it out by data.features, turn it into numbers, or name it in "
            "data.categorical"
        )
    texts = values.dropna()
    if not texts.map(lambda value: isinstance(value, str)).all():
        other = next(value for value in texts if not isinstance(value, str))
        if len(texts) and isinstance(other, str | bool | int | float):
            raise UserError(
                f"column {name!r} has texts and other values, such as {other!r:.40}: name it in data.categorical, or "
                "leave it out by data.features"
            )
        raise UserError(
            f"column {name!r} has values of the type {type(other).__name__}, which are no numbers or texts: leave it "
            "out by data.features"
        )
    if chosen is not None:
        raise UserError(f"column {name!r} has texts: name it in data.categorical too, or leave it out by data.features")
    _check_categories(rows, name, texts)
    return "categories"


def _is_dates(values: pd.Series) -> bool:
    if pd.api.types.is_datetime64_any_dtype(values) or pd.api.types.is_timedelta64_dtype(values):
        return True
    first = values.dropna().head(20)
    return len(first) > 0 and all(isinstance(value, str) and _DATE.match(value.strip()) for value in first)


def _check_categories(rows: Rows, name: str, texts: pd.Series) -> None:
    count = texts.nunique()
    many = count > max(_MANY_CATEGORIES, _SHARE_OF_ROWS * len(texts))
    share = pd.to_numeric(texts, errors="coerce").notna().mean()
    if 0.5 < share < 1:
        at = int(np.flatnonzero(rows.frame[name].notna() & pd.to_numeric(rows.frame[name], errors="coerce").isna())[0])
        text = rows.frame[name].iloc[at]
        found = f"column {name!r} is read as text because of {text!r:.40} in {rows.where(at)}"
        advice = f"correct it, or name it as missing in data.options {{na_values: [{text:.40}]}}"
        if many:
            raise UserError(f"{found}: {advice}")
        log.warning("data: %s, and its %d values are categories; if they are numbers, %s", found, count, advice)
    if not many:
        return
    raise UserError(
        f"column {name!r} has {count} different texts in {len(texts)} rows, which are hardly categories: leave it out "
        "by data.features, or name it in data.categorical"
    )


def _numbers(
    rows: Rows, names: list[str], standardized: list[bool], settings: DataSettings
) -> tuple[dict[str, NDArray[np.float32] | None], dict[str, tuple[float, float]]]:
    """{column: float32 [N], imputed and standardized, or None if constant in the known rows}, {column: its scale}."""
    values = rows.frame[names].to_numpy(dtype=np.float64, na_value=np.nan)
    if np.isinf(values).any():
        at, column = (int(place) for place in np.argwhere(np.isinf(values))[0])
        raise UserError(f"column {names[column]!r} is infinite in {rows.where(at)}: correct it or leave it out")
    if (lost := np.isnan(values)).any():
        _refuse_missing(rows, names, lost, settings)
        known = values[rows.known]
        if (empty := np.isnan(known).all(0)).any():
            raise UserError(
                f"column {names[int(empty.argmax())]!r} has no value in training rows: leave it out by data.features"
            )
        average = np.nanmedian if settings.missing == "median" else np.nanmean
        values = np.where(lost, average(known, axis=0), values)
    known = values[rows.known]
    loc, scale = known.mean(0), known.std(0)
    scaled = ((values - loc) / np.where(scale > 0, scale, 1)).astype(np.float32)
    found = {
        name: None if np.ptp(known[:, at]) == 0 else (scaled[:, at] if own else values[:, at].astype(np.float32))
        for at, (name, own) in enumerate(zip(names, standardized, strict=True))
    }
    scales = {
        name: (float(loc[at]), float(scale[at]))
        for at, (name, own) in enumerate(zip(names, standardized, strict=True))
        if own and found[name] is not None
    }
    return found, scales


def _one_hot(rows: Rows, name: str, settings: DataSettings) -> dict[str, NDArray[np.float32]]:
    """A column of 0 and 1 for each category of the known rows; none if there is one category alone."""
    texts = category_names(rows.frame[name])
    if (lost := np.array([text is None for text in texts])).any():
        _refuse_missing(rows, [name], lost[:, None], settings)
        present = [texts[at] for at in rows.known if texts[at] is not None]
        if not present:
            raise UserError(f"column {name!r} has no value in training rows: leave it out by data.features")
        found, counts = np.unique(np.array(present), return_counts=True)
        texts[lost] = str(found[counts.argmax()])
    categories = sorted(set(texts[rows.known]), key=_order)
    codes = pd.Index(categories, dtype=object).get_indexer(texts)
    if (codes < 0).any() and settings.unknown_categories == "refuse":
        at = int((codes < 0).argmax())
        raise UserError(
            f"column {name!r} is {texts[at]!r:.60} in {rows.where(at)}, and in no training row: "
            "set data.unknown_categories to ignore, or leave the column out by data.features"
        )
    if len(categories) == 1:
        return {}
    return {f"{name}={category}": (codes == code).astype(np.float32) for code, category in enumerate(categories)}


def category_names(values: pd.Series) -> NDArray[Any]:
    """Values as texts, or None where they are missing, [N]; whole floats as whole numbers."""
    names = [
        None if lost else str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        for value, lost in zip(values.tolist(), values.isna(), strict=True)
    ]
    found = np.empty(len(names), object)
    found[:] = names
    return found


def _order(category: str) -> tuple[float, str]:
    # Numbers by their value, before texts.
    try:
        return float(category), ""
    except ValueError:
        return float("inf"), category


def _refuse_missing(rows: Rows, names: Sequence[str], lost: NDArray[np.bool_], settings: DataSettings) -> None:
    if settings.missing != "refuse":
        return
    at = int(lost.any(0).argmax())
    raise UserError(
        f"column {names[at]!r} has {int(lost[:, at].sum())} missing values, the first in "
        f"{rows.where(int(lost[:, at].argmax()))}: choose data.missing mean, median or drop, or leave the column out "
        "by data.features"
    )
