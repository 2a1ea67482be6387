"""A logger that writes TensorBoard's files."""

from collections.abc import Mapping
from pathlib import Path

from ppl_bnn.errors import UserError


class TensorBoard:
    """Logger (`ppl_bnn.inference.loggers`) that writes event files; ``tensorboard --logdir FOLDER`` shows them.

    A training that goes on writes into the same folder; of steps that were done twice TensorBoard shows the last.

    Args:
        folder: made when the first numbers come.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("TensorBoard needs its package: pip install 'ppl_bnn[tensorboard]'") from None
        self.folder, self._open = Path(folder), SummaryWriter
        self._writer: SummaryWriter | None = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write some numbers by name at a step."""
        if self._writer is None:
            # What is written from here on replaces what an earlier process wrote of the same steps.
            self._writer = self._open(str(self.folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
