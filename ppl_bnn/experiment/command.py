"""What all commands share: exit codes, the log on standard error, the parser, and one-line errors."""

import glob
import logging
import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from ppl_bnn.errors import CallbackFailed, Diverged, FileError, Interrupted, UserError, WorkerLost
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.config import Config
from ppl_bnn.experiment.located import locate_files
from ppl_bnn.experiment.recipes import config_of
from ppl_bnn.experiment.trust import check_trust

# 0 done; 1 failed while running; 2 bad command, settings or data; 75 stopped, and the same command resumes.
DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75

log = logging.getLogger("ppl_bnn")


def guarded(run: Callable[[], int | None], *, debug: bool = False, explain: Callable[[str], str] = str) -> int:
    """Run a command with its log on standard error; return its exit code. An error is one line, never a traceback.

    Args:
        run: the command; returns an exit code, or None for `DONE`.
        debug: show the traceback of an error too.
        explain: adds to the message of a user's mistake.
    """
    with log_on_stderr():
        try:
            return run() or DONE
        except Interrupted as interruption:
            log.warning("%s; run the same command again to resume", interruption)
            return STOPPED
        except KeyboardInterrupt:
            log.error("stopped at once; run the same command again to resume from the last saved state")
            return STOPPED
        except Exception as error:  # noqa: BLE001 -- the boundary: no bare traceback on the command line
            if debug:
                traceback.print_exception(error)
            mistake = isinstance(error, UserError | ArgumentError)
            message = " ".join((explain(str(error)) if mistake else _failure(error)).split())
            log.error("error: %s", message)
            return BAD_INPUT if mistake else FAILED


def _failure(error: Exception) -> str:
    from ppl_bnn.distributed import RankLost
    from ppl_bnn.inference.memory import is_out_of_memory

    if isinstance(error, Diverged | CallbackFailed | WorkerLost):
        return str(error)
    if isinstance(error, RankLost):
        return f"another rank is gone ({error}); run the same command again to resume from the last checkpoint"
    if is_out_of_memory(error):
        return f"out of memory: ask for fewer draws, fewer images or smaller batches ({error})"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; existing results are intact; run the same command again to resume"
    return f"{type(error).__name__}: {error} (an error of ppl_bnn's own; --debug shows where)"


@contextmanager
def log_on_stderr() -> Iterator[None]:
    """Context manager that shows the package's log on standard error; a host program's logging does not change."""
    handler, level = _OnStderr(sys.stderr), log.level
    # A host program may show it there already, in its own way.
    if all(getattr(other, "stream", None) is not sys.stderr for other in logging.getLogger().handlers):
        log.addHandler(handler)
    set_log()
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def set_log(level: int = logging.INFO, prefix: str = "") -> None:
    """Set the lowest level that the command's log shows, and the prefix of each line."""
    log.setLevel(level)
    for handler in log.handlers:
        if isinstance(handler, _OnStderr):
            handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))


class _OnStderr(logging.StreamHandler):
    """The handler of a command, told from a host program's."""


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of the description, and jsonargparse's types and defaults."""


def command_parser(
    name: str, description: str | None, *, usage: str | None = None, trust: bool = False
) -> ArgumentParser:
    """The parser of ``ppl_bnn <name>``, with an option `trust` if asked for; a bad argument raises ArgumentError."""
    parser = ArgumentParser(
        prog=f"ppl_bnn {name}",
        usage=usage and f"ppl_bnn {name} {usage}",
        description=description,
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if trust:
        parser.add_argument(
            "--trust",
            action="store_true",
            help="run the code that the settings name (import paths), although the run folder is another user's",
        )
    return parser


def parse_run(make_parser: Callable[[], ArgumentParser], arguments: Sequence[str]) -> tuple[Namespace, Config]:
    """Parse arguments over the settings of the run or out folder that they name; its config.yaml gives the defaults.

    Import paths in the settings can be looked up afterwards (`check_trust`).

    Raises:
        UserError, ArgumentError: a folder without settings, settings that cannot be read, or another user's code.
    """
    # The folder has to be known before its settings are read.
    printing = [argument for argument in arguments if argument.startswith("--print_config")]
    first = make_parser().parse_args([argument for argument in arguments if argument not in printing])
    folder = Path(first.run)
    path = config_of(folder)
    overriding = [Path(str(found)) for found in first.get("config") or [] if found is not None]
    # Settings that were given in place of a file have no path.
    for file in (path, *overriding):
        saved_config.check_sections(file)
    parser = make_parser()
    parser.default_config_files = [glob.escape(str(path))]
    try:
        parsed = parser.parse_args(list(arguments))
    except ArgumentError as error:
        # The same arguments were fine without the file.
        version = (
            " (an out folder of another version of ppl_bnn, or edited)" if saved_config.is_out(path.parent) else ""
        )
        raise FileError(f"{path}{version}: {error}") from None
    settings = parser.instantiate(parsed)
    config = Config(**{name: settings[name] for name in Config.__dataclass_fields__})
    check_trust(config, folder, trusted=parsed.trust, files=overriding)
    locate_files(config, path.parent)
    return parsed, config


def settings_parser() -> ArgumentParser:
    """The parser of a run and its settings, for commands that pass these on to ``ppl_bnn run``."""
    parser = command_parser("run", None, trust=True)
    parser.add_argument("run", type=str)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Config)
    return parser
