"""Batch norm needs two values a channel to train: which layers have one an example, and which steps one example."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ppl_bnn.errors import UserError


def check_norms(norms: Sequence[str], n: int, batch_size: int, ranks: int) -> None:
    """Raise UserError if a step of N = `n` examples would have one, and there are batch norms that cannot take it."""
    last = n % (batch_size * ranks)
    # The smallest parts of a full and of the last batch; an empty part does not count.
    parts = [batch_size] * (n >= batch_size * ranks) + [part for part in (last // ranks, -(-last // ranks)) if part]
    if norms and 1 in parts:
        raise UserError(_one_example(norms[0], n, batch_size, ranks))


def note_single_values(path: str, count: int, norms: list[str]) -> Callable:
    """A forward pre-hook of the batch norm at `path`: notes it in `norms` if it has one value an example and channel.

    Args:
        count: examples of the forward pass.
    """

    def hook(module: _BatchNorm, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        x = inputs[0] if inputs else keywords["input"]
        if x.numel() // max(1, x.shape[1]) <= count and (module.training or module.running_mean is None):
            norms.append(path)
            if count == 1:
                raise UserError(_one_example(path, 1, "N"))

    return hook


def _one_example(path: str, n: int, batch_size: int | str, ranks: int = 1) -> str:
    each = f" on each of {ranks} ranks" if ranks > 1 else ""
    return (
        f"batch norm {path!r} needs at least 2 examples a step to train, and {n} examples with batch_size {batch_size}"
        f"{each} leave a step with 1: choose another batch_size, or drop an example"
    )
