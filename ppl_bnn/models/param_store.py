"""Pyro's parameter store kept out of the way of modules, which hold their parameters themselves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints


@contextmanager
def own_parameters() -> Iterator[None]:
    """A store of its own, for a run of a model or guide that must leave the caller's store and modules as they are.

    A ``pyro.param`` finds the caller's value. A module's parameter is always the module's own, whatever the caller's
    store holds under its name (another module's, say, of the last run of a notebook cell), and stays frozen if it is:
    ``pyro.param`` itself sets ``requires_grad`` of what it is given.
    """
    store = pyro.get_param_store()
    callers = store.get_state()
    with store.scope(), _Parameters(callers):  # type: ignore[arg-type]
        yield


@contextmanager
def trained_store(state: dict[str, Any], params: Mapping[str, Tensor]) -> Iterator[None]:
    """A store that starts from `state`; its `params` (unconstrained values by name) go into the caller's at the end."""
    store = pyro.get_param_store()
    try:
        with store.scope(state):  # type: ignore[arg-type]
            yield
    finally:
        for name in params:
            if name in store:
                del store[name]
        kept = {part: {name: state[part][name] for name in params} for part in ("params", "constraints")}
        store.set_state(kept)  # type: ignore[arg-type]


class _Parameters(Messenger):
    def __init__(self, callers: dict[str, Any]) -> None:
        super().__init__()
        self.callers = callers

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        store, name = pyro.get_param_store(), msg["name"]
        value, constraint = given_parameter(msg), constraints.real
        if value is None and name in self.callers["params"]:
            value, constraint = self.callers["params"][name], self.callers["constraints"][name]
        if value is not None and name not in store:
            store.set_state({"params": {name: value}, "constraints": {name: constraint}})


def given_parameter(msg: dict[str, Any]) -> Tensor | None:
    """The module's parameter that a ``param`` message brings, if it brings one."""
    given = dict(zip(("name", "init_tensor", "constraint"), msg["args"], strict=False)) | msg["kwargs"]
    found = given.get("init_tensor")
    return (
        found
        if isinstance(found, nn.Parameter) and given.get("constraint", constraints.real) is constraints.real
        else None
    )
