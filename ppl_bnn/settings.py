"""What a setting is: a dataclass field with a type, a range, a help text, and what depends on it.

    @documented
    @dataclass
    class TrainSettings:
        epochs: Count = setting(help="passes over the training data")

The type holds the range, so `check` refuses what lies outside it and ``--help`` shows it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ppl_bnn.errors import UserError
from ppl_bnn.registry import lookup

C = TypeVar("C", bound=type)


@dataclass(frozen=True, repr=False, eq=False)
class Range:
    """The numbers that a setting may have; `rule` says which, after the word "must": "be at least 1"."""

    rule: str
    allows: Callable[[Any], bool]

    def check(self, name: str, value: Any, kind: Any) -> None:
        """Raise UserError for a value of the setting `name` that is not of `kind` or lies outside."""
        wanted, text = (Integral, "a whole number") if kind is int else (Real, "a number")
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise UserError(f"{name} must be {text} and {self.rule}, got {value!r}")
        if not self.allows(value):
            raise UserError(f"{name} must {self.rule}, got {value}")

    def __repr__(self) -> str:
        return self.rule.removeprefix("be ").removeprefix("lie ")


@dataclass(frozen=True, repr=False, eq=False)
class OneOf:
    """The names that a setting may have; of a registry (a mapping), an import path of the user's own too."""

    names: Mapping[str, Any] | tuple[str, ...]

    def check(self, name: str, value: Any, kind: Any) -> None:
        """Raise UserError for a value of the setting `name` that is none of them."""
        if isinstance(self.names, Mapping):
            lookup(self.names, value, what=name)
        else:
            _check_choice(name, value, self.names)

    def __repr__(self) -> str:
        own = " or an import path" if isinstance(self.names, Mapping) else ""
        return f"{{{','.join(self.names)}}}{own}"


Count = Annotated[int, Range("be at least 1", lambda value: value >= 1)]
Natural = Annotated[int, Range("be at least 0 and below 2^63", lambda value: 0 <= value < 2**63)]
Positive = Annotated[float, Range("be positive and finite", lambda value: 0 < value < math.inf)]
NotNegative = Annotated[float, Range("be at least 0 and finite", lambda value: 0 <= value < math.inf)]
Finite = Annotated[float, Range("be finite", math.isfinite)]
Share = Annotated[float, Range("lie in [0, 1)", lambda value: 0 <= value < 1)]
Fraction = Annotated[float, Range("be a fraction in (0, 1]", lambda value: 0 < value <= 1)]


def setting(
    default: Any = MISSING,
    *,
    help: str,
    decisive: bool = True,
    per_host: bool = False,
    factory: Any = MISSING,
) -> Any:
    """A dataclass field that is a setting.

    Args:
        help: one or two sentences, for ``--help`` and docstrings.
        decisive: two trainings that differ in it give other results.
        per_host: may differ from rank to rank: a place or a resource of one host.
        factory: makes the default, where it is mutable.
    """
    metadata = {"help": help, "decisive": decisive, "per_host": per_host}
    return field(default=default, default_factory=factory, metadata=metadata)


def with_default(settings: type, name: str, default: Any) -> Any:
    """The setting `name` of another class, with another default."""
    known = next(known for known in fields(settings) if known.name == name)
    return field(default=default, metadata=known.metadata)


def documented(settings: C) -> C:
    """Class decorator: the docstring gets an Args section with each setting's help."""
    settings.__doc__ = f"{settings.__doc__}\n\n    Args:\n{described(settings)}\n    "
    return settings


def described(settings: type, indent: int = 8) -> str:
    """A line of help for each setting, as in the Args section of a docstring."""
    helps = {known.name: known.metadata["help"] for known in fields(settings) if known.metadata}
    return "\n".join(f"{' ' * indent}{name}: {text}" for name, text in helps.items())


def decisive(settings: type) -> list[str]:
    """The names of the settings that decide what a training gives."""
    return [known.name for known in fields(settings) if known.metadata.get("decisive")]


def per_host(settings: type) -> list[str]:
    """The names of the settings that may differ from rank to rank."""
    return [known.name for known in fields(settings) if known.metadata.get("per_host")]


def check(settings: Any, *, prefix: str = "") -> None:
    """Raise UserError for the first setting of a dataclass outside its range or choices, by prefix + name."""
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        _check(prefix + name, getattr(settings, name), hint)


def _check(name: str, value: Any, hint: Any) -> None:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for rule in hint.__metadata__:
            rule.check(name, value, args[0])
    elif origin is Literal:
        _check_choice(name, value, args)
    elif origin is list and isinstance(value, list):
        for item in value:
            _check(name, item, args[0])
    elif origin in (Union, UnionType) and NoneType in args and value is not None:
        for arg in args:
            if arg is not NoneType:
                _check(name, value, arg)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")
