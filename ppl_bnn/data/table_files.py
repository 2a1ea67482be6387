"""Tables of the user's own, of CSV and Parquet files: which columns and rows are used, and for what."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ppl_bnn.data.encoding import Rows, encode
from ppl_bnn.data.frames import missing_column, read_frame
from ppl_bnn.data.parts import split_rows
from ppl_bnn.data.settings import DataSettings, Request, title_of
from ppl_bnn.data.tables import Table
from ppl_bnn.data.targets import Targets, check_classes, read_targets
from ppl_bnn.errors import UserError, some

log = logging.getLogger(__name__)


def read_table(asked: Request) -> tuple[Table, Table]:
    """Return (train, test) of a CSV or Parquet file, or of two.

    Numbers are standardized by the training rows, texts are one-hot columns, and columns that do not vary in the
    training rows are left out. Without a test file, a share of the rows is the test set, by a fixed permutation.

    Raises:
        UserError: files, columns or values that cannot be used.
    """
    settings = asked.settings
    frame = read_frame(asked.file, settings.name, settings.options, setting="data.file")
    test = None
    if settings.test_file is not None:
        test = read_frame(Path(settings.test_file), settings.name, settings.options, setting="data.test_file")
    target, features = _columns(frame, settings)
    if test is not None:
        _check_columns(test, [target, *features], "data.test_file")
    return tables_of(frame, test, target, features, asked)


def read_more(asked: Request, file: Path) -> Table:
    """The rows of another file, encoded as the test rows of a data set: with statistics of its training rows.

    Its target is not read, and a category that no training row has is 0 in all its columns.

    Raises:
        UserError: files, columns or values that cannot be used.
    """
    settings = replace(asked.settings, unknown_categories="ignore")
    frame = read_frame(asked.file, settings.name, settings.options, setting="data.file")
    more = read_frame(file, settings.name, settings.options, setting="shift.ood")
    target, features = _columns(frame, settings)
    _check_columns(more, features, "shift.ood")
    # Any value of the target's kind.
    more = more.assign(**{target: frame[target].dropna().iloc[0]})
    divided = settings.test_file is None
    asked = replace(asked, settings=settings)
    _, found = tables_of(frame, more, target, features, asked, divided=divided)
    return replace(found, title=title_of(file))


def tables_of(
    frame: pd.DataFrame,
    test: pd.DataFrame | None,
    target: str,
    features: list[str],
    asked: Request,
    *,
    divided: bool = False,
) -> tuple[Table, Table]:
    """Return (train, test) of some columns of one data frame, or of two.

    Args:
        divided: train on a share of the first frame's rows although there is a second frame.
    """
    rows = _rows(frame, test, [*features, target], asked, divided or test is None)
    read = _target(rows, target, asked)
    if test is not None:
        check_classes(read, rows.train, rows.test, rows.where)
    found = encode(rows, features, asked.settings)
    x = torch.from_numpy(found.x)
    both = (
        Table(
            x[at],
            read.y[at],
            features=found.features,
            target=read.name,
            title=asked.title,
            split=split,
            classes=read.classes,
            columns=found.columns,
            target_scale=read.scale,
            feature_scale=found.scales,
        )
        for at, split in ((torch.from_numpy(rows.train), "train"), (torch.from_numpy(rows.test), "test"))
    )
    return next(both), next(both)


def _columns(frame: pd.DataFrame, settings: DataSettings) -> tuple[str, list[str]]:
    """The target and the features, all of which are columns of the frame."""
    if settings.target is None:
        raise UserError(f"data.target must name the column to predict: one of {some(frame.columns, 12)}")
    if settings.target not in frame:
        raise missing_column(settings.target, frame.columns, setting="data.target")
    for setting, chosen in (("data.features", settings.features), ("data.categorical", settings.categorical)):
        for name in chosen or []:
            if name not in frame:
                raise missing_column(name, frame.columns, setting=setting)
    if settings.features is None:
        numbered = [name for name in frame.columns[:1] if name.startswith("Unnamed: ") and _counts_rows(frame[name])]
        if numbered:
            log.info("data: left out, the numbers of the rows: column %r", numbered[0])
        features = [name for name in frame.columns if name not in (settings.target, *numbered)]
    else:
        features = list(dict.fromkeys(settings.features))
    if settings.target in features:
        raise UserError(f"data.features has the target {settings.target!r} itself: leave it out")
    if not features:
        raise UserError(f"there is no column to predict {settings.target!r} from: name some by data.features")
    if unused := [name for name in settings.categorical or [] if name not in features]:
        raise UserError(f"data.categorical has {unused[0]!r}, which is not among the features: leave it out")
    return settings.target, features


def _counts_rows(values: pd.Series) -> bool:
    return pd.api.types.is_integer_dtype(values) and bool((values.diff().iloc[1:] == 1).all())


def _check_columns(frame: pd.DataFrame, used: list[str], setting: str) -> None:
    if absent := [name for name in used if name not in frame]:
        raise missing_column(absent[0], frame.columns, setting=f"{setting} needs")


def _rows(frame: pd.DataFrame, test: pd.DataFrame | None, used: list[str], asked: Request, divided: bool) -> Rows:
    """The rows that are used, as training and test rows."""
    settings = asked.settings
    parts = [frame[used]] if test is None else [frame[used], test[used]]
    sources = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    numbers = np.concatenate([np.arange(1, len(part) + 1) for part in parts])
    whole = pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0].reset_index(drop=True)
    if settings.missing == "drop":
        kept = whole.notna().all(axis=1).to_numpy()
        if not kept.all():
            log.info("data: dropped %d of %d rows, which have missing values", (~kept).sum(), len(kept))
        whole, sources, numbers = whole[kept].reset_index(drop=True), sources[kept], numbers[kept]
    train_rows, test_rows = np.flatnonzero(sources == 0), np.flatnonzero(sources == 1)
    if divided:
        train_rows, others = split_rows(len(train_rows), settings.test_fraction)
        test_rows = others if test is None else test_rows
    for count, name in ((len(train_rows), "data.file"), (len(test_rows), "data.test_file")):
        if not count:
            raise UserError(f"{name} has no row without missing values: choose data.missing mean or median")

    def where(at: int) -> str:
        return f"row {numbers[at]}" + (" of the test data" if sources[at] else "")

    return Rows(whole, train_rows, test_rows, asked.known(train_rows), where)


def _target(rows: Rows, name: str, asked: Request) -> Targets:
    values = rows.frame[name]
    if (lost := values.isna().to_numpy()).any():
        raise UserError(
            f"data.target {name} has {int(lost.sum())} missing values, the first in {rows.where(int(lost.argmax()))}: "
            "set data.missing to drop to leave these rows out"
        )
    if isinstance(values.dtype, pd.CategoricalDtype) or not pd.api.types.is_numeric_dtype(values):
        found = values.to_numpy(dtype=object)
    else:
        found = values.to_numpy()
    return read_targets(
        found, rows.known, name=name, kind=asked.targets, standardize=asked.settings.standardize_target,
        where=rows.where,
    )  # fmt: skip
