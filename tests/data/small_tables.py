"""Small tables as CSV files."""

import numpy as np
import pandas as pd

from ppl_bnn.data import load


def written(folder, name="rows.csv", **columns):
    path = folder / name
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


def small(folder, count=40, **more):
    """A table with a number, a text, a boolean and a target of numbers."""
    rng = np.random.default_rng(3)
    return written(
        folder, size=rng.normal(5, 2, count), port=[("Cork", "Bonn", "Ayr")[at % 3] for at in range(count)],
        paid=[at % 2 == 0 for at in range(count)], price=rng.normal(200, 30, count), **more,
    )  # fmt: skip


def read(path, target="price", **settings):
    return load("csv", file=path, target=target, progress=False, **settings)
