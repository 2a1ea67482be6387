"""What CSV and Parquet files are refused for, in one line that names the column and the row."""

import numpy as np
import pandas as pd
import pytest
import torch
from small_tables import read, small, written

from ppl_bnn.data import frames, load
from ppl_bnn.data.parts import split_rows
from ppl_bnn.errors import FileError, UserError

DATES = [f"2026-01-{day:02}" for day in range(1, 21)]
NUMBERS = np.arange(20.0)


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({}, {"target": None}, "data.target must name the column to predict: one of 'size', 'price'"),
        ({}, {"target": "prize"}, "data.target 'prize' is no column of the file: did you mean 'price'"),
        ({}, {"features": ["siz"]}, "data.features 'siz' is no column of the file: did you mean 'size'"),
        ({}, {"features": ["xyz"]}, "'xyz' is no column of the file: there are 'size', 'price'"),
        ({}, {"features": ["size", "price"]}, "data.features has the target 'price' itself"),
        ({}, {"categorical": ["when"]}, "data.categorical 'when' is no column"),
        ({"zone": NUMBERS}, {"features": ["size"], "categorical": ["zone"]}, "'zone', which is not among the features"),
        ({"size": [None, *NUMBERS[1:]]}, {}, "column 'size' has 1 missing values, the first in row 1: choose"),
        ({"port": ["a", None] * 10}, {}, "column 'port' has 10 missing values, the first in row 2: choose"),
        ({"price": [*NUMBERS[:7], None, *NUMBERS[8:]]}, {}, "data.target price has 1 missing values, the first in row"),
        ({"size": [1.0, np.inf] * 10}, {}, "column 'size' is infinite in row 2"),
        ({"price": [1.0, np.inf] * 10}, {}, "data.target price must be finite numbers; row 2 is not"),
        ({"size": [None] * 20}, {"missing": "mean"}, "column 'size' has no value in training rows"),
        ({"when": DATES}, {}, "column 'when' has dates: leave it out by data.features"),
        ({"price": pd.to_datetime(DATES)}, {"targets": "numbers"}, "data.target price is text .'2026-01-01', "),
        ({"port": ["a", "b"] * 10}, {"categorical": ["size"]}, "column 'port' has texts: name it in data.categor"),
        ({"size": [2.0] * 20}, {}, "no column varies in the training rows: 'size' have one value each"),
        ({"price": [3.0] * 20}, {"targets": "numbers"}, "data.target price is 3 in all training rows"),
        ({"price": ["a", "b"] * 10}, {"targets": "numbers"}, "is text .'a', 'b'., and the likelihood takes"),
        ({"price": NUMBERS + 0.5}, {"targets": "classes"}, "numbers such as 0.5, which are no class lab"),
        ({"price": ["a"] * 20}, {"targets": "classes"}, "data.target price has one class alone, a"),
        ({"price": NUMBERS - 3}, {"targets": "counts"}, "must be counts of at least 0, got -3 in row 1"),
        ({"price": NUMBERS / 8}, {"targets": "counts"}, "must be counts .* got numbers such as 0.0: use --model"),
        ({}, {"targets": "classes", "standardize_target": True}, "standardize_target is for numbers, and data"),
        ({}, {"test_fraction": 0.99}, "data.test_fraction 0.99 of 20 rows leaves none to train on"),
        ({}, {"options": {"sepp": ";"}}, "data.options are not understood by pandas' reader of csv: .*sepp"),
        ({}, {"missing": "none"}, "data.missing must be one of refuse, mean, median, drop; got 'none'"),
        ({}, {"targets": "labels"}, "targets must be one of classes, numbers, counts, or None; got 'labels'"),
        ({}, {"options": {"chunksize": 3}}, "must let pandas' reader give one table: leave out chunksize"),
        ({}, {"image_size": 3}, "data.image_size is for data.name folder; it cannot be used with 'csv': leave it out"),
    ],
)  # fmt: skip
def test_what_a_table_cannot_be_is_refused(tmp_path, columns, settings, message):
    path = written(tmp_path, **{"size": NUMBERS, "price": NUMBERS, **columns})
    with pytest.raises(UserError, match=message) as refusal:
        read(path, **settings)
    assert "\n" not in str(refusal.value)


