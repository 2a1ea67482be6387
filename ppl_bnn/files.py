"""Files are written beside their place and renamed into it: a reader sees the old one or the new one, never half."""

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ppl_bnn.errors import FileError

log = logging.getLogger(__name__)


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` when the block ends without an error.

    Raises:
        OSError: the folder cannot be written or the disk is full; `path` is then as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        # A full disk does not say which file it was.
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder for this process until the block ends, or the process.

    Raises:
        FileError: another process holds it.
    """
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileError(
                f"another command is at work in {folder}; wait for it, or choose another folder with --out"
            ) from None
        except OSError as error:
            log.debug("%s is on a file system without locks: %s", folder, error)
        yield


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
