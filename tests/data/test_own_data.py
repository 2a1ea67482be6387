"""Data of a function or class of one's own: Datasets, DataLoaders, tensors and kinds of Split."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ppl_bnn.data import Arrays, Files, Images, Table, as_examples, first_inputs, load, normalize
from ppl_bnn.errors import UserError

X, Y = torch.randn(30, 5, 2), torch.arange(30) % 3


class Squares(Dataset):
    """Numbers and their squares, or whether they are even."""

    def __init__(self, count=20, even=True):
        self.count, self.even = count, even

    def __len__(self):
        return self.count

    def __getitem__(self, at):
        return torch.full((3,), float(at)), at % 2 if self.even else torch.tensor(float(at * at))


class Named(Squares):
    """With the labels and classes that torchvision's data sets have."""

    classes = ("even", "odd")

    def __init__(self, count=20):
        super().__init__(count)
        self.targets = [at % 2 for at in range(count)]
        self.read = 0

    def __getitem__(self, at):
        self.read += 1
        return super().__getitem__(at)


class InOrder(IterableDataset):
    """Numbers that can only be read one after the other."""

    def __len__(self):
        return 10

    def __iter__(self):
        return iter([(torch.full((2,), float(at)), at % 2) for at in range(10)])


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(2), 0)] * 4)


def tensors():
    return X, Y


def pair_of_tensors():
    return (X, Y), (X[:4], Y[:4])


def list_of_two():
    return [(X, Y), (X[:4], Y[:4])]


def loaders(batch_size=4):
    return DataLoader(Squares(), batch_size), DataLoader(Squares(6), batch_size)


def several():
    return {"series": X, "place": torch.arange(30), "y": torch.randn(30)}


def normalized():
    return as_examples(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), Y[:8], transform=normalize(0.5, 0.5))


def pixels():
    return torch.zeros(8, 1, 2, 2, dtype=torch.uint8), Y[:8]


def table():
    return torch.randn(8, 4), torch.randn(8)


def splits(file=None, count=6):
    whole = Arrays(X, Y, "Mine", "train", ("a", "b", "c"))
    return whole, whole.first(count)


def unlabelled():
    return DataLoader(TensorDataset(torch.zeros(6, 2)))


def negative():
    return X, Y - 1


def narrower():
    return table(), (torch.randn(8, 3), torch.randn(8))


def texts():
    return "rows"


def raising():
    raise KeyError("weight")


def own(function, **settings):
    return load(f"{__name__}:{function}", progress=False, **settings)


def test_one_data_set_is_divided():
    train, test = own("tensors", test_fraction=0.2)
    assert isinstance(train, Arrays)
    assert (len(train), len(test), train.classes, train.shape) == (24, 6, ("0", "1", "2"), (5, 2))
    assert torch.equal(torch.cat([train.x, test.x]).sum((1, 2)).sort().values, X.sum((1, 2)).sort().values)


def test_a_pair_is_training_and_test_data():
    train, test = own("pair_of_tensors")
    assert torch.equal(train.x, X)
    assert (len(test), test.split) == (4, "test")
    train, test = own("list_of_two")
    assert (len(train), len(test)) == (30, 4)
    train, test = own("splits", options={"count": 3})
    assert (train.title, len(test)) == ("Mine", 3)


def test_a_loader_or_a_class_of_ones_own_is_read_batch_by_batch():
    train, test = own("loaders", options={"batch_size": 2})
    assert isinstance(train, Files)
    assert (len(train), len(test), train.shape, train.classes) == (20, 6, (3,), ("0", "1"))
    assert train.targets.tolist() == [at % 2 for at in range(20)]
    train, test = own("Squares", options={"count": 10, "even": False}, test_fraction=0.3, targets="numbers")
    assert (len(train), len(test), train.classes) == (7, 3, ())
    assert torch.equal(first_inputs(train, 7)[:, 0] ** 2, train.targets)


def test_what_is_read_in_order_is_divided_in_order():
    train, test = own("InOrder")
    assert first_inputs(train, 8)[:, 0].tolist() == list(range(8))
    assert first_inputs(test, 2)[:, 0].tolist() == [8, 9]
    assert test.targets.tolist() == [0, 1]


def test_labels_that_a_data_set_knows_are_not_read():
    train, _ = own("Named")
    assert train.classes == ("even", "odd")
    assert torch.equal(train.targets, first_inputs(train, 16)[:, 0].long() % 2)
    assert train.examples().whole.dataset.read < 40


class Renamed(Named):
    """With a transform of labels that changes few of them."""

    def __init__(self, count=100):
        super().__init__(count)
        self.target_transform = lambda label, at: 1 - label if at == 50 else label

    def __getitem__(self, at):
        x, label = super().__getitem__(at)
        return x, self.target_transform(label, at)


def test_transformed_labels_are_read_item_by_item():
    train, test = own("Renamed", test_fraction=0.2)
    x = torch.cat([first_inputs(part, len(part))[:, 0] for part in (train, test)])
    labels = torch.cat([train.targets, test.targets])
    assert int(labels[x == 50]) == 1


@pytest.mark.parametrize(
    ("function", "kind", "shape"),
    [
        ("several", Arrays, {"series": (5, 2), "place": ()}),
        ("normalized", Files, (1, 2, 2)),
        ("pixels", Images, (1, 2, 2)),
        ("table", Table, (4,)),
    ],
)
def test_each_kind_of_data_is_found(function, kind, shape):
    train, _ = own(function)
    assert isinstance(train, kind)
    assert train.shape == shape


def test_a_transform_of_a_batch_reaches_the_inputs():
    assert torch.equal(first_inputs(own("normalized")[0], 1), torch.full((1, 1, 2, 2), -1.0))


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        ("texts", {}, r"own_data:texts must return data or \(train, test\), each a Dataset.*; got 'rows'"),
        ("raising", {}, "own_data:raising raised KeyError: 'weight'"),
        ("unlabelled", {}, "has no labels: give each example as a tuple"),
        ("negative", {}, "gives the label -1, and classes start at 0"),
        (
            "narrower",
            {},
            r"rows of the shape \[4\] in the training data and \[3\] in the test data: they must be alike",
        ),
        ("table", {"targets": "classes"}, "gives labels in torch.float32, which are no classes: give int64, or use"),
        ("splits", {"options": {"cuont": 3}}, r"takes \(file=None, count=6\), and data.options are {'cuont': 3}"),
        ("tensors", {"file": "x"}, "has no parameter file: leave out data.file"),
        ("splits", {"test_fraction": 0.5}, r"data.test_fraction has no effect, as .* returns \(train, test\)"),
        (
            "tensors",
            {"target": "y"},
            "data.target is for data.name csv, parquet, npz, h5, torch; it cannot be used with",
        ),
        ("Endless", {}, "Endless does not say how many examples it has"),
    ],
)
def test_what_is_no_data_is_refused(function, settings, message):
    with pytest.raises(UserError, match=message):
        own(function, **settings)
