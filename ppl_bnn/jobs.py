"""The command `python -m ppl_bnn.jobs`: many trainings, predictions and prunings of one run (`ppl_bnn.experiment.jobs`)."""

import sys

from ppl_bnn.experiment.jobs import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
