"""The layer table: output shapes and parameter counts, as the study's tables count them."""

from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn


@dataclass(frozen=True)
class Row:
    """One layer: its path, class, output shape without the batch, and its parameter counts."""

    layer: str
    kind: str
    output_shape: tuple[int, ...]
    trainable: int
    non_trainable: int


def layer_table(net: nn.Module, x: Tensor) -> list[Row]:
    """Run `net` on `x` [N, ...] and list its layers in the order they ran.

    A random weight counts twice (loc and scale), a point estimate once; batch norm's running mean and variance
    count as not trainable.
    """
    rows: list[Row] = []

    def record(path: str, module: nn.Module):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            rows.append(Row(path, type(module).__name__.removeprefix("Pyro"), tuple(output.shape[1:]), *_count(module)))

        return module.register_forward_hook(hook)

    leaves = [(path, module) for path, module in net.named_modules() if not list(module.children())]
    hooks = [record(path or type(net).__name__, module) for path, module in leaves]
    training = net.training
    net.eval()
    try:
        with torch.no_grad(), poutine.block(), pyro.get_param_store().scope():
            net(x)
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return rows


def render(rows: list[Row]) -> str:
    """The table as text, with total, trainable and non-trainable counts under it."""
    header = ("Layer", "Type", "Output shape", "Parameters")
    cells = [
        (row.layer, row.kind, " x ".join(map(str, row.output_shape)), f"{row.trainable + row.non_trainable:,}")
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(4)]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)), row[3].rjust(widths[3])]
        )

    rule = "-" * len(line(header))
    trainable, fixed = sum(row.trainable for row in rows), sum(row.non_trainable for row in rows)
    totals = [("Total", trainable + fixed), ("Trainable", trainable), ("Non-trainable", fixed)]
    return "\n".join(
        [
            line(header),
            rule,
            *map(line, cells),
            rule,
            *(f"{name + ' parameters:':26}{count:>14,}" for name, count in totals),
        ]
    )


def _count(module: nn.Module) -> tuple[int, int]:
    random = getattr(module, "_pyro_samples", {})
    trainable = sum(2 * prior.event_shape.numel() for prior in random.values())
    trainable += sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.requires_grad)
    fixed = sum(parameter.numel() for parameter in module.parameters(recurse=False) if not parameter.requires_grad)
    # num_batches_tracked is a counter, not a parameter.
    fixed += sum(buffer.numel() for name, buffer in module.named_buffers(recurse=False) if name.startswith("running_"))
    return trainable, fixed
