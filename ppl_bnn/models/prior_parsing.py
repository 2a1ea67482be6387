"""Priors as configurations write them: ``normal(0, 0.1)``."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin

from ppl_bnn.errors import UserError
from ppl_bnn.models.named_priors import ard, hierarchical, horseshoe, learnt_normal
from ppl_bnn.models.priors import GaussianScaleMixture, Prior, SitePrior
from ppl_bnn.registry import lookup, parameters_of

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
_PATH = re.compile(r"[\w.]+:[\w.]+")
_OWN = ", or the import path of your own: package.module:name"
# Of positive numbers: a scale, an overdispersion.
HYPER_PRIORS: dict[str, tuple[Callable[..., TorchDistribution], str]] = {
    "half_cauchy": (dist.HalfCauchy, "half_cauchy(scale)"),
    "half_normal": (dist.HalfNormal, "half_normal(scale)"),
    "log_normal": (dist.LogNormal, "log_normal(loc, scale)"),
    "gamma": (dist.Gamma, "gamma(concentration, rate)"),
}


def parse_prior(text: str | Mapping[str, str]) -> Prior:
    """Read a prior as configurations write it: ``normal(0, 0.1)``, or a mapping of patterns to such texts.

    A hyper-prior is a number, the scale of a half-Cauchy, or a text of its own: ``ard(half_cauchy(1))``. An import path
    of the user's own names a function of (site, shape) that returns a distribution, or one without arguments that
    returns a prior.

    Raises:
        UserError: not of that form, an unknown family, parameters the family refuses, or a function that fails.
    """
    if isinstance(text, Mapping):
        if odd := [entry for entry in text.items() if not all(isinstance(part, str) for part in entry)]:
            raise UserError(f"a prior maps patterns of site names to texts such as normal(0, 1), got {odd[0]!r}")
        return {pattern: _parse_one(value) for pattern, value in text.items()}
    # One of the user's own may be a mapping too.
    return _own(text) if _PATH.fullmatch(text) else _parse_one(text)


def _own(path: str) -> Prior:
    found: Any = lookup(_FAMILIES, path, what="model.prior")
    # A function of the site is a prior already; one that needs nothing makes the prior.
    if any(parameter.default is parameter.empty for parameter in parameters_of(found).values()):
        return lambda site, shape: _called_own(path, found, site, shape)
    made = _called_own(path, found)
    if not (isinstance(made, TorchDistributionMixin | Mapping) or callable(made)):
        raise UserError(f"model.prior {path} must return a distribution, a mapping or a function, got {made!r:.60}")
    return made  # type: ignore[no-any-return]


def _called_own(path: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        given = ", ".join(map(str, arguments))
        raise UserError(f"model.prior {path}({given}) failed: {type(error).__name__}: {error}") from error


def _parse_one(text: str) -> SitePrior:
    if _PATH.fullmatch(text):
        if isinstance(found := _own(text), Mapping):
            raise UserError(f"model.prior {text} returns a mapping, and a mapping holds no further ones")
        return found
    match = re.fullmatch(r"\s*(hierarchical|ard)\s*\((\s*[a-z_]+\s*\(.*\)\s*)\)\s*", text)
    if match is None:
        return _called(text, _FAMILIES, "prior")  # type: ignore[no-any-return]
    return _FAMILIES[match[1]][0](_called(match[2], HYPER_PRIORS, "hyper-prior"))


def _called(text: str, families: Mapping[str, tuple[Callable[..., Any], str]], what: str) -> Any:
    """The family's function called with the numbers in the text: ``name(number, ...)``."""
    forms = ", ".join(form for _, form in families.values())
    match = re.fullmatch(r"\s*([a-z_]+)\s*\(([^()]*)\)\s*", text)
    if match is None or match[1] not in families:
        raise UserError(
            f"{what} {text.strip()!r} is not understood; write one of {forms}{_OWN if what == 'prior' else ''}"
        )
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
