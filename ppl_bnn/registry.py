"""A registry is a plain dict of named things; an import path stands for one of the user's own wherever a name may."""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from operator import attrgetter
from typing import Any, TypeVar

from ppl_bnn.errors import UserError, did_you_mean

T = TypeVar("T")


def lookup(registry: Mapping[str, T], name: str, *, what: str = "the name") -> T:
    """The registry's entry `name`, or what an import path such as ``my_package.nets:build`` names.

    Args:
        what: what the name is of, for the message: a setting.

    Raises:
        UserError: no such entry, or an import path that names nothing. The message lists the registry's names.
    """
    if name in registry:
        return registry[name]
    module, _, path = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not (module and path):
        raise UserError(
            f"{what} must be one of {', '.join(registry)}; got {name!r}{did_you_mean(str(name), registry)} (or give "
            "the import path of your own: package.module:name)"
        )
    try:
        found: Any = attrgetter(path)(import_module(module))
    except Exception as error:
        # What goes wrong in the user's own module is the user's to mend.
        raise UserError(f"{what} must be importable, got {name!r}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"{what} must name something callable, got {name!r}, a {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function or class by name; none where Python cannot tell."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def check_options(function: Callable[..., Any], options: Mapping[str, Any], *, name: str, what: str) -> None:
    """Raise UserError for an option that is no parameter of a function or class.

    Args:
        options: keyword arguments.
        name: of the function, and `what`: of the setting that holds the options, for the message.
    """
    known = parameters_of(function)
    kinds = {parameter.kind for parameter in known.values()}
    if not known or inspect.Parameter.VAR_KEYWORD in kinds:
        return
    if unknown := [option for option in options if option not in known]:
        raise UserError(
            f"{what} has {unknown[0]!r}{did_you_mean(unknown[0], known)}, and {name} takes {', '.join(known) or 'none'}"
        )
