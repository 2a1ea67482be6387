"""Every figure that a result has: they follow the likelihood, and images have some of their own."""

from pathlib import Path

from ppl_bnn.errors import UserError
from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures import predictive as plots
from ppl_bnn.results.figures.densities import draw_predictive_figures, risk_coverage
from ppl_bnn.results.figures.layout import save
from ppl_bnn.results.figures.number_pruning import draw_number_pruning
from ppl_bnn.results.figures.numbers import draw_number_figures
from ppl_bnn.results.figures.pruning import draw_pruning
from ppl_bnn.results.figures.shift import draw_shift_figures


def draw_figures(
    predictive: Path | str, folder: Path | str, *, pruning: Path | str | None = None, shift: Path | str | None = None
) -> list[Path]:
    """Draw every figure of a saved predictive into `folder` as PNG and return their paths.

    Args:
        predictive: a file of `ppl_bnn.to_inference_data`, with the observed y.
        pruning: of `ppl_bnn.sweep_to_inference_data`, drawn beside it.
        shift: a run's ``shift.nc``.

    Raises:
        FileError: a file that is missing, damaged or another result.
        UserError: the predictive has no observed y.
    """
    path, folder = Path(predictive), Path(folder)
    swept = None if pruning is None else Path(pruning)
    groups = netcdf.groups_of(found := inference_data.load(path))
    if "observed_data" not in groups:
        raise UserError(f"{path} has no observed y to draw figures with: predict(model, posterior, x, y)")
    title = str(found.attrs["title"])
    if "class" not in groups["uncertainty"].sizes:
        figures = draw_number_figures(path, folder) + (draw_number_pruning(swept, folder) if swept else [])
    elif "image" in groups.get("constant_data", {}):
        figures = plots.draw_figures(path, swept, folder) + (draw_pruning([swept], folder) if swept else [])
        figures += draw_predictive_figures(path, folder)
    else:
        drawings = {"reliability": plots.reliability_diagram}
        if groups["observed_data"]["y"].ndim == 1:
            drawings["risk_coverage"] = risk_coverage
        if "training" in groups:
            drawings["training"] = plots.training_curves
        if "layers" in groups:
            drawings["snr"] = plots.snr_histograms
        figures = [save(draw(groups, title), folder / f"{name}.png") for name, draw in drawings.items()]
        figures += draw_pruning([swept], folder) if swept else []
    return figures + (draw_shift_figures(Path(shift), folder) if shift is not None else [])
