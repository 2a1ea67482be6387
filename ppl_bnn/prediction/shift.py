"""How a posterior predictive fares where its data have shifted, and whether it notices what is none of its data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppl_bnn import metrics
from ppl_bnn.data import Examples, as_examples
from ppl_bnn.data.tensors import is_plain
from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Posterior
from ppl_bnn.inputs import Inputs, count, form_of, lead, rows
from ppl_bnn.models.likelihoods import Categorical
from ppl_bnn.prediction.changed import IN_MEMORY, Changed, changed
from ppl_bnn.prediction.predictive import predict
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.prediction.shifts import SHIFTS, Shift, shifts_of, tilted

__all__ = [
    "SHIFTS", "Shifted", "predict_shifted", "reliance", "shift_metrics", "shifts_of", "temperature_metrics",
]  # fmt: skip
# Of numbers, single draws are kept of so many examples that their values are no more than this: for the CRPS.
_KEPT_VALUES = 1_000_000


@dataclass(frozen=True)
class Shifted:
    """A test set after one shift (kind ``none``: before any).

    Attributes:
        metrics: `shift_metrics` of its predictive.
        predictive: None where `predict_shifted` was asked for metrics alone; never of the test set as it is.
    """

    kind: str
    severity: float
    metrics: dict[str, float]
    predictive: Predictive | None


def predict_shifted(
    net: nn.Module,
    guide: Posterior,
    x: Any,
    y: Tensor | None = None,
    *,
    severities: Mapping[str, Sequence[float]],
    outside: Mapping[str, Any],
    shifts: Mapping[str, Shift] | None = None,
    tilt_by: Tensor | None = None,
    num_samples: int = 100,
    seed: int = 0,
    norm_inputs: Tensor | None = None,
    keep: Tensor | None = None,
    metrics_alone: bool = False,
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[list[Shifted], dict[str, Predictive]]:
    """Predict a test set as it is, under every shift at every severity, and other data, with the same draws each time.

    Args:
        net: a `Model` of any likelihood, or a network of class logits (as in `ppl_bnn.predict`).
        x, y: inputs [N, ...] and observed values [N, ...]; or anything that `as_examples` takes, labels included.
        severities: {name of a shift: its severities}. ``covariate`` tilts the distribution of the test examples instead
            (`ppl_bnn.prediction.shifts.tilted`) and needs `tilt_by`.
        outside: {name of a set: its inputs [M, ...], or what `as_examples` takes}. Its labels are not used.
        shifts: {name: shift} (default: for images [N, channels, height, width] `SHIFTS`, with pixels in [0, 1]; for
            other inputs `shifts_of` these. Pass ``shifts_of(train_x)`` for units of the training inputs). One of your
            own takes (inputs, severity) and returns inputs of the same shape.
        tilt_by: the column, in training standard deviations, by which ``covariate`` tilts, [N].
        norm_inputs: as in `predict`.
        keep: positions of the examples of the test set as it is whose single draws are kept (default: none; of numbers,
            evenly spread ones for the CRPS).
        metrics_alone: keep only metrics under shifts, not the predictives: of large test sets they fill the memory.

    Raises:
        UserError: an unknown shift, inputs of another shape, or, with the shifts of images, pixels that are not finite
            and in [0, 1]; before any prediction is made. Of data that are not in memory, whose batches may be padded
            to any length, only the number of dimensions and the kind of numbers must agree.
        Interrupted: `should_stop` said so.
    """
    x, y = _given(x, y)
    outside = {name: of if isinstance(of, IN_MEMORY) else as_examples(of) for name, of in outside.items()}
    if shifts is None:
        shifts = SHIFTS if _is_images(x) else shifts_of(_first(x))
    known = {**shifts, **({} if tilt_by is None else {"covariate": tilt_by})}
    if unknown := severities.keys() - known.keys():
        raise UserError(f"unknown shift {min(unknown)!r}; the shifts are {', '.join(known)}")
    for name, inputs in {"the test set": x, **outside}.items():
        # A collate_fn may pad each batch to a length of its own.
        sizes = _in_memory(inputs) and _in_memory(x)
        given, taken = (form_of(_first(of), sizes=sizes) for of in (inputs, x))
        if given != taken:
            raise UserError(f"{name} has {_noun(x)} {_text(given)}, the network takes {_text(taken)}")
        if isinstance(inputs, Tensor) and any(shifts.get(kind) is shift for kind, shift in SHIFTS.items()):
            check_images(inputs, name)
    drawn = getattr(getattr(net, "likelihood", None), "drawn", False)

    def predictive(inputs: Inputs | Examples, labels: Tensor | None, kept: Tensor | None = None) -> Predictive:
        here, asked = isinstance(inputs, IN_MEMORY), kept is not None
        if kept is None and drawn and here:
            number = count(inputs)
            kept = torch.linspace(0, number - 1, min(number, max(1, _KEPT_VALUES // num_samples))).round().long()
        elif kept is None and not drawn:
            # The single draws of so many sets would fill the memory.
            kept = torch.arange(0)
        return predict(
            net, guide, inputs, labels,
            num_samples=num_samples, seed=seed, norm_inputs=norm_inputs, keep=kept, log_likelihood=here or asked,
            progress=progress, should_stop=should_stop,
        )  # fmt: skip

    clean = predictive(x, y, keep)
    shifted = [Shifted("none", 0.0, shift_metrics(clean), clean)]
    for kind, levels in severities.items():
        for level in levels:
            if kind == "covariate":
                assert tilt_by is not None
                each = _chosen(x, y, tilted(tilt_by, level))
            else:
                each = changed(x, shifts[kind], level), y
            found = predictive(*each)
            shifted.append(Shifted(kind, level, shift_metrics(found), None if metrics_alone else found))
    return shifted, {name: predictive(_unlabelled(inputs), None) for name, inputs in outside.items()}


def shift_metrics(predictive: Predictive) -> dict[str, float]:
    """The likelihood's scores, and the three uncertainties' means over the examples, in its units.

    Of class labels, one an example: accuracy, nll, ece, brier, adaptive_ece and aurc, and uncertainties in nats.
    """
    found = predictive.summary()
    del found["num_samples"], found["seconds"]
    parts = dict(zip(("total", "aleatoric", "epistemic"), predictive.uncertainties(), strict=True))
    return {
        **found,
        **(reliance(predictive.mean_probs, predictive.labels) if has_one_label(predictive) else {}),
        **{name: float(values.mean()) for name, values in parts.items()},
    }


def has_one_label(predictive: Predictive) -> bool:
    """Whether each example has one observed class label."""
    y = predictive.y
    known = y is not None and y.dim() == 1 and not y.is_floating_point()
    return known and isinstance(predictive.likelihood, Categorical) and predictive.likelihood.ignore_index is None


def reliance(mean_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """adaptive_ece and aurc (examples ranked by their top probability) of an averaged predictive [N, C]."""
    top, choice = mean_probs.max(1)
    return {
        "adaptive_ece": metrics.adaptive_ece(mean_probs, labels),
        "aurc": float(metrics.risk_coverage(top, choice == labels)[1].mean()),
    }


def temperature_metrics(
    probs: Tensor, log_likelihood: Tensor, labels: Tensor, *, num_held_out: int
) -> dict[str, float]:
    """Fit a temperature on the first `num_held_out` examples; measure the others, as they were and scaled.

    Args:
        probs: each draw's probabilities, [S, N, C]: their mean is scaled, which must not have been rounded to 0.
        log_likelihood: log p(y_i | x_i, draw s), [S, N].
        labels: [N].

    Returns temperature, held_out and measured (numbers of examples), and nll, ece and adaptive_ece of the others with
    the suffixes ``_plain`` and ``_scaled``.

    Raises:
        UserError: `num_held_out` leaves no examples to fit on or to measure.
    """
    if not 0 < num_held_out < len(labels):
        raise UserError(f"a temperature can be fitted on 1 to {len(labels) - 1} of the images, got {num_held_out}")
    mean_probs = probs.mean(0, dtype=torch.float64)
    temperature = metrics.fit_temperature(mean_probs[:num_held_out], labels[:num_held_out])
    plain, truth = mean_probs[num_held_out:], labels[num_held_out:]
    found = {"temperature": temperature, "held_out": num_held_out, "measured": len(truth)}
    scaled = metrics.tempered(plain, temperature)
    found["nll_plain"] = metrics.nll(log_likelihood[:, num_held_out:])
    found["nll_scaled"] = metrics.nll(scaled.gather(1, truth.unsqueeze(1)).log().T)
    for suffix, averaged in (("plain", plain), ("scaled", scaled)):
        found[f"ece_{suffix}"] = metrics.ece(averaged, truth)
        found[f"adaptive_ece_{suffix}"] = metrics.adaptive_ece(averaged, truth)
    return found


def check_images(x: Tensor, name: str) -> None:
    """Raise UserError for pixels that are not finite or lie outside [0, 1]."""
    bad = ~((x >= 0) & (x <= 1)).flatten(1).all(1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise UserError(
            f"pixels must be finite and in [0, 1]: {int(bad.sum())} of {len(x)} images of {name} have others, "
            f"the first is image {first} ({float(x[first].min()):.4g} to {float(x[first].max()):.4g})"
        )


def _given(x: Any, y: Any) -> tuple[Inputs | Examples, Tensor | None]:
    """Inputs and labels in memory, or examples that have both."""
    if isinstance(x, Tensor) or (isinstance(x, IN_MEMORY) and y is not None):
        return x, y
    found = as_examples(x, y)
    if is_plain(found):
        return found.x, found.y
    return found, None


def _is_images(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()


def _noun(x: object) -> str:
    return "images" if _is_images(x) else "inputs"


def _text(shape: object) -> str:
    return str(list(shape)) if isinstance(shape, tuple) and all(isinstance(n, int) for n in shape) else str(shape)


def _in_memory(x: Inputs | Examples) -> bool:
    return isinstance(x, IN_MEMORY) or is_plain(x)


def _first(x: Inputs | Examples) -> Inputs:
    """Inputs of known shape: tensors as they are, or the first of examples."""
    if isinstance(x, IN_MEMORY):
        lead(x)
        return x
    return Changed(x).take(torch.arange(min(2, len(x))))[0]


def _chosen(x: Inputs | Examples, y: Tensor | None, positions: Tensor) -> tuple[Inputs | Examples, Tensor | None]:
    if isinstance(x, IN_MEMORY):
        return rows(x, positions), None if y is None else rows(y, positions)
    return Changed(x, positions=positions), None


def _unlabelled(x: Inputs | Examples) -> Inputs | Examples:
    return x if isinstance(x, IN_MEMORY) else Changed(x, labelled=False)
