"""Tables: rows of numbers with a target each, and the table that scikit-learn brings along."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ppl_bnn.data.settings import Request
from ppl_bnn.data.splits import InMemory, check_targets
from ppl_bnn.errors import UserError


@dataclass(frozen=True)
class Table(InMemory):
    """Rows of one split, and the target of each.

    Attributes:
        x: float32 [N, D], standardized by the training rows: mean 0 and standard deviation 1 there.
        y: targets [N]: float32 numbers, or int64 counts or class labels.
        features: the name of each column of x.
        target: name of y, with its unit.
        title: name of the data in figures and metrics.
        split: ``train``, ``test`` or ``validation``.
        classes: the name of each label, where y are class labels; else empty.
        columns: {column of the file: the columns of x that were made of it}; each feature by itself unless given.
        target_scale: mean and standard deviation by which y was standardized.
        feature_scale: {feature: mean and standard deviation by which it was standardized}; not of categories.

    Raises:
        UserError: parts of other shapes or dtypes, or values of x that are not finite.
    """

    x: Tensor
    y: Tensor
    features: tuple[str, ...]
    target: str
    title: str
    split: str
    classes: tuple[str, ...] = ()
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    target_scale: tuple[float, float] | None = None
    feature_scale: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        x, y = self.x, self.y
        if x.dim() != 2 or x.dtype != torch.float32:
            raise UserError(f"a Table's x must be finite numbers, float32 [N, D], got {x.dtype} {list(x.shape)}")
        if not (finite := x.isfinite().all(1)).all():
            row = int((~finite).nonzero()[0])
            raise UserError(f"a Table's x must be finite numbers, float32 [N, D], got NaN or infinity in row {row}")
        check_targets(y, len(x), "a Table's y")
        if len(self.features) != x.shape[1]:
            raise UserError(f"a Table of {x.shape[1]} columns needs as many names of features, got {self.features}")
        if not self.columns:
            object.__setattr__(self, "columns", {name: (at,) for at, name in enumerate(self.features)})

    def __len__(self) -> int:
        return len(self.x)

    @property
    def targets(self) -> Tensor:
        """What is learnt: y."""
        return self.y

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """The tensors of which a checksum is made: x and y."""
        return self.x, self.y

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input: (D,)."""
        return tuple(self.x.shape[1:])

    def inputs(self) -> Tensor:
        """Return x."""
        return self.x

    def rows(self, which: slice | Tensor, split: str | None = None) -> "Table":
        """Return the examples of a slice, or of some numbers, as a split of another name if it is given."""
        return replace(self, x=self.x[which], y=self.y[which], split=split or self.split)


def diabetes(asked: Request) -> tuple[Table, Table]:
    """Return (train, test) of scikit-learn's diabetes table (Efron et al. 2004): 442 patients, 10 features.

    The target is the disease's progression after a year. A quarter of the rows, 110, are the test set, by a fixed
    permutation. x and y are standardized by the rows that are trained on, so an RMSE of 1 is that of the mean.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_diabetes
    except ImportError:
        raise UserError(
            "data.name diabetes is scikit-learn's table, and scikit-learn is not installed: pip install "
            "'ppl_bnn[tables]'"
        ) from None
    bunch = load_diabetes(scaled=False)
    order = np.random.default_rng(0).permutation(len(bunch.target))
    test, train = np.split(order, [len(order) // 4])
    x, y = (_standardized(values, asked.known(train)) for values in (bunch.data, bunch.target))
    found = (
        Table(
            torch.from_numpy(x[rows]),
            torch.from_numpy(y[rows]),
            features=tuple(bunch.feature_names),
            target="disease progression (training standard deviations)",
            title="Diabetes (standardized)",
            split=split,
        )
        for rows, split in ((train, "train"), (test, "test"))
    )
    return next(found), next(found)


def _standardized(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and standard deviation 1 over some rows, float32."""
    known = values[rows]
    return ((values - known.mean(0)) / known.std(0)).astype(np.float32)
