"""The figures of a report: those of its results, convergence, and what shows the least certain examples.

ArviZ and matplotlib take seconds to import, and a report that is up to date does without: they are imported here when a
figure is drawn.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppl_bnn.data import Images, first_inputs
from ppl_bnn.experiment.originals import columns_of
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.results import netcdf

# Lines of more features than this cannot be told apart.
_FEATURES = 4


def draw_all(
    run: Experiment, rows: list[dict[str, float]], predictive: Path, shifted: Path, pruning: Path
) -> list[Path]:
    """Draw every figure, and the page of the least certain examples: a gallery of images, or a table.

    Args:
        rows: of `ppl_bnn.prediction.convergence`; empty for numbers.
        predictive, shifted, pruning: the results, of which the last two may not be there.
    """
    from ppl_bnn.results.figures.choice import draw_figures

    folder = run.out / "figures"
    there = {name: path for name, path in (("pruning", pruning), ("shift", shifted)) if path.exists()}
    figures = draw_figures(predictive, folder, **there)
    if run.of_classes:
        figures += _convergence(run, rows)
    return figures + _least_certain(run, predictive, folder)


def _convergence(run: Experiment, rows: list[dict[str, float]]) -> list[Path]:
    from ppl_bnn.results.figures.convergence import draw_convergence

    path, data = run.out / "figures" / "convergence.png", run.test_data
    path.unlink(missing_ok=True)
    if not rows:
        return []
    some = "" if rows[0]["images"] == len(data) else f", the {rows[0]['images']} {run.examples} that have all draws"
    draw_convergence(rows, data.title + some, path, word=run.examples)
    return [path]


def _least_certain(run: Experiment, predictive: Path, folder: Path) -> list[Path]:
    """The gallery of images and their classes; of all others a table and, of short sequences, a figure."""
    from ppl_bnn.results.figures.gallery import write_gallery
    from ppl_bnn.results.figures.least_certain import write_least_certain
    from ppl_bnn.results.figures.sequences import draw_least_certain

    def shown(at: np.ndarray) -> Tensor:
        x = first_inputs(run.test_data.rows(torch.from_numpy(at)), len(at))
        assert isinstance(x, Tensor)
        return x

    def pixels(at: np.ndarray) -> np.ndarray:
        return (255 * shown(at)).round().to(torch.uint8).numpy()

    def sequences(at: np.ndarray) -> np.ndarray:
        return shown(at).numpy()

    drawn = netcdf.read_group(predictive, "posterior_predictive")
    kept = drawn is not None and drawn.sizes["obs_id"] > 0
    if run.of_classes and run.examples == "images" and kept and run.test_data.targets.dim() == 1:
        in_file = isinstance(run.test_data, Images)
        return [write_gallery(predictive, folder / "gallery.html", pixels=None if in_file else pixels)]
    data, figures = run.test_data, []
    if run.examples == "sequences" and len(data.shape) == 2 and data.shape[1] <= _FEATURES:
        path = folder / "least_certain.png"
        figures.append(draw_least_certain(predictive, sequences, path, scale=data.target_scale))
    table = write_least_certain(
        predictive, folder, columns=columns_of(data), scale=data.target_scale, word=run.examples
    )
    return figures + table
