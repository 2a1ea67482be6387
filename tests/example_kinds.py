"""The same examples in every kind that `as_examples` takes."""

import itertools
import random

import h5py
import numpy as np
import torch
from small_training import X, Y
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, get_worker_info

from ppl_bnn import as_examples


class Pairs(Dataset):
    """A map-style data set, item by item, as a user writes one."""

    def __init__(self, x=X, y=Y):
        self.x, self.y = x, y

    def __getitem__(self, row):
        return self.x[row], self.y[row]

    def __len__(self):
        return len(self.x)


class Dicts(Pairs):
    """Items that are dicts of arrays and numbers."""

    def __getitem__(self, row):
        return {"features": self.x[row].numpy(), "kind": int(self.y[row])}


class Random(Pairs):
    """Items that torch, numpy and Python change at random."""

    def __getitem__(self, row):
        shift = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        return self.x[row] + float(shift), self.y[row]


class Stream(IterableDataset):
    """The examples one after the other; worker processes divide them."""

    def __init__(self, x=X, y=Y):
        self.x, self.y = x, y

    def __iter__(self):
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return itertools.islice(zip(self.x, self.y, strict=True), start, None, step)


def padded(items):
    """A collate function for examples of different lengths."""
    x = torch.nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True)
    return x, torch.stack([y for _, y in items])


def mapped_files(folder, x=X, y=Y):
    """The examples in memory-mapped files."""
    folder.mkdir(parents=True, exist_ok=True)
    # Written once, as files are known by their times.
    for name, part in (("x", x), ("y", y)):
        if not (folder / f"{name}.npy").exists():
            np.save(folder / f"{name}.npy", part.numpy())
    return tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("x", "y"))


def in_hdf5(path, x=X, y=Y):
    """The examples in an HDF5 file, x in compressed chunks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=x.numpy(), chunks=(7, x.shape[1]), compression="gzip")
            file["y"] = y.numpy()
    file = h5py.File(path)
    return file["x"], file["y"]


# name: a function of (folder, x, y) that makes the examples.
KINDS = {
    "tensors": lambda folder, x, y: as_examples(x, y),
    "a tuple": lambda folder, x, y: as_examples((x, y)),
    "a dict": lambda folder, x, y: as_examples({"x": x, "y": y}),
    "arrays": lambda folder, x, y: as_examples(x.numpy(), y.numpy()),
    "memory-mapped arrays": lambda folder, x, y: as_examples(*mapped_files(folder, x, y)),
    "a memory-mapped x beside y": lambda folder, x, y: as_examples(mapped_files(folder, x, y)[0], y),
    "HDF5": lambda folder, x, y: as_examples({"x": (h5 := in_hdf5(folder / "h5", x, y))[0], "y": h5[1]}),
    "a Dataset": lambda folder, x, y: as_examples(Pairs(x, y)),
    "a Dataset, by workers": lambda folder, x, y: as_examples(Pairs(x, y), num_workers=2),
    "a Dataset of dicts": lambda folder, x, y: as_examples(Dicts(x, y), target="kind"),
    "random items, by workers": lambda folder, x, y: as_examples(Random(x, y), num_workers=2),
    "a list": lambda folder, x, y: as_examples(list(zip(x, y, strict=True))),
    "a DataLoader": lambda folder, x, y: as_examples(DataLoader(Pairs(x, y), 8, shuffle=True, num_workers=1)),
    "a DataLoader of tensors": lambda folder, x, y: as_examples(DataLoader(TensorDataset(x, y), 8)),
}
# In their own order.
ITERABLES = {
    "an iterable": lambda folder, x, y: as_examples(Stream(x, y), length=len(x)),
    "an iterable, by workers": lambda folder, x, y: as_examples(Stream(x, y), length=len(x), num_workers=2),
    "a DataLoader of an iterable": lambda folder, x, y: as_examples(DataLoader(Stream(x, y), 7), length=len(x)),
    "a DataLoader as it is": lambda folder, x, y: as_examples(DataLoader(Pairs(x, y), 7), length=len(x)),
}
