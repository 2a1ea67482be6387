"""Where numbers of a training go beside its own log."""

from collections.abc import Mapping
from typing import Protocol


class Logger(Protocol):
    """What `fit` tells its numbers, on rank 0 alone: every 50 steps, and after each epoch.

    Names begin with ``step/`` (means over the 50 steps) or ``epoch/`` (the record of an epoch): ``epoch/val_nll``.
    """

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take some numbers by name, after this number of updates."""

    def close(self) -> None:
        """Finish; called once, after a training that failed too."""
