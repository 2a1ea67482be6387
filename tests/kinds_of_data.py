"""Tiny data of each kind, and networks for them, that runs name by import path."""

import math

import torch
from torch import nn

from ppl_bnn.data import Arrays, Files, Table, as_examples

TRAIN, TEST = 160, 60


def _both(make):
    whole = make("train")
    return whole.first(TRAIN), whole.rows(slice(TRAIN, None), "test")


def _normal(*shape, seed=0):
    return torch.randn(TRAIN + TEST, *shape, generator=torch.Generator().manual_seed(seed))


def _colours(count, seed=1):
    which = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.one_hot(which, 3).float()


def _table(target, classes):
    x = torch.cat([_normal(2), _colours(TRAIN + TEST)], 1)
    columns = {"width": (0,), "height": (1,), "colour": (2, 3, 4)}
    names = ("width", "height", "colour=blue", "colour=green", "colour=red")
    return _both(lambda split: Table(x, target(x), names, "size", "Parcels", split, classes, columns))


def classes_in_rows(folder, file, progress):
    """A table with a category in three columns, and three classes that the width decides."""
    return _table(lambda x: torch.bucketize(x[:, 0].contiguous(), torch.tensor([-0.4, 0.4])), ("S", "M", "L"))


def numbers_in_rows(folder, file, progress):
    """The same table with numbers to predict, which the width and the colour decide."""
    return _table(lambda x: x[:, 0] + x[:, 2] + 0.1 * _normal(seed=2), ())


def waves(folder, file, progress):
    """Sequences [T, 2] of a slow or a fast wave with noise."""
    label = torch.arange(TRAIN + TEST) % 2
    time = torch.linspace(0, 2 * math.pi, 16)
    x = torch.stack([(time * (1 + 2 * label[:, None])).sin(), (time * (1 + 2 * label[:, None])).cos()], 2)
    return _both(lambda split: Arrays(x + 0.5 * _normal(16, 2), label, "Waves", split, ("slow", "fast"), "speed"))


def sentences(folder, file, progress):
    """Tokens [T] out of 20, of which those of one class are smaller."""
    label = torch.arange(TRAIN + TEST) % 2
    words = torch.randint(1, 12, (TRAIN + TEST, 10), generator=torch.Generator().manual_seed(0))
    return _both(lambda split: Arrays(words + 8 * label[:, None], label, "Sentences", split, ("low", "high"), "mood"))


def pairs(folder, file, progress):
    """Two inputs by name, a sequence and a row of numbers; the target is a number."""
    series, about = _normal(6, 1), _normal(3, seed=1)
    y = series.mean((1, 2)) + about[:, 0]
    return _both(lambda split: Arrays({"series": series, "about": about}, y, "Pairs", split, target="value"))


def pictures(folder, file, progress):
    """Images in files, so to speak: read batch by batch. One half of each is bright."""
    label = torch.arange(TRAIN + TEST) % 2
    x = 0.3 * torch.rand(TRAIN + TEST, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x[label == 0, :, :4] += 0.6
    x[label == 1, :, 4:] += 0.6
    whole = as_examples((255 * x).to(torch.uint8), label, transform=lambda pixels: pixels.float() / 255)
    return _both(lambda split: Files(whole, label, (1, 8, 8), "Halves", split, ("top", "bottom")))


def recurrent(shape, num_outputs):
    """A network of sequences [N, T, D]."""
    return _Last(nn.LSTM(shape[1], 8, batch_first=True), nn.Linear(8, num_outputs))


class _Last(nn.Module):
    def __init__(self, lstm, head):
        super().__init__()
        self.lstm, self.head = lstm, head

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class _Words(nn.Module):
    def __init__(self, num_outputs):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 4), nn.Linear(4, num_outputs)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))


class _Both(nn.Module):
    def __init__(self, shape, num_outputs):
        super().__init__()
        self.first = nn.Linear(math.prod(shape["series"]) + shape["about"][0], 16)
        self.head = nn.Linear(16, num_outputs)

    def forward(self, series, about):
        return self.head(self.first(torch.cat([series.flatten(1), about], 1)).relu())


def bag_of_words(shape, num_outputs):
    """A network of tokens [N, T]."""
    return _Words(num_outputs)


def of_two_inputs(shape, num_outputs):
    """A network of a sequence and a row, by name."""
    return _Both(shape, num_outputs)
