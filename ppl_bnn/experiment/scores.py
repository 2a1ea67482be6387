"""A likelihood's scores: in the log, and where results keep them."""

from collections.abc import Mapping
from typing import Any

# Results of class labels have these; a result of another likelihood names its own in this attribute.
CLASS_SCORES = ("accuracy", "nll", "ece", "brier")
SCORES = "scores"

# Numbers have a score at each of five levels: the log shows these.
_TOLD = (*CLASS_SCORES, "rmse", "crps", "coverage_90", "quantile_error")


def told(found: Mapping[str, float], *, but: tuple[str, ...] = ()) -> str:
    """The chief scores in words, such as ``accuracy 0.9812, nll 0.0613``, in the order of the likelihood."""
    return ", ".join(f"{name} {found[name]:.4f}" for name in found if name in _TOLD and name not in but)


def score_names(attrs: Mapping[str, Any]) -> list[str]:
    """The names of the scores that a saved result has, by its attributes."""
    return list(attrs.get(SCORES, CLASS_SCORES))
