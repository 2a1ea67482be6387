"""The worker processes of a training that still run."""

import os
from pathlib import Path


def workers():
    """The processes that this one has started and that still run."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [child for child in children if runs(child)]


def runs(process):
    """Whether there is a process of that number that has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
