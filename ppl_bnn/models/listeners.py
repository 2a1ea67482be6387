"""Pyro's messages, sent only to handlers that listen: on a small network they cost as much as the arithmetic."""

from typing import Any

from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK


def heard(kind: str) -> bool:
    """Whether a handler that is active looks at messages of this kind."""
    return any(_hears(type(handler), kind) for handler in _PYRO_STACK)


def attribute(module: PyroModule, name: str) -> Any:
    """``getattr``, which tells Pyro of a parameter; among handlers of which none listens, without telling."""
    parameter = module._parameters.get(name)
    if parameter is None or not _PYRO_STACK or heard("param"):
        return getattr(module, name)
    return parameter


def _hears(handler: type, kind: str) -> bool:
    return (
        hasattr(handler, f"_pyro_{kind}")
        or hasattr(handler, f"_pyro_post_{kind}")
        or handler._process_message is not Messenger._process_message  # type: ignore[attr-defined]
        or handler._postprocess_message is not Messenger._postprocess_message  # type: ignore[attr-defined]
    )
