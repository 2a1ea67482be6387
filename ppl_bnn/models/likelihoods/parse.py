"""Likelihoods as configurations write them, such as ``normal(0.1)``, and the number of network outputs they need."""

import ast
from typing import Any

import torch
from torch import Size

from ppl_bnn.errors import UserError
from ppl_bnn.models import likelihoods
from ppl_bnn.models.evaluating import forked_random
from ppl_bnn.models.likelihoods.base import Likelihood
from ppl_bnn.models.prior_parsing import HYPER_PRIORS
from ppl_bnn.registry import lookup

# The class of each family, and the arguments that may be given, all of which have defaults.
_FAMILIES = {
    "categorical": ("Categorical", ""),
    "bernoulli": ("Bernoulli", ""),
    "normal": ("Normal", "scale"),
    "student_t": ("StudentT", "df, scale"),
    "poisson": ("Poisson", ""),
    "negative_binomial": ("NegativeBinomial", "overdispersion"),
}
FORMS = ", ".join(f"{name}({arguments})" if arguments else name for name, (_, arguments) in _FAMILIES.items())
# A likelihood of one number an example takes at most this number of outputs.
_MOST_OUTPUTS = 8


def parse_likelihood(text: str) -> Likelihood:
    """Read a likelihood: ``categorical``, ``normal``, ``normal(0.1)``, ``normal(predicted)``, ``student_t(5, learnt)``.

    A scale (overdispersion) is a positive number, ``learnt`` (the default), ``predicted``, or its prior:
    ``log_normal(loc, scale)``, ``half_normal(scale)``, ``half_cauchy(scale)`` or ``gamma(concentration, rate)``. An
    import path of the user's own names a `Likelihood` that is made without arguments, or a function that returns one.

    Raises:
        UserError: not of that form, an unknown family, or arguments that the family refuses.
    """
    if not isinstance(text, str):
        raise UserError(f"a likelihood is a text such as normal(0.1), got {text!r}")
    if ":" in text:
        return _own(text)
    name, arguments = _called(text, f"likelihood {text!r} is not understood; write one of {FORMS}")
    if name not in _FAMILIES:
        raise UserError(
            f"likelihood {text!r} is not understood; write one of {FORMS}, or the import path of your own: "
            "package.module:name"
        )
    family, form = _FAMILIES[name]
    if len(arguments) > _count(form):
        raise UserError(f"likelihood {text!r} has too many arguments; write {name}{f'({form})' if form else ''}")
    values = [_argument(argument, text) for argument in arguments]
    try:
        made: Likelihood = getattr(likelihoods, family)(*values)
    except ValueError as error:
        raise UserError(f"likelihood {text!r}: {error}") from None
    return made


def num_outputs(likelihood: Likelihood, num_classes: int) -> int:
    """The number of network outputs for targets [N]: the smallest that gives one number, or label, an example.

    Args:
        num_classes: of the targets, 0 where they are no class labels. A likelihood whose mean tells everything about y
            (`Likelihood.drawn`) takes an output a class if it can.

    Raises:
        UserError: the likelihood takes no such number of outputs, as Categorical without classes.
    """
    if isinstance(likelihood, likelihoods.Categorical) and num_classes < 2:
        raise UserError("a Categorical likelihood needs class labels, and the targets are numbers")
    preferred = [num_classes] if num_classes and not likelihood.drawn else []
    for count in [*preferred, *range(1, _MOST_OUTPUTS + 1)]:
        outputs = torch.zeros(2, count)
        try:
            with forked_random():
                latents = likelihood.latents()
            likelihood.check(outputs, **latents)
            found = likelihood.distribution(outputs, **latents)
        except UserError:
            continue
        if found.event_shape == Size([]):
            return count
    raise UserError(
        f"a {type(likelihood).__name__} likelihood gives no single number an example for 1 to {_MOST_OUTPUTS} outputs"
    )


def _own(path: str) -> Likelihood:
    made: Any = lookup(_FAMILIES, path, what="model.likelihood")
    try:
        made = made()
    except TypeError as error:
        raise UserError(f"model.likelihood {path} must be made without arguments: {error}") from error
    except Exception as error:
        raise UserError(f"model.likelihood {path} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(made, Likelihood):
        raise UserError(f"model.likelihood {path} must give a ppl_bnn.models.likelihoods.Likelihood, got {made!r:.60}")
    return made


def _called(text: str | ast.expr, message: str) -> tuple[str, list[ast.expr]]:
    """Name and arguments of ``name`` or ``name(argument, ...)``; anything else is refused by the message."""
    try:
        found = ast.parse(text.strip(), mode="eval").body if isinstance(text, str) else text
    except (SyntaxError, ValueError):
        raise UserError(message) from None
    name, arguments = (found.func, found.args) if isinstance(found, ast.Call) else (found, [])
    if not isinstance(name, ast.Name) or (isinstance(found, ast.Call) and found.keywords):
        raise UserError(message)
    return name.id, arguments


def _argument(argument: ast.expr, text: str) -> Any:
    """A number, a word such as ``learnt``, or a prior."""
    number = _number(argument)
    if number is not None:
        return number
    if isinstance(argument, ast.Name):
        return argument.id
    forms = ", ".join(form for _, form in HYPER_PRIORS.values())
    message = f"likelihood {text!r} has an argument that is no number, learnt, predicted or a prior: one of {forms}"
    name, parts = _called(argument, message)
    numbers = [_number(part) for part in parts]
    if name not in HYPER_PRIORS or None in numbers or len(numbers) != _count(HYPER_PRIORS[name][1]):
        raise UserError(message)
    try:
        return HYPER_PRIORS[name][0](*numbers, validate_args=True)
    except ValueError:
        raise UserError(
            f"likelihood {text!r} has a prior out of range: its scale, concentration and rate are positive"
        ) from None


def _number(argument: ast.expr) -> float | None:
    try:
        value = ast.literal_eval(argument)
    except ValueError:
        return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _count(form: str) -> int:
    return form.count(",") + 1 if form else 0
