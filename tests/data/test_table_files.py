"""CSV and Parquet as tables: what is read, and from which rows statistics come."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from small_tables import read, small, written

from ppl_bnn.data import Table, load
from ppl_bnn.errors import UserError


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_diabetes_in_a_file_is_standardized_by_its_training_rows(tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    frame = load_diabetes(as_frame=True, scaled=False).frame
    getattr(frame, f"to_{kind}")(tmp_path / "diabetes", index=False)
    train, test = load(kind, file=tmp_path / "diabetes", target="target", targets="numbers")
    assert (len(train), len(test), train.shape, train.title) == (354, 88, (10,), "diabetes")
    assert train.features == tuple(load_diabetes().feature_names)
    assert train.target == "target (training standard deviations)"
    for values in (train.x, train.y):
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1:]), atol=1e-5, rtol=0)
        torch.testing.assert_close(values.std(0, correction=0), torch.ones(values.shape[1:]), atol=1e-5, rtol=0)
    loc, scale = train.target_scale
    both = torch.cat([train.y, test.y]).double() * scale + loc
    np.testing.assert_allclose(np.sort(both.numpy()), np.sort(frame.target), rtol=1e-5)
    assert torch.equal(load(kind, file=tmp_path / "diabetes", target="target")[1].x, test.x)


@pytest.mark.parametrize(("source", "classes"), [(load_wine, 3), (load_breast_cancer, 2)])
def test_classes_are_of_texts_or_whole_numbers(tmp_path, source, classes):
    bunch = source(as_frame=True)
    numbers = bunch.frame
    texts = numbers.assign(target=[bunch.target_names[label] for label in bunch.target])
    found = []
    for name, frame in (("numbers.csv", numbers), ("texts.csv", texts)):
        frame.to_csv(tmp_path / name, index=False)
        found.append(read(tmp_path / name, "target", targets="classes"))
    (by_number, _), (by_text, _) = found
    assert by_number.classes == tuple(map(str, range(classes)))
    assert by_text.classes == tuple(sorted(bunch.target_names))
    named = [str(bunch.target_names[int(name)]) for name in by_number.classes]
    assert [named[y] for y in by_number.y] == [by_text.classes[y] for y in by_text.y]
    assert by_number.y.dtype == torch.int64
    assert by_number.target_scale is None


def test_texts_are_one_hot_and_booleans_are_0_and_1(tmp_path):
    train, test = read(small(tmp_path))
    assert train.features == ("size", "port=Ayr", "port=Bonn", "port=Cork", "paid")
    assert train.columns == {"size": (0,), "port": (1, 2, 3), "paid": (4,)}
    assert torch.equal(train.x[:, 1:4].sum(1), torch.ones(len(train)))
    assert set(train.x[:, 4].tolist()) == {0.0, 1.0}
    assert (len(train), len(test)) == (32, 8)


def test_numbers_may_be_categories(tmp_path):
    path = written(tmp_path, zone=[1, 2, 10, None] * 10, price=np.arange(40.0))
    train, _ = read(path, categorical=["zone"], missing="mean")
    assert train.features == ("zone=1", "zone=2", "zone=10")


def test_statistics_are_of_the_training_rows_alone(tmp_path):
    path = small(tmp_path)
    frame = pd.read_csv(path)
    rows = written(tmp_path, "test.csv", **{**frame.iloc[:6], "size": 1000.0, "price": -1000.0})
    alone = read(path, test_file=path)
    train, test = read(path, test_file=rows)
    assert torch.equal(train.x, alone[0].x)
    assert torch.equal(train.y, alone[0].y)
    assert (len(test), test.split) == (6, "test")
    expected = (1000 - frame["size"].mean()) / frame["size"].std(ddof=0)
    torch.testing.assert_close(test.x[:, 0], torch.full((6,), expected, dtype=torch.float32))


def test_no_statistics_are_of_rows_that_are_held_out(tmp_path):
    path = small(tmp_path)
    train, held = read(path, holdout=12)
    assert (len(train), len(held), held.split) == (20, 12, "validation")
    torch.testing.assert_close(train.x[:, 0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.y.std(correction=0), torch.tensor(1.0))
    whole, _ = read(path)
    assert whole.x[:20, 0].mean().abs() > 1e-3
    assert train.target_scale != whole.target_scale
    part, _ = read(path, num_train=30, validation=10)
    assert len(part) == 30
    assert torch.equal(part.x[:20], train.x)
    assert part.target_scale == train.target_scale


def test_a_share_of_the_rows_is_the_test_set(tmp_path):
    path = written(tmp_path, number=np.arange(40.0), price=np.arange(40.0))
    train, test = read(path, test_fraction=0.25, standardize_target=False)
    assert (len(train), len(test)) == (30, 10)
    assert sorted(torch.cat([train.y, test.y]).tolist()) == list(range(40))
    assert train.target == "price"
    assert train.target_scale is None


def test_columns_that_do_not_vary_are_left_out_with_a_line_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train, _ = read(small(tmp_path, country=["Eire"] * 40, year=[2026] * 40))
    assert "country" not in train.columns
    assert "year" not in train.columns
    assert "left out, the same in all training rows: 'country', 'year'" in caplog.text


def test_numbers_of_rows_are_left_out(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = small(tmp_path)
    pd.read_csv(path).to_csv(path)
    assert "Unnamed: 0" not in read(path)[0].columns
    assert "the numbers of the rows" in caplog.text


@pytest.mark.parametrize(("missing", "value"), [("mean", 2.0), ("median", 1.0)])
def test_missing_values_are_those_of_the_training_rows(tmp_path, missing, value):
    path = written(
        tmp_path, size=[1.0, 1.0, 4.0, None], port=["a", "b", "b", "b"], price=[1.0, 2.0, 3.0, 4.0],
    )  # fmt: skip
    test = written(tmp_path, "test.csv", size=[None, 9.0], port=["a", None], price=[5.0, 6.0])
    train, found = read(path, test_file=test, missing=missing)
    sizes = np.array([1.0, 1.0, 4.0, value])
    expected = (sizes - sizes.mean()) / sizes.std()
    np.testing.assert_allclose(train.x[:, 0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.x[0, 0], expected[3], rtol=1e-5, atol=1e-6)
    # The most frequent category.
    assert found.x[1, 1:].tolist() == [0.0, 1.0]


def test_rows_with_missing_values_may_be_dropped(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = written(tmp_path, size=[*np.arange(18.0), None, 3.0], price=[*np.arange(19.0), None])
    train, test = read(path, missing="drop", standardize_target=False)
    assert sorted(torch.cat([train.y, test.y]).tolist()) == list(range(18))
    assert "dropped 2 of 20 rows" in caplog.text


def test_an_unknown_category_may_be_ignored(tmp_path):
    path = written(tmp_path, port=["a", "b"] * 5, price=np.arange(10.0))
    test = written(tmp_path, "test.csv", port=["a", "c"], price=[1.0, 2.0])
    assert read(path, test_file=test, unknown_categories="ignore")[1].x.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    with pytest.raises(UserError, match="column 'port' is 'c' in row 2 of the test data, and in no training row: set"):
        read(path, test_file=test)


def test_options_reach_pandas(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("größe;price\n" + "\n".join(f"{at},5;{at}" for at in range(20)), encoding="latin-1")
    train, _ = read(path, options={"sep": ";", "decimal": ",", "encoding": "latin-1"}, targets="numbers")
    assert train.features == ("größe",)


def test_a_long_column_has_one_type(tmp_path):
    codes = [*[str(at % 40) for at in range(150_000)], *["A7"] * 50_000]
    train, _ = read(written(tmp_path, code=codes, price=np.arange(2e5)))
    assert len(train.features) == 41
    assert train.features[-1] == "code=A7"


def test_counts_stay_whole_numbers(tmp_path):
    path = written(tmp_path, size=np.arange(30.0), visits=[float(at % 4) for at in range(30)])
    train, _ = read(path, "visits", targets="counts")
    assert train.y.dtype == torch.int64
    assert (train.classes, train.target_scale) == ((), None)


def test_a_table_knows_which_columns_of_x_are_of_which_column():
    table = Table(torch.zeros(2, 2), torch.zeros(2), ("a", "b"), "y", "T", "train")
    assert table.columns == {"a": (0,), "b": (1,)}
    assert table.first(1).columns == table.columns
