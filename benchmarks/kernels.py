"""Counts the kernels that a training step starts on an accelerator, and how often it waits for one. It needs none."""

import argparse
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contenders import CONTENDERS, why_absent
from report import Table, aligned, as_markdown
from train_step import BATCHES, DENSE, SHAPES, build_contender

_TESTS = Path(__file__).parent.parent / "tests"
_USUAL = ("cnn", "mlp", "plain", "groups", "flipout", "local", "ivon", "ivon-opt")
# They write only the description of a tensor, as views do.
_NO_WORK = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_", "detach_", "t_",
    "transpose_", "squeeze_", "unsqueeze_", "as_strided_", "_unsafe_view", "_reshape_alias", "is_same_size",
}  # fmt: skip
_LISTS = ("_foreach_", "_fused_", "_amp_foreach_")
_TENSORS_A_LAUNCH = 110

_HELP = f"""
The steps are those of benchmarks/train_step.py, on a device that stands in for a GPU: tests/pretend_device.py. Its
numbers are computed on the CPU, but a step takes the path that it takes on a GPU. So no C code hides work: on a CPU
one call of it replaces many operations. Two steps run first; the third is counted.

columns:
  kernels     operations of torch (aten) that compute on the device, in the forward pass, the loss, back-propagation and
              the update. Views, empty tensors and numbers on the CPU count 0. An operation over a list of tensors
              (_foreach_*, _fused_adam_) counts one for each {_TENSORS_A_LAUNCH} tensors, the most that one launch took
              for long. Any other operation counts one. So this is a lower bound: back-propagation of a convolution,
              for example, starts two or more
  host reads  operations for which the program waits: item(), tolist(), a copy to the CPU, a copy from the CPU's
              pageable memory, nonzero(), and an index of booleans. A step that has one cannot be captured in a graph

The batch size changes neither column from 4 on (`groups` has fewer groups below), so it is small. A step costs a GPU at
least its kernels' launches, about 5 microseconds each: 500 kernels are 2.5 ms, however small the network.

examples:
  python benchmarks/kernels.py
  python benchmarks/kernels.py --networks resnet18 --contenders plain,ivon --by_operation
  python benchmarks/kernels.py --networks tabular --markdown
"""


def main(arguments: list[str] | None = None) -> None:
    """Count what the command line asks for, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--networks", default=",".join(SHAPES), help="separated by commas (default: %(default)s)")
    add(
        "--contenders",
        default=",".join(_USUAL),
        help="steps as in train_step.py, separated by commas; cnn and mlp are the deterministic ones, of which each "
        "network has one (default: %(default)s)",
    )
    add("--batch", type=int, default=4, help="examples a step, at least 4 (default: 4)")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="bfloat16: all under torch.autocast")
    add("--by_operation", action="store_true", help="list each step's operations by count, too")
    add("--markdown", action="store_true", help="print the table as markdown too")
    options = parser.parse_args(arguments)
    networks, names = ([name.strip() for name in text.split(",")] for text in (options.networks, options.contenders))
    if unknown := [name for name in networks if name not in BATCHES]:
        parser.error(f"--networks has {unknown[0]!r}; known are {', '.join(BATCHES)}")
    if unknown := [name for name in names if name not in CONTENDERS or name.startswith("tfp")]:
        parser.error(f"--contenders has {unknown[0]!r}; known are {', '.join(CONTENDERS)} but for tfp")
    if options.batch < 4:
        parser.error(f"--batch must be at least 4, one for each group, got {options.batch}")
    sys.path.append(str(_TESTS))
    from pretend_device import AVAILABLE, NAME, pretend_device

    if not AVAILABLE:
        parser.error(f"torch {torch.__version__} cannot stand in for a device: install torch 2.10 or newer")
    pyro.enable_validation(False)
    with pretend_device():
        options.device = torch.device(NAME)
        table, details = count_all(networks, names, options)
    print(*aligned(table), sep="\n")
    if options.markdown:
        print("", *as_markdown(table), sep="\n")
    if options.by_operation:
        print("", *aligned(details), sep="\n")


def count_all(networks: list[str], names: list[str], options: argparse.Namespace) -> tuple[Table, Table]:
    """Count each network's contenders; return the table, and that of the operations."""
    table = [["network", "contender", "kernels", "host reads"]]
    details = [["network", "contender", "operation", "kernels", "host reads"]]
    for network in networks:
        others = ("cnn",) if network in DENSE else ("mlp", "hand")
        for name in (name for name in names if name not in others):
            if why := why_absent(name, torch.device("cpu"), options.precision):
                print(f"{name}: {why}", flush=True)
                continue
            torch.manual_seed(0)
            own = argparse.Namespace(**{**vars(options), "network": network, "channels_last": False})
            step = build_contender(name, own).step
            step()
            step()
            with Counted() as counts:
                step()
            table.append([network, name, str(counts.kernels.total()), str(counts.reads.total())])
            for operation in dict.fromkeys(name for name, _ in (*counts.kernels.most_common(), *counts.reads.items())):
                found = str(counts.kernels[operation]), str(counts.reads[operation])
                details.append([network, name, operation, *found])
    return table, details


class Counted(TorchDispatchMode):
    """Context manager that counts the operations on tensors that are not on the CPU.

    Autograd runs back-propagation in the modes of the thread that asked for it.

    Attributes:
        kernels, reads: their number by name of the operation, as ``--help`` defines them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(result)
        if any(not tensor.is_cpu for tensor in given + made):
            name = func._schema.name.removeprefix("aten::")
            if _waits(func, given, made, kwargs or {}):
                self.reads[name] += 1
            elif not _is_view(func, name):
                # Where a list is empty there is nothing to do.
                is_list = name.startswith(_LISTS)
                self.kernels[name] += math.ceil(len(args[0]) / _TENSORS_A_LAUNCH) if is_list else 1
        return result


def _waits(func: Any, given: list[Tensor], made: list[Tensor], kwargs: dict) -> bool:
    """Whether the program waits for the device: its numbers, a shape that depends on them, or a copy."""
    if func._schema.name in ("aten::copy_", "aten::_to_copy", "aten::copy"):
        # Of the arguments, copy_ has the target too.
        here = {tensor.is_cpu for tensor in given + made}
        return len(here) == 2 and not kwargs.get("non_blocking", False)
    if func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _is_view(func: Any, name: str) -> bool:
    shared = [argument.alias_info for argument in func._schema.arguments if argument.alias_info is not None]
    return name in _NO_WORK or (bool(shared) and not any(info.is_write for info in shared))


def _tensors(parts: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)]


if __name__ == "__main__":
    main()
