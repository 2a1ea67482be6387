"""Random numbers of a data set's own, beside those of the training."""

import hashlib
import random
from typing import Any, Self

import numpy as np
import torch


class OwnRandom:
    """Context manager: inside, torch's (on the CPU), numpy's and Python's generators are those of this object.

    It may be entered again and again: each time its generators continue from where they were.
    """

    def __init__(self, seed: int = 0) -> None:
        self._own: Any = None
        self._seed = seed

    def __enter__(self) -> Self:
        self._outer = _state()
        if self._own is None:
            self.seed(self._seed)
        else:
            _set(self._own)
        return self

    def __exit__(self, *error: object) -> None:
        self._own = _state()
        _set(self._outer)

    @staticmethod
    def seed(seed: int) -> None:
        """Seed the three generators."""
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 -- the generator that transforms draw from
        random.seed(seed)


def seed_of(key: int, row: int) -> int:
    """The seed of an example's random transforms: a hash of both numbers, below 2^63."""
    digest = hashlib.blake2b(f"{key} {row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _state() -> tuple[Any, ...]:
    return torch.default_generator.get_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def _set(state: tuple[Any, ...]) -> None:
    torch.default_generator.set_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])
