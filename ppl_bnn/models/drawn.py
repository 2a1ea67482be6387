"""The draw of a random parameter that tells estimators of every torch function that uses it.

Without an estimator a draw is a plain tensor, and nothing of this runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pyro.poutine.runtime import effectful
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# Functions of (input, weight, bias, *settings) that are linear in the weight. F.linear has its features last, after any
# positions; the others have channels first and positions after them.
LAYERS: frozenset[Callable[..., Tensor]] = frozenset(
    (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
)
# Of a layer's input, weight and bias, which is the draw.
_WEIGHT = [False, True, False]
# What asks a weight for something that is no number of it.
_ASKING = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf",
      "layout", "is_cuda", "is_sparse", "is_quantized", "is_nested", "is_mps", "is_meta")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point,
    Tensor.__len__, Tensor.nelement, Tensor.is_complex, torch.is_floating_point, torch.numel, torch.is_complex,
}  # fmt: skip


@dataclass(slots=True)
class Use:
    """One call of a torch function with random parameters among its arguments.

    Attributes:
        function: torch's function; `args` and `kwargs` are what it is called with.
        sites: the random parameters among them.
        layer: whether it is one of `LAYERS` with a random weight and an input that is not one.
        examples: number of examples in the forward pass, None where it is not known.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    sites: list[str]
    layer: bool
    examples: int | None

    def plainly(self, values: Mapping[str, Tensor] | None = None) -> Any:
        """What the function gives with the draws, or other values of some sites in their place."""
        values = values or {}

        def other(value: Any) -> Any:
            return values.get(value.site, value.value) if isinstance(value, Drawn) else value

        return self.function(*tree_map(other, self.args), **tree_map(other, dict(self.kwargs)))

    def layer_arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Callable[..., Tensor]]:
        """Of a layer: input, weight, bias, and the function with its settings, of (input, weight, bias)."""
        if not self.kwargs and len(self.args) == 3:
            x, weight, bias = self.args
            return x, weight.value, bias, self.function
        names = dict(zip(("input", "weight", "bias"), self.args[:3], strict=False))
        given = {**names, **self.kwargs}
        x, weight, bias = (plain(given.pop(name, None)) for name in ("input", "weight", "bias"))
        settings, function = self.args[3:], self.function
        if not settings and not given:
            return x, weight, bias, function
        return x, weight, bias, lambda x, weight, bias: function(x, weight, bias, *settings, **given)

    @property
    def by_example(self) -> bool:
        """Whether dimension 0 of a layer's input is the examples."""
        x = self.args[0] if self.args else self.kwargs["input"]
        return self.layer and x.dim() > 1 and len(x) == self.examples


class Drawn(Tensor):
    """A random parameter's draw: torch hands each function that uses it to `answer`, or to `bayes_function`.

    Attributes:
        site: the parameter's name.
        examples: number of examples in the forward pass, None where it is not known.
        value: the draw as a plain tensor.
        answer: what computes the function; None asks Pyro's handlers.
    """

    site: str
    examples: int | None
    value: Tensor
    answer: Callable[[Use], Any] | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LAYERS and not kwargs and len(args) > 2 and [type(value) is Drawn for value in args[:3]] == _WEIGHT:
            weight = args[1]
            use = Use(func, args, kwargs, [weight.site], True, weight.examples)
            return weight.answer(use) if weight.answer else bayes_function(use, name=weight.site)
        if func in _ASKING or not (found := [v for v in tree_leaves((args, kwargs)) if isinstance(v, Drawn)]):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        layer = func in LAYERS and len(found) == 1 and (args[1] if len(args) > 1 else kwargs.get("weight")) is found[0]
        sites = list(dict.fromkeys(value.site for value in found))
        use = Use(func, args, kwargs, sites, layer, found[0].examples)
        return found[0].answer(use) if found[0].answer else bayes_function(use, name=sites[0])


# An estimator is a Pyro handler that answers this message, of a use of random parameters; without an answer it is
# torch's own function of the draws.
bayes_function = effectful(Use.plainly, type="bayes_function")


def as_drawn(value: Tensor, site: str, examples: int | None, *, answer: Callable[[Use], Any] | None = None) -> Drawn:
    """A draw with its site's name, and the number of examples in the forward pass."""
    drawn = value.as_subclass(Drawn)
    drawn.site, drawn.examples, drawn.value, drawn.answer = site, examples, value, answer
    return drawn


def plain(value: Any) -> Any:
    """The draw as a plain tensor; anything else as it is."""
    return value.value if isinstance(value, Drawn) else value
