"""How long the threads of a command look for each other before they sleep."""

import os


def wait_briefly() -> None:
    """Let OpenMP's threads spin for a short time only, unless the environment says how long. Call it before torch.

    GNU OpenMP, which ``import torch`` loads, reads the variable once. By default its threads look 300,000 times for
    each other before they sleep: on a core that other work wants too, that wait takes the time slice the awaited thread
    would need.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "3000"
