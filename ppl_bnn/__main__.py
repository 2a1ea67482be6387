"""ppl_bnn: train Bayesian neural networks, predict with them and prune them.

To begin with:

    ppl_bnn run mnist-fc                                    train a recipe, and report on it in runs/mnist-fc/out
    ppl_bnn init my-run --data my.csv --target price        write a run folder for data of your own
    ppl_bnn run my-run                                      train it: scores, figures and draws are in my-run/out

"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from ppl_bnn.errors import did_you_mean
from ppl_bnn.version import __version__


class _Command(NamedTuple):
    module: str
    about: str


# The module of a command is imported when it is named: --help and --version do without torch.
COMMANDS = {
    "run": _Command("ppl_bnn.run", "train, predict with, prune and report a run folder or a recipe"),
    "init": _Command("ppl_bnn.experiment.init", "write a run folder for a file or folder of data, or from a recipe"),
    "jobs": _Command("ppl_bnn.jobs", "many runs of one folder: over seeds, checkpoints and settings"),
    "export": _Command("ppl_bnn.export", "a trained posterior's predictive as one ONNX file"),
    "import": _Command("ppl_bnn.import_posterior", "a run from a posterior that was trained elsewhere"),
    "scaling": _Command("ppl_bnn.scaling.__main__", "measure throughput on many ranks, and predict more"),
    "study": _Command("ppl_bnn.study.__main__", "the study of 2020, redone on one page"),
}
_BAD_COMMAND = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of the library and return its exit code: 0 for help, 2 for an unknown command."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("--version", "-V"):
        print(f"ppl_bnn {__version__}")
        return 0
    if name in ("--help", "-h"):
        print(_help())
        return 0
    if name not in COMMANDS:
        wrong = f"there is no command {name!r}{did_you_mean(name, COMMANDS)}" if name else "a command is missing"
        print(f"error: {wrong}; the commands are {', '.join(COMMANDS)}: see ppl_bnn --help", file=sys.stderr)
        return _BAD_COMMAND
    if name == "run":
        return _run(rest)
    return int(import_module(COMMANDS[name].module).main(rest))


def _run(arguments: Sequence[str]) -> int:
    from ppl_bnn.native.openmp import wait_briefly

    # Before torch is imported, which reads it.
    wait_briefly()
    code = import_module(COMMANDS["run"].module).main(arguments)
    # Of several ranks it does not return.
    import_module("ppl_bnn.distributed").leave(code)
    return int(code)


def _help() -> str:
    names = "\n".join(f"    {name:<12}{command.about}" for name, command in COMMANDS.items())
    return (
        f"{__doc__}The commands, each with a --help of its own:\n\n{names}\n\n"
        "Also: ppl_bnn --version, ppl_bnn --help. `python -m ppl_bnn` is the same command."
    )


if __name__ == "__main__":
    sys.exit(main())
