"""The table of coverage: one row a network, with what `bayesian` makes random of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ppl_bnn.models.selection import Select

EXAMPLES, CLASSES = 4, 3
STEPS = ("plain", "flipout", "groups", "local")


@dataclass(frozen=True)
class Row:
    """One network of the table.

    Attributes:
        group: heading of its part of the table.
        build: the network, [N, ...] -> [N, C].
        inputs: makes its inputs, each [N, ...].
        sites, parameters: how many random sites and random numbers it has.
        own_noise: number of sites that estimators give a noise of each example; the others have the plain draw.
        select: as of `bayesian`.
        refused: {column: how the message begins}, of what does not work.
        needs: a package beside torch and torchvision.
        slow: too large for every run.
    """

    group: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    sites: int
    parameters: int
    own_noise: int
    select: Select | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None
    slow: bool = False


def numbers(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """A maker of one input [N, *shape] of normal numbers."""
    return lambda: (torch.randn(EXAMPLES, *shape),)


def tokens(length: int, vocabulary: int) -> Callable[[], tuple[Tensor, ...]]:
    """A maker of one input [N, length] of token numbers."""
    return lambda: (torch.randint(0, vocabulary, (EXAMPLES, length)),)


def no_tensor(kind: str) -> dict[str, str]:
    """What is refused of a network whose outputs are of this kind."""
    return dict.fromkeys(
        (*STEPS, "draws", "prune", "save"), f"the network must return one tensor [N, ...], got a {kind}"
    )


class Pick(nn.Module):
    """A network whose output is no tensor, and the part of it that is one."""

    def __init__(self, net: nn.Module, pick: Callable[..., Tensor]):
        super().__init__()
        self.net, self.pick = net, pick

    def forward(self, x: Tensor) -> Tensor:
        return self.pick(self.net(x))
