"""The threads of a command: the cores for them, and how long they look for each other before they sleep."""

import os


def num_cores() -> int:
    """The number of cores that this process may use, where the system tells, else that of the machine."""
    # macOS and Windows have no such call.
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def wait_briefly() -> None:
    """Let OpenMP's threads spin for a short time only, unless the environment says how long. Call it before torch.

    GNU OpenMP, which ``import torch`` loads, reads the variable once. By default its threads look 300,000 times for
    each other before they sleep: on a core that other work wants too, that wait takes the time slice the awaited thread
    would need.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "3000"
