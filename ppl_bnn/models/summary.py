"""The layer table: output shapes and parameter counts, counted as in the study's tables."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from pyro import poutine
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ppl_bnn.inputs import Inputs, call
from ppl_bnn.models.evaluating import evaluating
from ppl_bnn.models.param_store import own_parameters
from ppl_bnn.models.random_network import RandomNetwork, random_sites

# What torch's layers of the same arithmetic are called, where that is not the function's own name.
_KINDS = {"relu": "ReLU", "gelu": "GELU", "silu": "SiLU", "iadd": "Add", "radd": "Add", "cat": "Concatenate"}


@dataclass(frozen=True)
class Row:
    """One layer: path, class, output shape without the batch, parameter counts, and multiply-adds an image.

    Attributes:
        connected_to: the layers whose outputs it takes; None where that is not known.
    """

    layer: str
    kind: str
    output_shape: tuple[int, ...]
    trainable: int
    non_trainable: int
    multiply_adds: int
    connected_to: tuple[str, ...] | None = None

    @property
    def parameters(self) -> int:
        """Trainable and non-trainable parameters together."""
        return self.trainable + self.non_trainable


@dataclass(frozen=True)
class Totals:
    """The last lines of a layer table."""

    parameters: int
    trainable: int
    non_trainable: int
    multiply_adds: int


def layer_table(net: nn.Module, x: Inputs) -> list[Row]:
    """Run `net` on inputs [N, ...] and list its layers, and every other module with parameters, in the order they ran.

    A random weight or hyper-parameter counts twice (loc and scale), and a point estimate once. The running mean and
    variance of batch norm and frozen parameters count as non-trainable. A module with random parameters of its own is
    called ``Bayesian`` (``BayesianLinear``). The output shape of a module whose output is no tensor is empty.
    """
    return _Walk(net, functions=False).rows_of(x)


def network_table(net: nn.Module, x: Inputs) -> list[Row]:
    """The rows of `layer_table`, with the input, with what the network computes between its layers, and connections.

    A function of torch that the network itself calls (an addition, an activation) has a row of its own, named by the
    module that calls it: ``block1.add``. Where a layer takes values of unknown origin (that numpy computed, say), these
    functions are left out and `connected_to` is None in every row.
    """
    return _Walk(net, functions=True).rows_of(x)


def totals(rows: Sequence[Row]) -> Totals:
    """The sums over a layer table."""
    trainable, fixed = sum(row.trainable for row in rows), sum(row.non_trainable for row in rows)
    return Totals(trainable + fixed, trainable, fixed, sum(row.multiply_adds for row in rows))


def render_table(rows: Sequence[Row]) -> str:
    """The table as text in the columns of the study's tables, with multiply-adds, and the totals under it.

    A column tells the connections of a network whose layers do not simply follow each other.
    """
    header = ("Layer (type)", "Output Shape", "Param #", "Multiply-adds", "Connected to")
    cells = [
        (f"{row.layer} ({row.kind})", " x ".join(map(str, row.output_shape)), f"{row.parameters:,}",
         f"{row.multiply_adds:,}", ", ".join(row.connected_to or ()))
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    branches = _branches(rows)

    def line(row: tuple[str, ...]) -> str:
        left, right = row[:2], row[2:4]
        found = [cell.ljust(width) for cell, width in zip(left, widths, strict=False)]
        found += [cell.rjust(width) for cell, width in zip(right, widths[2:], strict=False)]
        return "  ".join([*found, row[4]] if branches else found).rstrip()

    rule = "-" * (sum(widths[: 5 if branches else 4]) + (8 if branches else 6))
    sums = totals(rows)
    named = [
        ("Total parameters", sums.parameters), ("Trainable parameters", sums.trainable),
        ("Non-trainable parameters", sums.non_trainable), ("Multiply-adds an image", sums.multiply_adds),
    ]  # fmt: skip
    return "\n".join(
        [
            line(header),
            rule,
            *map(line, cells),
            rule,
            *(f"{name + ':':26}{count:>16,}" for name, count in named),
        ]
    )


def _branches(rows: Sequence[Row]) -> bool:
    """Whether a layer takes another output than that of the row before it."""
    before = ((), *((row.layer,) for row in rows))
    return any(row.connected_to not in (None, last) for row, last in zip(rows, before, strict=False))


class _Walk(TorchFunctionMode):
    """One forward pass, with a row for each layer, and for each function of torch outside of them if asked."""

    def __init__(self, net: nn.Module, *, functions: bool) -> None:
        super().__init__()
        self.net, self.functions = net, functions
        # By place: while the network runs, the draws stand in the places of the parameters.
        self.random = {(id(module), name): one for _, one in random_sites(net).values() for module, name in one.places}
        self.listed = {
            module
            for module in net.modules()
            if next(module.children(), None) is None or next(module.parameters(recurse=False), None) is not None
        }
        self.rows: list[Row] = []
        # The modules that are running, from the outermost; and by whom each tensor was made. The tensors themselves
        # are kept, for the identity of one that is gone goes to another.
        self.running: list[tuple[str, nn.Module]] = []
        self.makers: dict[int, tuple[Tensor, str]] = {}
        self.known = True

    def rows_of(self, x: Inputs) -> list[Row]:
        if self.functions:
            self._add("input", "Input", x, (), module=None)
        hooks = []
        for path, module in self.net.named_modules():
            hooks += [
                module.register_forward_pre_hook(self._entered(path or _kind(module)), with_kwargs=True),
                module.register_forward_hook(self._left, with_kwargs=True),
            ]
        try:
            tracing = self if self.functions else nullcontext()
            with evaluating(self.net), poutine.block(), own_parameters(), tracing:
                call(self.net, x)
        finally:
            for hook in hooks:
                hook.remove()
        if not self.known:
            return [replace(self.rows[0], connected_to=None), *layer_table(self.net, x)]
        return self.rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outside = not any(_is_leaf(module) for _, module in self.running)
        sources = self._makers_of((args, kwargs)) if outside else ()
        output = func(*args, **(kwargs or {}))
        if sources and _tensors(output):
            name = _name_of(func)
            kind = _KINDS.get(name) or "".join(part[:1].upper() + part[1:] for part in name.split("_"))
            path = ".".join(filter(None, (self._caller(), kind.lower() if name in _KINDS else name)))
            self._add(self._unused(path), kind, output, sources, module=None)
        return output

    def _entered(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.running.append((path, module))
            if self.functions and _is_leaf(module) and _tensors((args, kwargs)) and not self._makers_of((args, kwargs)):
                self.known = False

        return hook

    def _left(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        path, _ = self.running.pop()
        if module in self.listed:
            # A module with layers of its own takes what the last of them gave.
            sources = self._makers_of((args, kwargs) if _is_leaf(module) else output)
            self._add(path, self._kind(module), output, sources, module=module)

    def _add(self, layer: str, kind: str, output: Any, sources: tuple[str, ...], *, module: nn.Module | None) -> None:
        shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
        trainable, fixed = self._count(module) if module is not None else (0, 0)
        operations = _multiply_adds(module, math.prod(shape))
        connected = sources if self.functions else None
        self.rows.append(Row(layer, kind, shape, trainable, fixed, operations, connected))
        self.makers |= {id(tensor): (tensor, layer) for tensor in _tensors(output)} if self.functions else {}

    def _kind(self, module: nn.Module) -> str:
        own = any((id(module), name) in self.random for name in module._parameters)
        return f"Bayesian{_kind(module)}" if own else _kind(module)

    def _count(self, module: nn.Module) -> tuple[int, int]:
        own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        places = [(name, self.random[id(module), name]) for name in own if (id(module), name) in self.random]
        # A shared parameter counts at its first place.
        random = [one for name, one in places if one.places[0] == (module, name)]
        trainable = sum(2 * one.point.numel() for one in random)
        # The hyper-parameters of a hierarchical prior, which are random too.
        latents = (shape for one in random for shape in getattr(one.prior, "latents", {}).values())
        trainable += sum(2 * math.prod(shape) for shape in latents)
        points = [parameter for name, parameter in own.items() if (id(module), name) not in self.random]
        trainable += sum(parameter.numel() for parameter in points if parameter.requires_grad)
        fixed = sum(parameter.numel() for parameter in points if not parameter.requires_grad)
        # num_batches_tracked is a counter, not a parameter.
        running = (buffer for name, buffer in module.named_buffers(recurse=False) if name.startswith("running_"))
        return trainable, fixed + sum(buffer.numel() for buffer in running)

    def _makers_of(self, values: Any) -> tuple[str, ...]:
        found = (self.makers[id(tensor)][1] for tensor in _tensors(values) if id(tensor) in self.makers)
        return tuple(dict.fromkeys(found))

    def _caller(self) -> str:
        path, module = self.running[-1]
        return "" if module is self.net else path

    def _unused(self, layer: str) -> str:
        taken, number = {row.layer for row in self.rows}, 1
        name = layer
        while name in taken:
            name, number = f"{layer}_{number}", number + 1
        return name


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _kind(module: nn.Module) -> str:
    kind = type(module)
    return (kind._plain if issubclass(kind, RandomNetwork) else kind).__name__


def _name_of(func: Any) -> str:
    # x.T is the __get__ of the property T.
    name: str = func.__name__ if func.__name__ != "__get__" else func.__self__.__name__
    return name.strip("_")


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    parts = values.values() if isinstance(values, dict) else values if isinstance(values, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _multiply_adds(module: nn.Module | None, outputs: int) -> int:
    if isinstance(module, nn.Conv2d):
        return outputs * (module.in_channels // module.groups) * math.prod(module.kernel_size)
    return outputs * module.in_features if isinstance(module, nn.Linear) else 0
