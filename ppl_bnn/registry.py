"""A registry is a plain dict of named things; an import path stands for one of the user's own wherever a name may."""

from collections.abc import Mapping
from importlib import import_module
from operator import attrgetter
from typing import Any, TypeVar

from ppl_bnn.errors import UserError

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
            f"{what} must be one of {', '.join(registry)}; got {name!r} (or give the import path of your own: "
            "package.module:name)"
        )
    try:
        found: Any = attrgetter(path)(import_module(module))
    except Exception as error:
        # What goes wrong in the user's own module is the user's to mend.
        raise UserError(f"{what} must be importable, got {name!r}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"{what} must name something callable, got {name!r}, a {type(found).__name__}")
    return found  # type: ignore[no-any-return]
