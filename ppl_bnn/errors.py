"""The exceptions that users meet. A user's mistake is a `UserError`; an error of ours never looks like one."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input, settings or data that cannot be used. The message says what was got, what is expected and what to do."""


class FileError(UserError):
    """A file that cannot be used. The message says which one, why, and what to do."""


class Interrupted(Exception):
    """Work stopped because it was asked to stop. A training has saved a checkpoint first."""


class Diverged(RuntimeError):
    """The loss or a gradient became NaN or infinite, or the ranks' parameters are no longer equal."""


class WorkerLost(RuntimeError):
    """A worker process that reads data is gone. The last checkpoint of a training is good."""


class CallbackFailed(RuntimeError):
    """A callback or logger of the user's own raised an error, its cause, while a training ran."""


def some(names: Iterable[str], most: int = 3) -> str:
    """The first of some names, quoted, and how many more there are, for a message."""
    first, rest = (names := list(names))[:most], len(names) - most
    return ", ".join(map(repr, first)) + (f" and {rest} more" if rest > 0 else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean epochs?)`` for a name close to one of those known, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
