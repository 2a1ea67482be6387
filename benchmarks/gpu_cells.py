"""What the parts of benchmarks/gpu.py share: the settings of the run, a cell and its clock."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class NotHere(Exception):
    """What a cell measures cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Plan:
    """The settings of the run.

    Attributes:
        toy: small networks and few repetitions.
        data_dir: folder of the named data sets.
        data: an .npz of CIFAR-10 as JPEGs.
    """

    device: str
    toy: bool
    out: Path
    data_dir: Path
    data: Path | None


class Clock:
    """The time that is left to a part, and a place to say what is being done.

    Args:
        deadline: of ``time.monotonic()``, which all processes of a machine share.
        say: told what is about to be done; the record names it if the process is lost then.
    """

    def __init__(self, deadline: float, say: Callable[[str], None] = lambda text: None) -> None:
        self.deadline, self.say = deadline, say

    def left(self) -> float:
        """Seconds until the part's deadline."""
        return self.deadline - time.monotonic()


class Cell(NamedTuple):
    """One measurement: it yields rows, and is not started with less than `minimum` seconds left."""

    name: str
    minimum: float
    run: Callable[[Clock], Iterator[Row]]


def why(error: Exception) -> str:
    """Return an error as one line: the message of a NotHere, else its type and the first 300 characters."""
    if isinstance(error, NotHere):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def need_cuda(plan: Plan) -> None:
    """Raise NotHere unless the device is a GPU."""
    if plan.device != "cuda":
        raise NotHere("needs CUDA")
