"""The shift stage: the test images under graded shifts, and other data sets."""

import logging

import torch
from torch import Tensor

from ppl_bnn.data import Images, load
from ppl_bnn.experiment.provenance import inputs_of, up_to_date
from ppl_bnn.experiment.report import read_shift
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.native.normals import GENERATOR
from ppl_bnn.prediction.shift import SHIFTS, predict_shifted, temperature_metrics
from ppl_bnn.results import netcdf

log = logging.getLogger(__name__)


def shift(run: Experiment) -> None:
    """Predict the test set under graded shifts, and out-of-distribution data sets; write shift.nc."""
    settings, path = run.config.shift, run.out / "shift.nc"
    state = run.restored(settings.checkpoint)
    inputs = inputs_of(run, state, settings)
    if up_to_date(path, inputs, "shift"):
        return
    from ppl_bnn.results.shift import shift_to_inference_data

    x, y = run.test_tensors()
    shifted, outside = predict_shifted(
        run.model, run.guide, x, y,
        severities=settings.severities(), outside=_outside(run, x),
        num_samples=settings.num_samples if run.guide.sites else 1, seed=settings.seed,
        norm_inputs=run.norm_inputs(), keep=torch.arange(len(x)) if settings.temperature_on else None,
        progress=run.progress, should_stop=run.should_stop,
    )  # fmt: skip
    clean, temperature = shifted[0].predictive, None
    # `stage_check` refuses others.
    assert isinstance(run.test_data, Images)
    assert clean.log_likelihood is not None
    if settings.temperature_on:
        temperature = temperature_metrics(
            clean.probs, clean.log_likelihood, clean.labels, num_held_out=settings.temperature_on
        )
    attrs = {"run": run.name, "inputs": inputs, "step": state.step, "generator": GENERATOR}
    idata = shift_to_inference_data(shifted, outside, run.test_data, temperature=temperature, attrs=attrs)
    netcdf.save(idata, path)
    found = read_shift(path)
    for row in found["shift"]:
        log.info("shift: %(kind)s %(severity)g: accuracy %(accuracy).4f, nll %(nll).4f, ece %(ece).4f", row)
    for row in found["ood"]:
        log.info("shift: %(set)s by %(score)s uncertainty: auroc %(auroc).4f, fpr95 %(fpr95).4f", row)


def _outside(run: Experiment, x: Tensor) -> dict[str, Tensor]:
    sets, settings, data = {}, run.config.shift, run.config.data
    for name in settings.sets(data.name):
        if name == "noise":
            strongest = max(settings.noise)
            sets[f"{run.test_data.title} with noise of {strongest:g}"] = SHIFTS["noise"](x, strongest)
            continue
        train, test = load(name, data.dir, progress=run.progress)
        # The test set of the transformed digits is MNIST's own.
        images = (train if name == "digits100k" else test).first(len(x))
        sets[images.title] = run.inputs(images)
    return sets
