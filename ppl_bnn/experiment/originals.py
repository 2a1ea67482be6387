"""Rows of a run's table as they were before standardization, for its report."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ppl_bnn.data import Split, Table


def columns_of(data: Split) -> Callable[[np.ndarray], dict[str, Sequence[object]]] | None:
    """What gives a table's columns at some positions [M], {column: its values}; None for data of other kinds.

    Values are those before standardization. A one-hot category is one column of the categories' names.
    """
    if not isinstance(data, Table):
        return None

    def columns(at: np.ndarray) -> dict[str, Sequence[object]]:
        values = data.x[torch.from_numpy(at)]
        return {name: _values(data, name, values[:, list(places)]) for name, places in data.columns.items()}

    return columns


def _values(data: Table, name: str, values: Tensor) -> list[object]:
    """The values of one column, of its columns [M, K] in x."""
    if values.shape[1] == 1:
        mean, std = data.feature_scale.get(name, (0.0, 1.0))
        return [mean + std * value for value in values[:, 0].double().tolist()]
    names = [data.features[place].removeprefix(f"{name}=") for place in data.columns[name]]
    # All are 0 where the training rows have no such category.
    return [names[int(row.argmax())] if bool(row.any()) else "" for row in values]
