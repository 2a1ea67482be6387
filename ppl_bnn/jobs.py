"""The command `ppl_bnn jobs`: many jobs of one run folder (`ppl_bnn.experiment.jobs`)."""

import sys

from ppl_bnn.experiment.jobs import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
