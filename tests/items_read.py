"""A data set that counts how often each item is read, predicted in chunks."""

import torch
from torch.utils.data import Dataset

from ppl_bnn import predict

N = 95
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(1))


class Items(Dataset):
    """Examples as (x, y), or x alone, that count how often each is read."""

    def __init__(self, x=X, y=Y, bad=None):
        self.x, self.y, self.bad, self.read = x, y, bad, [0] * len(x)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        if row == self.bad:
            raise OSError("cannot be decoded")
        self.read[row] += 1
        return self.x[row] if self.y is None else (self.x[row], self.y[row])


def drawn(net, guide, x, y=None, **settings):
    settings = {"num_samples": 6, "batch_size": 10, "method": "draws", "progress": False, **settings}
    return predict(net, guide, x, y, **settings)


def check_same(found, expected, *, but=()):
    """All parts are the same, bit for bit; scores of single draws, which are means over examples, to rounding."""
    for name in ("means", "kept", "y", "log_likelihood", "squares", "reference", "draws", "samples", "log_sum"):
        own, other = getattr(found, name), getattr(expected, name)
        assert name in but or (own is None and other is None) or torch.equal(own, other), name
    for name, total in expected.sums.items():
        assert name in but or torch.equal(found.sums[name], total), name
    if expected.draw_scores is not None:
        torch.testing.assert_close(found.draw_scores, expected.draw_scores, equal_nan=True)
