"""npz, npy, h5 and torch files as data: images, tables and other arrays, in memory and on disk."""

import re

import h5py
import numpy as np
import pytest
import torch
from examples_conformance import conforms

from ppl_bnn.data import Arrays, Files, Images, Table, first_inputs, load
from ppl_bnn.errors import UserError

# Less than any of these arrays has.
NOTHING = 1e-6
RNG = np.random.default_rng(5)
ROWS = RNG.normal(3, 2, (50, 4))
LABELS = np.arange(50) % 3
PIXELS = RNG.integers(0, 256, (40, 1, 6, 5), np.uint8)


def npz(path, **arrays):
    np.savez(path.with_suffix(".npz"), **arrays)
    return path.with_suffix(".npz")


def compressed(path, **arrays):
    np.savez_compressed(path.with_suffix(".npz"), **arrays)
    return path.with_suffix(".npz")


def folder(path, **arrays):
    path.mkdir()
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    return path


def h5(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def pt(path, **arrays):
    torch.save({name: torch.as_tensor(array) for name, array in arrays.items()}, path)
    return path


KINDS = {npz: "npz", compressed: "npz", folder: "npz", h5: "h5", pt: "torch"}
ON_DISK = [npz, folder, h5]


def read(write, path, arrays, **settings):
    return load(KINDS[write], file=write(path, **arrays), progress=False, **settings)


def inputs(split):
    return first_inputs(split, len(split))


@pytest.mark.parametrize("write", KINDS)
def test_rows_of_numbers_are_a_standardized_table(tmp_path, write):
    constant = ROWS.copy()
    constant[:, 2] = 7
    train, test = read(write, tmp_path / "rows", {"x": constant, "y": LABELS})
    assert isinstance(train, Table)
    assert (len(train), len(test), train.title, train.classes) == (40, 10, "rows", ("0", "1", "2"))
    assert train.features == ("x0", "x1", "x3")
    torch.testing.assert_close(train.x.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.x.std(0, correction=0), torch.ones(3))


@pytest.mark.parametrize("write", ON_DISK)
def test_a_table_on_disk_has_the_numbers_of_one_in_memory(tmp_path, write):
    constant = ROWS.astype(np.float32)
    constant[:, 2] = 7
    arrays = {"x": constant, "y": ROWS[:, 0]}
    memory = read(write, tmp_path / "a", arrays, holdout=7)
    disk = read(write, tmp_path / "b", arrays, holdout=7, max_memory=NOTHING)
    for one, other in zip(memory, disk, strict=True):
        assert isinstance(other, Files)
        assert not other.in_memory
        torch.testing.assert_close(inputs(other), inputs(one), rtol=1e-6, atol=1e-6)
        assert torch.equal(one.targets, other.targets)
        assert (one.shape, one.split, one.target) == (other.shape, other.split, other.target)
        assert one.target_scale == other.target_scale
        rows = torch.tensor([3, 1])
        assert torch.equal(other.examples().take(rows)[1], other.targets[rows])


@pytest.mark.parametrize("settings", [{}, {"max_memory": NOTHING}])
@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: x[:, 0], lambda x: x.transpose(0, 2, 3, 1)], ids=["NCHW", "NHW", "NHWC"]
)
def test_bytes_are_images(tmp_path, form, settings):
    arrays = {"x": form(PIXELS), "y": LABELS[:40], "x_test": form(PIXELS[:9]), "y_test": LABELS[:9]}
    train, test = read(npz, tmp_path / "digits", arrays, **settings)
    assert isinstance(train, Files if settings else Images)
    assert (train.shape, len(train), len(test), test.split) == ((1, 6, 5), 40, 9, "test")
    assert torch.equal(inputs(test), torch.from_numpy(PIXELS[:9]) / 255)
    assert torch.equal(train.targets, torch.from_numpy(LABELS[:40]))


def test_images_with_numbers_are_arrays(tmp_path):
    train, _ = read(npz, tmp_path / "ages", {"x": PIXELS, "y": RNG.normal(size=40)}, targets="numbers")
    assert isinstance(train, Arrays)
    assert inputs(train).dtype == torch.float32
    assert float(inputs(train).max()) <= 1


