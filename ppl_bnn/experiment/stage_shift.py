"""The shift stage: the test set under graded shifts, and out-of-distribution data."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from ppl_bnn.experiment.provenance import inputs_of, up_to_date
from ppl_bnn.experiment.report import read_shift
from ppl_bnn.experiment.scores import told
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.experiment.shift_kinds import (
    noise_of,
    ood_names,
    other_data,
    outside_identities,
    severities_for,
    shifts_for,
    tilt_column,
)
from ppl_bnn.native.normals import GENERATOR
from ppl_bnn.prediction.changed import changed
from ppl_bnn.prediction.shift import predict_shifted, temperature_metrics
from ppl_bnn.prediction.shifts import Shift
from ppl_bnn.results import netcdf

log = logging.getLogger(__name__)


def shift(run: Experiment) -> None:
    """Predict the test set under graded shifts, and out-of-distribution data; write shift.nc."""
    settings, path = run.config.shift, run.out / "shift.nc"
    state = run.restored(settings.checkpoint)
    # A report does without the out-of-distribution data.
    inputs = inputs_of(run, state, settings) | {"shift.ood": outside_identities(run)}
    if up_to_date(path, inputs, "shift"):
        return
    from ppl_bnn.results.shift import shift_to_inference_data

    shifts, column = shifts_for(run), tilt_column(run)
    x, y = run.examples_of(run.test_data)
    shifted, outside = predict_shifted(
        run.model, run.guide, x, y,
        severities=severities_for(run, shifts), outside=_outside(run, x, shifts), shifts=shifts,
        tilt_by=None if column is None else column[1],
        num_samples=settings.num_samples if run.guide.sites else 1, seed=settings.seed,
        norm_inputs=run.norm_inputs(), keep=torch.arange(len(run.test_data)) if settings.temperature_on else None,
        metrics_alone=True, progress=run.progress, should_stop=run.should_stop,
    )  # fmt: skip
    clean, temperature = shifted[0].predictive, None
    if settings.temperature_on:
        assert clean is not None
        assert clean.log_likelihood is not None
        temperature = temperature_metrics(
            clean.probs, clean.log_likelihood, clean.labels, num_held_out=settings.temperature_on
        )
    attrs = {"run": run.name, "inputs": inputs, "step": state.step, "generator": GENERATOR, "examples": run.examples}
    if column is not None:
        attrs["column"] = column[0]
    idata = shift_to_inference_data(shifted, outside, run.test_data, temperature=temperature, attrs=attrs)
    netcdf.save(idata, path)
    found = read_shift(path)
    for row in found["shift"]:
        log.info("shift: %s %g: %s", row["kind"], row["severity"], told(row, but=("brier",)))
    for row in found["ood"]:
        log.info("shift: %(set)s by %(score)s uncertainty: auroc %(auroc).4f, fpr95 %(fpr95).4f", row)


def _outside(run: Experiment, x: Any, shifts: Mapping[str, Shift]) -> dict[str, Any]:
    """{title: inputs or examples} of each out-of-distribution data set."""
    sets, title = {}, run.test_data.title
    for name in ood_names(run, shifts):
        if name == "noise":
            noise, strongest = noise_of(run.config.shift, shifts)
            sets[f"{title} with noise of {strongest:g}"] = changed(x, noise, strongest)
        elif name == "shuffled":
            sets[f"{title}, shuffled"] = changed(x, shifts["shuffled"], 1.0)
        else:
            data = other_data(run, name)
            sets[data.title] = run.inputs(data) if data.in_memory else data.examples()
    return sets
