"""Priors as configurations write them: ``normal(0, 0.1)``."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistribution

from ppl_bnn.errors import UserError
from ppl_bnn.models.named_priors import ard, hierarchical, horseshoe, learnt_normal
from ppl_bnn.models.priors import GaussianScaleMixture, Prior, SitePrior

_FAMILIES: dict[str, tuple[Callable[..., SitePrior], str]] = {
    "normal": (dist.Normal, "normal(loc, scale)"),
    "laplace": (dist.Laplace, "laplace(loc, scale)"),
    "student_t": (dist.StudentT, "student_t(df, loc, scale)"),
    "scale_mixture": (GaussianScaleMixture, "scale_mixture(weight, scale1, scale2)"),
    "learnt_normal": (learnt_normal, "learnt_normal(scale)"),
    "hierarchical": (hierarchical, "hierarchical(hyper_prior)"),
    "ard": (ard, "ard(hyper_prior)"),
    "horseshoe": (horseshoe, "horseshoe(scale)"),
    "regularized_horseshoe": (horseshoe, "regularized_horseshoe(scale, slab)"),
}
# Of positive numbers: a scale, an overdispersion.
HYPER_PRIORS: dict[str, tuple[Callable[..., TorchDistribution], str]] = {
    "half_cauchy": (dist.HalfCauchy, "half_cauchy(scale)"),
    "half_normal": (dist.HalfNormal, "half_normal(scale)"),
    "log_normal": (dist.LogNormal, "log_normal(loc, scale)"),
    "gamma": (dist.Gamma, "gamma(concentration, rate)"),
}


def parse_prior(text: str | Mapping[str, str]) -> Prior:
    """Read a prior as configurations write it: ``normal(0, 0.1)``, or a mapping of patterns to such texts.

    A hyper-prior is a number, the scale of a half-Cauchy, or a text of its own: ``ard(half_cauchy(1))``.

    Raises:
        UserError: not of that form, an unknown family, or parameters the family refuses.
    """
    if isinstance(text, Mapping):
        if odd := [entry for entry in text.items() if not all(isinstance(part, str) for part in entry)]:
            raise UserError(f"a prior maps patterns of site names to texts such as normal(0, 1), got {odd[0]!r}")
        return {pattern: _parse_one(value) for pattern, value in text.items()}
    return _parse_one(text)


def _parse_one(text: str) -> SitePrior:
    match = re.fullmatch(r"\s*(hierarchical|ard)\s*\((\s*[a-z_]+\s*\(.*\)\s*)\)\s*", text)
    if match is None:
        return _called(text, _FAMILIES, "prior")  # type: ignore[no-any-return]
    return _FAMILIES[match[1]][0](_called(match[2], HYPER_PRIORS, "hyper-prior"))


def _called(text: str, families: Mapping[str, tuple[Callable[..., Any], str]], what: str) -> Any:
    """The family's function called with the numbers in the text: ``name(number, ...)``."""
    forms = ", ".join(form for _, form in families.values())
    match = re.fullmatch(r"\s*([a-z_]+)\s*\(([^()]*)\)\s*", text)
    if match is None or match[1] not in families:
        raise UserError(f"{what} {text.strip()!r} is not understood; write one of {forms}")
    family, form = families[match[1]]
    try:
        numbers = [float(number) for number in match[2].split(",")]
    except ValueError:
        raise UserError(f"{what} {text!r} has an argument that is not a number; write {form}") from None
    if len(numbers) != form.count(",") + 1:
        raise UserError(f"{what} {text!r} has {len(numbers)} arguments; write {form}")
    if not all(math.isfinite(number) for number in numbers):
        raise UserError(f"{what} {text!r} has an argument that is not finite")
    checked = {"validate_args": True} if isinstance(family, type) else {}
    try:
        return family(*numbers, **checked)
    except ValueError:
        raise UserError(
            f"{what} {text!r} is outside its family's range; in {form} every scale and df is positive, "
            "and a mixture weight lies between 0 and 1"
        ) from None
