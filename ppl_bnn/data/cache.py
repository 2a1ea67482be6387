"""Where the named data sets are kept."""

import os
from pathlib import Path

_NAMED = ("mnist", "fashion-mnist", "cifar10", "digits100k")


def data_folder(given: str | Path | None = None) -> Path:
    """The folder of the data sets.

    It is `given`; else the environment variable ``PPL_BNN_DATA``; else ``data`` in the working directory, if a named
    data set is there, as in a checkout; else the user's own cache, ``$XDG_CACHE_HOME/ppl_bnn`` or ``~/.cache/ppl_bnn``.
    """
    if given is not None:
        return Path(given)
    if named := os.environ.get("PPL_BNN_DATA"):
        return Path(named).expanduser()
    if any((Path("data") / name).is_dir() for name in _NAMED):
        return Path("data")
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ppl_bnn"
