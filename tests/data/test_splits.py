"""What all kinds of data of a run have in common."""

import pytest
import torch

from ppl_bnn.data import Arrays, Files, Images, Table, TensorExamples, first_inputs
from ppl_bnn.data.examples import read_batches
from ppl_bnn.errors import UserError

X, Y = torch.arange(24.0).view(8, 3), torch.arange(8) % 2
CLASSES = ("a", "b")
KINDS = {
    "images": Images(X[:, :, None, None].byte(), Y, CLASSES, "T", "train"),
    "table": Table(X, Y, ("p", "q", "r"), "y", "T", "train", CLASSES),
    "arrays": Arrays({"x": X, "t": Y}, Y, "T", "train", CLASSES),
    "files": Files(TensorExamples(X, Y), Y, (3,), "T", "train", CLASSES),
}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_any_kind_have_their_rows(kind):
    data = KINDS[kind]
    assert (len(data), data.title, data.split, data.classes) == (8, "T", "train", CLASSES)
    assert isinstance(data.target, str)
    assert data.target_scale is None
    assert data.in_memory == (kind != "files")
    part = data.rows(slice(2, 6), "validation")
    assert (len(part), part.split) == (4, "validation")
    assert torch.equal(part.targets, Y[2:6])
    assert torch.equal(data.rows(torch.tensor([5, 1])).targets, Y[[5, 1]])
    assert data.first(None) is data
    examples = part.examples()
    rows = torch.tensor([3, 0])
    x, y = examples.take(rows)
    assert torch.equal(y, part.targets[rows])
    whole = first_inputs(part, 4)
    for found, expected in zip(
        [x["x"], x["t"]] if kind == "arrays" else [x],
        [whole["x"], whole["t"]] if kind == "arrays" else [whole],
        strict=True,
    ):
        assert torch.equal(found, expected[rows])
    found = [y for _, y in read_batches(examples, [rows, torch.tensor([1])], "cpu")]
    assert torch.equal(torch.cat(found), part.targets[[3, 0, 1]])


@pytest.mark.parametrize("kind", KINDS)
def test_data_are_told_apart(kind):
    data = KINDS[kind]
    assert data.fingerprint(whole=True) == data.fingerprint(whole=True) != data.first(7).fingerprint(whole=True)
    if data.in_memory:
        assert data.fingerprint(whole=False) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Arrays(X, Y[:3], "T", "train"),
            r"the y of Arrays must be float32 or int64 \[8\], got torch.int64 \[3\]",
        ),
        (lambda: Arrays(X / 0, Y, "T", "train"), "the x of Arrays must be finite numbers, got NaN or infinity"),
        (lambda: Arrays((X, Y[:3]), Y, "T", "train"), "all input tensors need the same number of examples"),
        (lambda: Arrays(X, Y / torch.zeros(8), "T", "train"), "must be finite numbers, got 8 that are not"),
        (lambda: Files(TensorExamples(X, Y), Y.double(), (3,), "T", "train"), "the targets of Files must be float32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