def test_too_many_texts_are_no_categories(tmp_path):
    names = [f"person {at}" for at in range(600)]
    path = written(tmp_path, who=names, size=np.arange(600.0), price=np.arange(600.0))
    with pytest.raises(
        UserError, match="column 'who' has 600 different texts in 600 rows, which are hardly categories"
    ):
        read(path)
    assert read(path, features=["size"])[0].shape == (1,)
    with pytest.raises(
        UserError, match="target who has 600 different texts in 600 rows, which are hardly classes: name"
    ):
        read(path, "who")
    ages = [str(at) for at in range(600)]
    ages[311] = "unknown"
    path = written(tmp_path, age=ages, price=np.arange(600.0))
    with pytest.raises(UserError, match=r"column 'age' is read as text because of 'unknown' in row 312: .*na_values"):
        read(path)


def test_numbers_with_a_few_texts_are_said_to_be_categories(tmp_path, caplog):
    ages = [str(at % 9) for at in range(40)]
    path = written(tmp_path, age=ages, price=np.arange(40.0))
    assert read(path)[0].features == ("age",)
    assert "is read as text" not in caplog.text
    ages[20] = "3+"
    path = written(tmp_path, age=ages, price=np.arange(40.0))
    read(path, unknown_categories="ignore")
    assert "column 'age' is read as text because of '3+' in row 21, and its 10 values are categories" in caplog.text


def test_whole_numbers_that_are_hardly_classes_are_numbers(tmp_path):
    path = written(tmp_path, size=np.arange(100.0), price=np.arange(100))
    with pytest.raises(
        UserError, match="100 different whole numbers in 100 rows, which are hardly classes: use --model"
    ):
        read(path, targets="classes")
    assert read(path)[0].y.dtype == torch.float32


def test_a_class_without_training_rows_is_refused(tmp_path):
    path = written(tmp_path, size=NUMBERS, kind=["a", "b"] * 10)
    test = written(tmp_path, "test.csv", size=[1.0, 2.0], kind=["a", "c"])
    with pytest.raises(
        UserError, match=r"data.target kind is 'c' in row 2 of the test data, a class without a training"
    ):
        read(path, "kind", test_file=test)


def test_classes_that_held_out_rows_alone_have_or_lack_are_told(tmp_path, caplog):
    path = written(tmp_path, size=NUMBERS, kind=["a", "b"] * 10)
    test = split_rows(20, None)[1]
    frame = pd.read_csv(path)
    frame.loc[test[:2], "kind"] = "c"
    frame.to_csv(path, index=False)
    read(path, "kind")
    assert "2 of 4 test examples are of classes that no training example has: 'c'; no network learns" in caplog.text
    caplog.clear()
    read(path, "kind", holdout=1)
    assert "data: the last 1 examples, which are held out, have 1 classes, and the training examples 2" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: it needs a line of column names, and rows"),
        (b"size,price\n", "has no rows, only the columns 'size', 'price'"),
        (b"a,b\n1,2\n1,2,3\n", "cannot be read as csv: Error tokenizing data"),
        (b"size;price\n1;2\n", "has one column alone, 'size;price': name its separator, as in data.options {sep: ';'}"),
        (b"gr\xf6\xdfe,price\n1,2\n", "is not utf-8 text: name its encoding, as in data.options {encoding: latin-1}"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message):
        read(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileError, match=r"data.file .*nowhere.csv is not there"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(FileError, match="is not a file"):
        read(tmp_path)
    with pytest.raises(FileError, match=r"data.test_file .*nowhere.csv is not there"):
        read(small(tmp_path), test_file=tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match=r"data.name csv reads a file of yours: name it with data.file"):
        load("csv", target="price")
    with pytest.raises(UserError, match=r"data.test_fraction has no effect with data.test_file"):
        read(small(tmp_path), test_file=small(tmp_path), test_fraction=0.5)
    other = written(tmp_path, "test.csv", size=[1.0], price=[1.0])
    with pytest.raises(UserError, match=r"data.test_file needs 'port', which is no column of the file"):
        read(small(tmp_path), test_file=other)


def test_a_file_larger_than_the_memory_is_refused_with_another_way(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "_free_memory", lambda: 100)
    with pytest.raises(FileError, match=r"of memory are free: write it as arrays for data.name h5 or npz"):
        read(small(tmp_path))
    pytest.importorskip("pyarrow")
    pd.read_csv(small(tmp_path)).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(FileError, match="of memory are free"):
        load("parquet", file=tmp_path / "rows.parquet", target="price")