@pytest.mark.parametrize("settings", [{}, {"max_memory": NOTHING}])
def test_several_arrays_are_several_inputs(tmp_path, settings):
    arrays = {"series": RNG.normal(size=(30, 12, 2)), "place": np.arange(30) % 4, "y": RNG.normal(size=30)}
    train, test = read(h5, tmp_path / "both.h5", arrays, targets="numbers", **settings)
    assert train.shape == {"series": (12, 2), "place": ()}
    found = inputs(train)
    assert (found["series"].dtype, found["place"].dtype) == (torch.float32, torch.int64)
    assert train.target == "y (training standard deviations)"
    whole = torch.cat([found["series"], inputs(test)["series"]]).sum((1, 2)).sort().values
    expected = np.sort(arrays["series"].astype(np.float32).sum((1, 2)))
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-4)


def test_whole_numbers_are_tokens_unless_they_are_numbers(tmp_path):
    tokens = RNG.integers(0, 90, (20, 7)).astype(np.int16)
    train, _ = read(pt, tmp_path / "tokens.pt", {"x": tokens, "y": LABELS[:20]})
    assert (type(train), train.inputs().dtype) == (Arrays, torch.int64)
    paths = [npz(tmp_path / kind, x=tokens.astype(kind), y=LABELS[:20]) for kind in ("int16", "float32")]
    for more in ({}, {"max_memory": NOTHING}):
        torch.testing.assert_close(*(inputs(load("npz", file=path, tokens=False, **more)[0]) for path in paths))


def test_names_of_arrays_are_settings(tmp_path):
    arrays = {"pictures": PIXELS, "names": np.array(["cat", "dog"] * 20), "weight": RNG.normal(size=40)}
    train, _ = read(npz, tmp_path / "pets", arrays, target="names", features=["pictures"])
    assert isinstance(train, Images)
    assert train.classes == ("cat", "dog")


def test_texts_of_h5_are_classes(tmp_path):
    arrays = {"x": ROWS, "y": np.array(["a", "b"] * 25, dtype=object)}
    assert read(h5, tmp_path / "rows.h5", arrays)[0].classes == ("a", "b")


def test_a_test_file_has_the_test_data(tmp_path):
    path = npz(tmp_path / "other", x=ROWS[:5], y=LABELS[:5])
    for settings in ({}, {"max_memory": NOTHING}):
        train, test = load("npz", file=npz(tmp_path / "own", x=ROWS, y=LABELS), test_file=path, **settings)
        assert (len(train), len(test)) == (50, 5)
        torch.testing.assert_close(inputs(test), inputs(train)[:5])


@pytest.mark.parametrize("write", ON_DISK)
def test_what_stays_on_disk_conforms_to_examples(tmp_path, write):
    def make(other=False):
        path = tmp_path / f"{other}"
        file = path.with_suffix(".npz") if write is npz else path
        if not file.exists():
            write(path, x=ROWS + other, y=LABELS)
        return load(KINDS[write], file=file, max_memory=NOTHING)[0].examples()

    conforms(make, count=40)


@pytest.mark.parametrize("write", ON_DISK)
def test_arrays_of_the_other_byte_order_are_read(tmp_path, write):
    swapped = {"x": ROWS.astype(ROWS.dtype.newbyteorder()), "y": LABELS.astype(LABELS.dtype.newbyteorder())}
    expected = read(write, tmp_path / "a", {"x": ROWS, "y": LABELS}, max_memory=NOTHING)
    found = read(write, tmp_path / "b", swapped, max_memory=NOTHING)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(inputs(one), inputs(other))
        assert torch.equal(one.targets, other.targets)


def test_test_inputs_without_targets_are_said_to_be_left_out(tmp_path, caplog):
    train, test = read(npz, tmp_path / "a", {"x": ROWS, "y": LABELS, "x_test": ROWS[:5]})
    assert (len(train), len(test)) == (40, 10)
    assert "data: 'x_test' has no y_test beside it, and is left out" in caplog.text


def test_data_on_disk_are_known_by_a_fingerprint(tmp_path):
    train, test = read(npz, tmp_path / "a", {"x": ROWS, "y": LABELS}, max_memory=NOTHING)
    assert train.fingerprint(whole=False) == train.fingerprint(whole=True) != test.fingerprint(whole=True)
    assert train.first(3).fingerprint(whole=True) != train.fingerprint(whole=True)
    with pytest.raises(UserError, match=r"a is read batch by batch: use examples\(\) in place of inputs\(\)"):
        train.inputs()


def holed(array, row):
    array = np.array(array, np.float64)
    array[row] = np.nan
    return array


