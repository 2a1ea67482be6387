"""A torch device that stands in for a GPU where there is none.

It is as strict as one: an operation on tensors here and there fails, generators belong to a device, its memory has no
address that C code could read. Its numbers are computed on the CPU, so they are right. It says nothing of speed, but
counts how often a program waits for it.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretend"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
aten = torch.ops.aten
_COPIES = (aten.copy_.default, aten._to_copy.default)
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
# Of a number on the CPU and tensors on a GPU, these at least make something.
_OF_NUMBERS = {"add", "sub", "mul", "div", "pow", "eq", "ne", "gt", "ge", "lt", "le", "where", "masked_fill", "fill"}
_HALF = ("linear", "conv2d", "matmul", "mm", "addmm")


@contextmanager
def pretend_device() -> Iterator["Backend"]:
    """Within this, ``torch.device("pretend")`` works; it gives the backend, whose `waits` grow."""
    backend = _register()
    made = torch.tensor

    def tensor(data: object, *, device: Any = None, **kwargs: Any) -> Tensor:
        # torch.tensor asks a device for memory below the level at which a mode is asked.
        return made(data, **kwargs) if device is None else made(data, **kwargs).to(device)

    # A module's parameter that is laid out anew must take its wrapper along.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        # A wrapper can be viewed in inference mode only where it was made there.
        with (
            patch("torch.Generator", Generator), patch("torch.tensor", tensor),
            patch("torch.inference_mode", torch.no_grad), _Mode(),
            # Lists of its tensors are worked on at once, as those of a GPU are.
            patch("torch.utils._foreach_utils._foreach_supported_types", [Tensor, Away]),
            patch("torch.optim.optimizer._foreach_supported_types", [Tensor, nn.Parameter, Away]),
        ):  # fmt: skip
            yield backend
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


class Backend(ModuleType):
    """What torch asks of ``torch.pretend``.

    Attributes:
        waits: the operations so far whose numbers, or whose result's shape, the program waited for.
    """

    def __init__(self) -> None:
        super().__init__(NAME)
        self.generator = torch.Generator()
        self.waits: list[str] = []

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: object = None) -> None:
        self.waits.append("synchronize")

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def get_rng_state(self, device: object = None) -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        self.generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Away(torch.Tensor):
    """A tensor on the device: one of the CPU in a wrapper that has no memory."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "Away":
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, device=f"{NAME}:0", **layout)  # type: ignore[return-value]

    def __init__(self, here: Tensor) -> None:
        self.here = here

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        other = Away(copy.deepcopy(self.here.detach(), memo))
        learned = isinstance(self, nn.Parameter)
        return memo.setdefault(id(self), nn.Parameter(other, self.requires_grad) if learned else other)  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        # A parameter takes other memory of its own shape and strides.
        self.here = other.here if isinstance(other, Away) else other

    def as_subclass(self, cls: Any) -> Any:
        # A wrapper has no memory that an object of another class could share.
        with torch._C.DisableTorchFunctionSubclass():
            other = self.view_as(self)
        other.__class__ = Away if cls is Tensor else type(cls.__name__, (cls, Away), {})
        return other

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


class Generator(torch.Generator):
    """A generator of either device."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls, "cpu")
        if torch.device(device).type == NAME:
            _generators[made._cdata] = made
        return made

    @property
    def device(self) -> torch.device:
        return torch.device(NAME if self._cdata in _generators else "cpu")


_backend: Backend | None = None
_libraries: list[torch.library.Library] = []
_generators: WeakValueDictionary[int, Generator] = WeakValueDictionary()


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        there = asked is not None and torch.device(asked).type == NAME
        if there or any(isinstance(leaf, Away) for leaf in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    assert _backend is not None
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = [tensor for tensor in tensors if isinstance(tensor, Away)]
    _check(func, args, tensors, away)
    asked, generator = kwargs.get("device"), kwargs.get("generator")
    there = bool(away) if asked is None else torch.device(asked).type == NAME
    if generator is not None and (generator._cdata in _generators) != there:
        raise RuntimeError(f"{func}: its generator is of another device")
    arguments, named = tree_map_only(Away, lambda tensor: tensor.here, (args, kwargs))
    if asked is not None:
        named = {**named, "device": torch.device("cpu")}
    if there and generator is None and torch.Tag.nondeterministic_seeded in func.tags:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(_backend.generator.get_state())
            result = func(*arguments, **named)
            _backend.generator.set_state(torch.get_rng_state())
    else:
        result = func(*arguments, **named)
    if away and _waits(func, tensors, result, there):
        _backend.waits.append(str(func))
    written = {id(tensor.here): tensor for tensor in away}

    def out(tensor: Tensor) -> Tensor:
        # What an operation writes into is what it returns.
        return written[id(tensor)] if id(tensor) in written else Away(tensor) if there else tensor

    return tree_map_only(Tensor, out, result)


def _waits(func: Any, tensors: list[Tensor], result: object, there: bool) -> bool:
    if torch.Tag.dynamic_output_shape in func.tags:
        return func is not aten.index.Tensor or any(tensor.dtype == torch.bool for tensor in tensors[1:])
    return result is not None and not (there and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)))


def _check(func: Any, args: tuple, tensors: list[Tensor], away: list[Away]) -> None:
    if func in _COPIES or not 0 < len(away) < len(tensors):
        return
    others = [tensor for tensor in tensors if not isinstance(tensor, Away)]
    takes_numbers = func._schema.name.removeprefix("aten::").rstrip("_") in _OF_NUMBERS
    numbers = takes_numbers and all(tensor.dim() == 0 for tensor in others)
    indices = func in _INDEXING and isinstance(args[0], Away) and not any(t.is_floating_point() for t in others)
    if not (numbers or indices):
        found = ", ".join(f"{list(tensor.shape)} on {tensor.device.type}" for tensor in tensors)
        raise RuntimeError(f"{func} got tensors on two devices: {found}")


def _register() -> Backend:
    global _backend
    if _backend is None:
        _backend = Backend()
        backend_registration._setup_privateuseone_for_python_backend(NAME, _backend)
        _libraries.extend((torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")))
        _libraries[0].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        for name in _HALF:
            _libraries[1].impl(name, _in_half(getattr(aten, name)), "AutocastPrivateUse1")
    return _backend


def _in_half(operation: Callable) -> Callable:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def lower(tensor: Tensor) -> Tensor:
        return tensor.to(torch.get_autocast_dtype(NAME)) if tensor.is_floating_point() else tensor

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operation(*tree_map_only(Tensor, lower, args), **kwargs)  # type: ignore[no-any-return]

    return kernel
