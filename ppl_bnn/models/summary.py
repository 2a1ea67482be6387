"""The layer table: output shapes and parameter counts, counted as in the study's tables."""

import math
from dataclasses import dataclass

from pyro import poutine
from torch import Tensor, nn

from ppl_bnn.models.evaluating import evaluating
from ppl_bnn.models.param_store import own_parameters


@dataclass(frozen=True)
class Row:
    """One layer: path, class, output shape without the batch, parameter counts, and multiply-adds an image."""

    layer: str
    kind: str
    output_shape: tuple[int, ...]
    trainable: int
    non_trainable: int
    multiply_adds: int


def layer_table(net: nn.Module, x: Tensor) -> list[Row]:
    """Run `net` on `x` [N, ...] and list its layers, and every other module with parameters, in the order they ran.

    A random weight counts twice (loc and scale), and a point estimate once. The running mean and variance of batch norm
    and frozen parameters count as non-trainable. The weights of ``BayesianLinear`` and ``BayesianConv2d`` are random;
    every other row's parameters are point estimates. The output shape of a module whose output is no tensor is empty.
    """
    rows: list[Row] = []

    def record(path: str, module: nn.Module):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            kind = type(module).__name__.removeprefix("Pyro")
            shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
            rows.append(Row(path, kind, shape, *_count(module), _multiply_adds(module, math.prod(shape))))

        return module.register_forward_hook(hook)

    listed = [
        (path, module)
        for path, module in net.named_modules()
        if next(module.children(), None) is None or next(module.parameters(recurse=False), None) is not None
    ]
    hooks = [record(path or type(net).__name__.removeprefix("Pyro"), module) for path, module in listed]
    try:
        with evaluating(net), poutine.block(), own_parameters():
            net(x)
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def render_table(rows: list[Row]) -> str:
    """The table as text, with total, trainable and non-trainable counts under it."""
    header = ("Layer", "Type", "Output shape", "Parameters", "Multiply-adds")
    cells = [
        (row.layer, row.kind, " x ".join(map(str, row.output_shape)),
         f"{row.trainable + row.non_trainable:,}", f"{row.multiply_adds:,}")
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(5)]

    def line(row: tuple[str, ...]) -> str:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
        return "  ".join([*left, *(cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True))])

    rule = "-" * len(line(header))
    trainable, fixed = sum(row.trainable for row in rows), sum(row.non_trainable for row in rows)
    operations = sum(row.multiply_adds for row in rows)
    totals = [
        ("Total parameters", trainable + fixed), ("Trainable parameters", trainable),
        ("Non-trainable parameters", fixed), ("Multiply-adds an image", operations),
    ]  # fmt: skip
    return "\n".join(
        [
            line(header),
            rule,
            *map(line, cells),
            rule,
            *(f"{name + ':':26}{count:>16,}" for name, count in totals),
        ]
    )


def _multiply_adds(module: nn.Module, outputs: int) -> int:
    if isinstance(module, nn.Conv2d):
        return outputs * (module.in_channels // module.groups) * math.prod(module.kernel_size)
    return outputs * module.in_features if isinstance(module, nn.Linear) else 0


def _count(module: nn.Module) -> tuple[int, int]:
    random = getattr(module, "_pyro_samples", {})
    trainable = sum(2 * math.prod(prior.event_shape) for prior in random.values())
    trainable += sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.requires_grad)
    fixed = sum(parameter.numel() for parameter in module.parameters(recurse=False) if not parameter.requires_grad)
    # num_batches_tracked is a counter, not a parameter.
    fixed += sum(buffer.numel() for name, buffer in module.named_buffers(recurse=False) if name.startswith("running_"))
    return trainable, fixed
