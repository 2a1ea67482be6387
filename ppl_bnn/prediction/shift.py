"""How a posterior predictive fares where its data have shifted, and whether it notices what is none of its data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ppl_bnn import metrics
from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Posterior
from ppl_bnn.prediction.predictive import predict
from ppl_bnn.prediction.result import Predictive


@dataclass(frozen=True)
class Shifted:
    """The predictive of a test set after one shift (kind ``none``: before any)."""

    kind: str
    severity: float
    predictive: Predictive


def rotation(x: Tensor, degrees: float) -> Tensor:
    """Images [N, channels, height, width] turned counter-clockwise; the corners that come in are 0."""
    # Imported here: torchvision takes 3 seconds that training should not wait for.
    from torchvision.transforms.v2 import functional as transforms

    return transforms.rotate(x, degrees, interpolation=transforms.InterpolationMode.BILINEAR)


def noise(x: Tensor, scale: float) -> Tensor:
    """Images in [0, 1] with Gaussian noise of this standard deviation, the same noise for every call, clamped."""
    generator = torch.Generator().manual_seed(0)
    return (x + scale * torch.randn(x.shape, generator=generator).to(x.device)).clamp(0, 1)


def blur(x: Tensor, scale: float) -> Tensor:
    """Images blurred by a Gaussian whose standard deviation is `scale` pixels."""
    from torchvision.transforms.v2 import functional as transforms

    return transforms.gaussian_blur(x, [2 * math.ceil(3 * scale) + 1] * 2, [scale] * 2)


SHIFTS: dict[str, Callable[[Tensor, float], Tensor]] = {"rotation": rotation, "noise": noise, "blur": blur}


def predict_shifted(
    net: nn.Module,
    guide: Posterior,
    x: Tensor,
    y: Tensor,
    *,
    severities: Mapping[str, Sequence[float]],
    outside: Mapping[str, Tensor],
    num_samples: int = 100,
    seed: int = 0,
    norm_inputs: Tensor | None = None,
    keep: Tensor | None = None,
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[list[Shifted], dict[str, Predictive]]:
    """Predict a test set as it is, under every shift at every severity, and other data, with the same draws each time.

    Args:
        x, y: images [N, channels, height, width] in [0, 1] and labels [N].
        severities: {kind of shift in `SHIFTS`: its severities}.
        outside: {name of a set: its images [M, channels, height, width]}. It has no labels among the classes; those in
            its predictive mean nothing.
        norm_inputs: as in `predict`.
        keep: positions of the examples of the test set as it is whose single draws are kept (default: none).

    Raises:
        UserError: an unknown shift, images of another shape, or pixels that are not finite and in [0, 1]; before any
            prediction is made.
        Interrupted: `should_stop` said so.
    """
    if unknown := severities.keys() - SHIFTS.keys():
        raise UserError(f"unknown shift {min(unknown)!r}; the shifts are {', '.join(SHIFTS)}")
    for name, images in {"the test set": x, **outside}.items():
        if images.shape[1:] != x.shape[1:]:
            raise UserError(f"{name} has images {list(images.shape[1:])}, the network takes {list(x.shape[1:])}")
        check_images(images, name)

    def predictive(images: Tensor, labels: Tensor, kept: Tensor | None = None) -> Predictive:
        # The single draws of so many sets would fill the memory.
        kept = torch.arange(0) if kept is None else kept
        return predict(
            net, guide, images, labels,
            num_samples=num_samples, seed=seed, norm_inputs=norm_inputs, keep=kept, progress=progress,
            should_stop=should_stop,
        )  # fmt: skip

    shifted = [Shifted("none", 0.0, predictive(x, y, keep))]
    for kind, levels in severities.items():
        shifted += [Shifted(kind, level, predictive(SHIFTS[kind](x, level), y)) for level in levels]
    unlabelled = {
        name: torch.zeros(len(images), dtype=torch.int64, device=images.device) for name, images in outside.items()
    }
    return shifted, {name: predictive(images, unlabelled[name]) for name, images in outside.items()}


def shift_metrics(predictive: Predictive) -> dict[str, float]:
    """Accuracy, nll, ece, adaptive_ece, brier and aurc, and the three uncertainties' means over the images (nats)."""
    found = predictive.summary()
    del found["num_samples"], found["seconds"]
    parts = dict(zip(("total", "aleatoric", "epistemic"), predictive.uncertainties(), strict=True))
    return {
        **found,
        **reliance(predictive.mean_probs, predictive.labels),
        **{name: float(values.mean()) for name, values in parts.items()},
    }


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
