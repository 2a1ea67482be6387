"""Which figures a report draws: they follow the likelihood and the kind of data.

ArviZ and matplotlib take seconds to import, and a report that is up to date does without: they are imported here when a
figure is drawn.
"""

from pathlib import Path

from ppl_bnn.data import Images
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.results import netcdf


def draw_figures(
    run: Experiment, rows: list[dict[str, float]], predictive: Path, shifted: Path, pruning: Path
) -> list[Path]:
    """Draw every figure, and of images the gallery, which is the last of the paths.

    Args:
        rows: of `ppl_bnn.prediction.convergence`; empty for numbers.
        predictive, shifted, pruning: the results, of which the last two may not be there.
    """
    folder = run.out / "figures"
    if not run.of_classes:
        from ppl_bnn.results.figures.number_pruning import draw_number_pruning
        from ppl_bnn.results.figures.numbers import draw_number_figures

        swept = draw_number_pruning(pruning, folder) if pruning.exists() else []
        return draw_number_figures(predictive, folder) + swept
    if not isinstance(run.test_data, Images):
        return _of_labelled_rows(predictive, folder) + _convergence(run, rows)
    figures = _of_images(run, predictive, shifted, pruning) + _convergence(run, rows)
    return [*figures, _gallery(predictive, folder / "gallery.html")]


def _of_images(run: Experiment, predictive: Path, shifted: Path, pruning: Path) -> list[Path]:
    from ppl_bnn.results.figures import predictive as plots
    from ppl_bnn.results.figures.densities import draw_predictive_figures
    from ppl_bnn.results.figures.pruning import draw_pruning
    from ppl_bnn.results.figures.shift import draw_shift_figures

    folder = run.out / "figures"
    figures = plots.draw_figures(predictive, pruning if pruning.exists() else None, folder)
    if pruning.exists():
        figures += draw_pruning([pruning], folder)
    figures += draw_predictive_figures(predictive, folder)
    return figures + (draw_shift_figures(shifted, folder) if shifted.exists() else [])


def _of_labelled_rows(predictive: Path, folder: Path) -> list[Path]:
    """The figures of class labels that show no image."""
    from ppl_bnn.results import idata as inference_data
    from ppl_bnn.results.figures import predictive as plots
    from ppl_bnn.results.figures.densities import risk_coverage
    from ppl_bnn.results.figures.layout import save

    found = inference_data.load(predictive)
    groups, title = netcdf.groups_of(found), str(found.attrs["title"])
    drawings = {"reliability": plots.reliability_diagram, "risk_coverage": risk_coverage}
    if "training" in groups:
        drawings["training"] = plots.training_curves
    if "layers" in groups:
        drawings["snr"] = plots.snr_histograms
    return [save(draw(groups, title), folder / f"{name}.png") for name, draw in drawings.items()]


def _convergence(run: Experiment, rows: list[dict[str, float]]) -> list[Path]:
    from ppl_bnn.results.figures.convergence import draw_convergence

    path, data = run.out / "figures" / "convergence.png", run.test_data
    path.unlink(missing_ok=True)
    if not rows:
        return []
    some = "" if rows[0]["images"] == len(data) else f", the {rows[0]['images']} {run.examples} that have all draws"
    draw_convergence(rows, data.title + some, path)
    return [path]


def _gallery(predictive: Path, path: Path) -> Path:
    from ppl_bnn.results.figures.gallery import write_gallery

    return write_gallery(predictive, path)