LONE = {"x": PIXELS, "y": LABELS[:40] % 2, "x_test": PIXELS[:9], "y_test": LABELS[:9]}
SERIES = RNG.normal(size=(50, 3, 2))


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        (LONE, {}, r"data.target y is '2' in row 3 of the test data, a class without a training row"),
        ({"x": ROWS}, {}, "data.target 'y' is no array of the file: there are 'x'"),
        ({"y": LABELS}, {}, "there is no array to predict 'y' from: the file has 'y' alone"),
        ({"x": ROWS, "y": LABELS}, {"features": ["z"]}, "data.features 'z' is no array"),
        ({"x": ROWS, "y": LABELS}, {"features": ["y"]}, "data.features has the target 'y' itself"),
        ({"x": ROWS, "y": LABELS[:7]}, {}, "the same number of rows, at least 1; got {'x': 50, 'y': 7}"),
        ({"x": ROWS[:0], "y": LABELS[:0]}, {}, "at least 1; got {'x': 0, 'y': 0}"),
        (
            {"x": PIXELS, "y": LABELS[:40], "x_test": PIXELS / 255, "y_test": LABELS[:40]},
            {},
            "the array 'x' must be of one type, got uint8 and float64: convert one",
        ),
        ({"x": ROWS, "y": ROWS}, {}, "data.target y must have one value for each row, [N], got [50, 4]"),
        ({"x": ROWS, "y": LABELS, "y_test": LABELS}, {}, "data.file needs 'x_test', which is no array of the file"),
        ({"x": holed(ROWS, 3), "y": LABELS}, {}, "column 'x0' has 1 missing values, the first in row 4"),
        ({"x": holed(ROWS, 3), "y": LABELS}, {"max_memory": NOTHING}, "the array 'x' has NaN or infinity in row 4"),
        ({"x": holed(SERIES, 9), "y": LABELS}, {}, "the array 'x' has NaN or infinity in row 10"),
        ({"x": SERIES, "y": LABELS}, {"missing": "mean"}, "data.missing mean is for tables"),
        ({"x": ROWS, "y": LABELS}, {"missing": "mean", "max_memory": NOTHING}, "mean needs the data in memory: set"),
        ({"x": np.array(["a"] * 50), "y": LABELS}, {}, "the array 'x' must have numbers, got <U1"),
        ({"x": ROWS * 1j, "y": LABELS}, {"max_memory": NOTHING}, "the array 'x' must have numbers, got complex128"),
        ({"x": np.float32(3), "y": LABELS}, {}, "the same number of rows, at least 1; got {'x': 0, 'y': 50}"),
        (
            {"x": ROWS, "y": LABELS, "x_test": ROWS[:5, :3], "y_test": LABELS[:5]},
            {},
            "rows of the array 'x' have the shape [4] in the training data and [3] in the test data",
        ),
        (
            {"x": ROWS, "y": LABELS, "x_test": ROWS[:5], "y_test": LABELS[:5, None]},
            {},
            "rows of the array 'y' have the shape [] in the training data and [1] in the test data",
        ),
        (
            {"x": ROWS, "y": holed(LABELS, 2)},
            {"targets": "numbers"},
            "data.target y has 1 missing values, the first in",
        ),
        (
            {"x": SERIES, "y": holed(LABELS, 2)},
            {"targets": "numbers"},
            "data.target y must be finite numbers; row 3 is n",
        ),
        (
            {"x": ROWS, "y": ROWS[:, 0]},
            {"targets": "classes"},
            "which are no class labels: use --model.likelihood normal",
        ),
        (
            {"x": ROWS * 0, "y": LABELS},
            {"max_memory": NOTHING},
            "no column of the array 'x' varies in the training rows",
        ),
        (
            {"x": ROWS, "y": LABELS},
            {"categorical": ["x"]},
            "data.categorical is for data.name csv, parquet; it cannot be",
        ),
        ({"x": ROWS, "y": LABELS}, {"workers": 2}, "data.workers is for data.name folder; it cannot be used with"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, settings, message):
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        read(npz, tmp_path / "rows", arrays, **settings)
    assert "\n" not in str(refusal.value)


def test_test_data_in_two_ways_are_refused(tmp_path):
    path = npz(tmp_path / "own", x=ROWS, y=LABELS, x_test=ROWS, y_test=LABELS)
    with pytest.raises(UserError, match=r"data.file has test data, y_test, and the settings name others, 0.5: use one"):
        load("npz", file=path, test_fraction=0.5)
