"""Pyro's messages, sent only to handlers that listen: on a small network a message costs as much as the arithmetic.

This file relies on private parts of Pyro: ``_PYRO_STACK`` is the list of active handlers, and a handler takes part in a
message of type ``t`` by a method ``_pyro_t`` or ``_pyro_post_t``, or by replacing ``_process_message`` or
``_postprocess_message``. ``tests/models/test_listeners.py`` fails if a release of Pyro changes this. The remedy is then
to let `heard` return True, which is slower and always correct.
"""

from typing import Any

from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK


def heard(kind: str) -> bool:
    """Whether an active handler takes part in messages of type `kind` (``sample``, ``param``, ``bayes_linear``)."""
    return any(_hears(handler, kind) for handler in _PYRO_STACK)


def attribute(module: PyroModule, name: str) -> Any:
    """``getattr(module, name)``, without Pyro's message about a parameter if it is frozen or no active handler listens.

    Pyro's parameter store sets `requires_grad` on every parameter that it is told of, so a frozen one is kept from it.
    """
    parameter = module._parameters.get(name)
    if parameter is None or (parameter.requires_grad and (not _PYRO_STACK or heard("param"))):
        return getattr(module, name)
    return parameter


def _hears(handler: Messenger, kind: str) -> bool:
    return (
        hasattr(handler, f"_pyro_{kind}")
        or hasattr(handler, f"_pyro_post_{kind}")
        or type(handler)._process_message is not Messenger._process_message
        or type(handler)._postprocess_message is not Messenger._postprocess_message
    )
