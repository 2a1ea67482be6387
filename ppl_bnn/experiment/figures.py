"""Which figures a report draws: they follow the likelihood and the kind of data.

ArviZ and matplotlib take seconds to import, and a report that is up to date does without: they are imported here when a
figure is drawn.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppl_bnn.data import Images
from ppl_bnn.experiment.originals import columns_of, inputs_at
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.results import netcdf

# Lines of more features than this cannot be told apart.
_FEATURES = 4


def draw_figures(
    run: Experiment, rows: list[dict[str, float]], predictive: Path, shifted: Path, pruning: Path
) -> list[Path]:
    """Draw every figure, and the page of the least certain examples: a gallery of images, or a table.

    Args:
        rows: of `ppl_bnn.prediction.convergence`; empty for numbers.
        predictive, shifted, pruning: the results, of which the last two may not be there.
    """
    folder = run.out / "figures"
    if not run.of_classes:
        figures = _of_numbers(predictive, pruning, folder)
    elif isinstance(run.test_data, Images):
        figures = _of_images(predictive, pruning, folder)
    else:
        figures = _of_classes(predictive, pruning, folder)
    if shifted.exists():
        from ppl_bnn.results.figures.shift import draw_shift_figures

        figures += draw_shift_figures(shifted, folder)
    if run.of_classes:
        figures += _convergence(run, rows)
    return figures + _least_certain(run, predictive, folder)


def _of_numbers(predictive: Path, pruning: Path, folder: Path) -> list[Path]:
    from ppl_bnn.results.figures.number_pruning import draw_number_pruning
    from ppl_bnn.results.figures.numbers import draw_number_figures

    swept = draw_number_pruning(pruning, folder) if pruning.exists() else []
    return draw_number_figures(predictive, folder) + swept


def _of_images(predictive: Path, pruning: Path, folder: Path) -> list[Path]:
    from ppl_bnn.results.figures import predictive as plots
    from ppl_bnn.results.figures.densities import draw_predictive_figures
    from ppl_bnn.results.figures.pruning import draw_pruning

    figures = plots.draw_figures(predictive, pruning if pruning.exists() else None, folder)
    if pruning.exists():
        figures += draw_pruning([pruning], folder)
    return figures + draw_predictive_figures(predictive, folder)


def _of_classes(predictive: Path, pruning: Path, folder: Path) -> list[Path]:
    """The figures of class labels that show no image."""
    from ppl_bnn.results import idata as inference_data
    from ppl_bnn.results.figures import predictive as plots
    from ppl_bnn.results.figures.densities import risk_coverage
    from ppl_bnn.results.figures.layout import save
    from ppl_bnn.results.figures.pruning import draw_pruning

    found = inference_data.load(predictive)
    groups, title = netcdf.groups_of(found), str(found.attrs["title"])
    drawings = {"reliability": plots.reliability_diagram}
    if groups["observed_data"]["y"].ndim == 1:
        drawings["risk_coverage"] = risk_coverage
    if "training" in groups:
        drawings["training"] = plots.training_curves
    if "layers" in groups:
        drawings["snr"] = plots.snr_histograms
    figures = [save(draw(groups, title), folder / f"{name}.png") for name, draw in drawings.items()]
    return figures + (draw_pruning([pruning], folder) if pruning.exists() else [])


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

    def pixels(at: np.ndarray) -> np.ndarray:
        x = inputs_at(run.test_data, torch.from_numpy(at))
        assert isinstance(x, Tensor)
        return (255 * x).round().to(torch.uint8).numpy()

    def sequences(at: np.ndarray) -> np.ndarray:
        x = inputs_at(run.test_data, torch.from_numpy(at))
        assert isinstance(x, Tensor)
        return x.numpy()

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
