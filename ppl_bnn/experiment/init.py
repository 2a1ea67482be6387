"""Write a run folder for data of your own, with every setting commented, or from a recipe.

    ppl_bnn init my-run --data my.csv --target price            # a table: CSV or Parquet
    ppl_bnn init my-run --data photos                           # images, in a folder for each class
    ppl_bnn init my-run --data arrays.npz                       # arrays x and y; .h5 and .pt too
    ppl_bnn init my-run --recipe mnist-fc                       # a copy of a recipe
    ppl_bnn run my-run

The data are read once, to choose settings that fit them: a likelihood by the kind of target, a network by the kind of
input, and batch size and epochs by the number of examples. Only config.yaml is written, and none is overwritten.

Exit codes: 0 done; 2 bad command or data.
"""

import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace

from ppl_bnn.data import Split, load
from ppl_bnn.data.settings import DataSettings
from ppl_bnn.errors import FileError, UserError, did_you_mean
from ppl_bnn.experiment.command import command_parser, guarded, set_log
from ppl_bnn.experiment.config import Config, ModelConfig
from ppl_bnn.experiment.recipes import recipes
from ppl_bnn.experiment.run_data import target_kind
from ppl_bnn.experiment.starting_config import Source, starting_config
from ppl_bnn.experiment.trust import check_trust

# By the ending of the file's name; endings of compression come after them.
_KINDS = {
    ".csv": "csv", ".tsv": "csv", ".txt": "csv", ".parquet": "parquet", ".pq": "parquet", ".npz": "npz", ".h5": "h5",
    ".hdf5": "h5", ".pt": "torch", ".pth": "torch",
}  # fmt: skip
# What may make data usable, in the order of trying; rows are dropped last.
_TABLES: tuple[dict[str, Any], ...] = (
    {}, {"unknown_categories": "ignore"}, {"missing": "median"}, {"missing": "median", "unknown_categories": "ignore"},
    {"missing": "drop"}, {"missing": "drop", "unknown_categories": "ignore"},
)  # fmt: skip
_ARRAYS: tuple[dict[str, Any], ...] = ({}, {"missing": "median"})
_REMEDIES = {
    "csv": _TABLES, "parquet": _TABLES, "npz": _ARRAYS, "h5": _ARRAYS, "torch": _ARRAYS,
    "folder": ({}, {"image_size": 64}),
}  # fmt: skip
# Larger images are scaled down: a network for them would take hours.
_LARGEST_IMAGE = 96

log = logging.getLogger("ppl_bnn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad command or data."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _init(_parser().parse_args(arguments)), debug="--debug" in arguments)


def _init(parsed: Namespace) -> None:
    folder = Path(parsed.run)
    path = folder / "config.yaml"
    if path.exists():
        raise FileError(f"{path} exists already: choose another folder, or delete that file")
    if (parsed.data is None) == (parsed.recipe is None):
        raise UserError("init takes a file or folder with --data, or a recipe's name with --recipe: give one of them")
    text = _recipe(parsed) if parsed.data is None else starting_config(_read(parsed), str(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What was written there in the meantime stays.
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror or error}") from None
    log.info("init: %s is written: every setting has a comment", path)
    log.info("next: ppl_bnn run %s", shlex.quote(str(folder)))


def _recipe(parsed: Namespace) -> str:
    given = [name for name in ("target", "features", "test", "likelihood") if getattr(parsed, name) is not None]
    if given:
        raise UserError(f"--{given[0]} is for --data; a recipe has its own: leave it out, and edit config.yaml")
    known = recipes()
    if parsed.recipe not in known:
        raise UserError(
            f"--recipe must be one of {', '.join(known)}; got {parsed.recipe!r}{did_you_mean(parsed.recipe, known)}"
        )
    return known[parsed.recipe].read_text(encoding="utf-8")


class _Given(NamedTuple):
    settings: dict[str, Any]
    train: Split
    test: Split


def _read(parsed: Namespace) -> Source:
    """Read the data, with the settings that they need."""
    file = Path(parsed.data).expanduser()
    if not file.exists():
        raise FileError(f"--data {file} is not there: give a file or a folder of images")
    settings: dict[str, Any] = {"name": _kind(file), "file": str(file.absolute())}
    settings |= {"test_file": str(Path(parsed.test).expanduser().absolute())} if parsed.test else {}
    settings |= {name: getattr(parsed, name) for name in ("target", "features") if getattr(parsed, name) is not None}
    if ".tsv" in file.name.lower():
        settings["options"] = {"sep": "\t"}
    likelihood, kind = parsed.likelihood, None
    if likelihood is not None:
        config = Config(model=ModelConfig(likelihood=likelihood))
        check_trust(config, Path(parsed.run), trusted=parsed.trust)
        kind = target_kind(config)
    found = _remedied(settings, kind)
    shape = found.train.shape
    if settings["name"] == "folder" and "image_size" not in found.settings and max(shape[1:]) > _LARGEST_IMAGE:
        found = _remedied({**settings, "image_size": 64}, kind)
    return Source(found.settings, found.train, len(found.test), likelihood)


def _kind(file: Path) -> str:
    if file.is_dir():
        return "npz" if any(file.glob("*.npy")) else "folder"
    kinds = [_KINDS[suffix.lower()] for suffix in file.suffixes if suffix.lower() in _KINDS]
    if not kinds:
        raise FileError(f"--data {file} is of no known kind: give a folder of images, or one of {', '.join(_KINDS)}")
    return kinds[-1]


def _remedied(settings: dict[str, Any], kind: Any) -> _Given:
    """The data as they are, or with the first remedy that makes them usable; else the error that is left."""
    for more in _REMEDIES[settings["name"]]:
        tried = {**settings, **more}
        # Reading tells of itself when the run begins.
        set_log(logging.WARNING)
        try:
            train, test = load(**tried, targets=kind, progress=False, tokens=False)
        except UserError as error:
            left = error
            continue
        finally:
            set_log()
        for name, value in more.items():
            log.info("init: data.%s is %s, which these data need", name, value)
        return _Given(tried, train, test)
    raise UserError(_in_options(str(left))) from left


def _in_options(message: str) -> str:
    """A message about settings, in the words of this command's options."""
    for setting, option in (("data.target", "--target"), ("data.features", "--features"), ("data.test_file", "--test"),
                            ("data.file", "--data"), ("--model.likelihood", "--likelihood")):  # fmt: skip
        message = message.replace(setting, option)
    return message


def _parser() -> ArgumentParser:
    parser = command_parser("init", __doc__, trust=True, usage="RUN (--data FILE [--target NAME] | --recipe NAME)")
    add, helps = parser.add_argument, {known.name: known.metadata["help"] for known in fields(DataSettings)}
    add("run", type=str, help="folder to make")
    add("--data", type=str | None, default=None, help=f"file or folder: a folder of images, or {', '.join(_KINDS)}")
    add("--target", type=str | None, default=None, help=helps["target"])
    add("--features", type=str, nargs="+", default=None, help=helps["features"])
    add("--test", type=str | None, default=None, help=helps["test_file"])
    add(
        "--likelihood",
        type=str | None,
        default=None,
        help="as model.likelihood, such as poisson (default: categorical for texts and few different whole numbers, "
        "normal for other numbers)",
    )
    add("--recipe", type=str | None, default=None, help="recipe to copy, in place of --data")
    return parser
