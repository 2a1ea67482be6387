"""A run's own code: the import paths in its settings, whose files they may come from, and where they are looked for.

A run folder whose settings name an import path, such as ``model.name: nets:build``, executes code when it runs.
"""

import importlib
import importlib.util
import logging
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from ppl_bnn.data import DATASETS
from ppl_bnn.distributed import is_first
from ppl_bnn.errors import FileError
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.config import Config
from ppl_bnn.settings import per_host

# They hold names of columns, or keywords of a function that another setting names.
_NO_CODE = {
    "data.target", "data.features", "data.categorical", "data.options", "model.options", "shift.column",
}  # fmt: skip
# Classes of torch that do nothing but what they are named for. A function such as torch:load could run any code.
_TORCH = re.compile(r"torch\.(nn|optim|optim\.lr_scheduler):[A-Z]\w*")

# A job's out folder lies at most that many folders below its run folder: <run>/out/jobs/<training>/<prediction>.
_DEEPEST = 4

# Of the run that was made importable last.
_run_folders: list[str] = []

log = logging.getLogger("ppl_bnn")


def check_trust(config: Config, folder: Path, *, trusted: bool = False, files: Iterable[Path] = ()) -> dict[str, str]:
    """Return the import paths of a run, {setting: path}, and make them importable; refuse those of another user.

    Modules are looked for in the run folder first, then in the working directory, then where Python looks. A run
    without such paths is not checked. Rank 0 logs the paths; nothing is imported before.

    Args:
        folder: the run folder, or an out folder in it; a recipe's name has no folder.
        trusted: the user trusts the code, whoever owns the files.
        files: further files of settings.

    Raises:
        FileError: the folder, its config.yaml, a module's file in it or in the working directory, or one of `files`
            belongs to another user, and `trusted` is false.
    """
    found = dict(own_code(config))
    if not found:
        return {}
    folders = [folder] if folder.is_dir() else []
    # Code lies beside the config.yaml that a person wrote.
    if folders and saved_config.is_out(folder):
        folders.append(_run_folder(folder.resolve()))
    working = [Path.cwd()] if trusted or _is_own(Path.cwd()) else []
    run_folders, others = [str(path.resolve()) for path in folders], [str(path) for path in working]
    modules = _module_files(config, [*run_folders, *others])
    for path in (*folders, *(one / "config.yaml" for one in folders), *files, *modules):
        if not trusted and not _is_own(path):
            raise FileError(
                f"{path} belongs to another user, and the run executes code ({_listed(found)}): look at that code, "
                "then allow it with --trust (trust=True in Python)"
            )
    _make_importable(run_folders, others)
    if is_first():
        log.info("this run executes code of its own: %s", _listed(found))
    return found


def own_code(config: Config) -> Iterator[tuple[str, str]]:
    """Each setting that holds an import path, and that path; torch's optimizers and layers do not count."""
    for name, value in _settings(config):
        for text in _texts(value):
            if names_code(text) and not _is_file(name, text):
                yield name, text


def names_code(text: str) -> bool:
    """Whether a text may be an import path, other than of torch's optimizers and layers."""
    # As loose as the look-up itself, which takes any text before and after a colon.
    return ":" in text and not _TORCH.fullmatch(text)


def code_checksums(config: Config) -> dict[str, str]:
    """The CRC-32 of the source file of each module that the settings import from, by the module's name.

    A module's own file counts, and no other that it imports.
    """
    found = {}
    for name in sorted({path.partition(":")[0] for _, path in own_code(config)}):
        try:
            spec = importlib.util.find_spec(name)
            source = Path(spec.origin).read_bytes() if spec is not None and spec.origin else b""
        except (ImportError, ValueError, OSError):
            # What does not import is refused where it is looked up; __main__ and built-in modules have no file.
            continue
        found[name] = f"{zlib.crc32(source):08x}"
    return found


def _run_folder(out: Path) -> Path:
    """The run folder around an out folder: the first whose settings a person wrote, or else the folder around it."""
    around = list(out.parents)[:_DEEPEST]
    written = (path for path in around if (path / "config.yaml").exists() and not saved_config.is_out(path))
    return next(written, out.parent)


def _module_files(config: Config, folders: list[str]) -> Iterator[Path]:
    """The files in `folders` of the modules that the settings name, and of the packages around these modules."""
    importlib.invalidate_caches()
    for name in {path.partition(":")[0] for _, path in own_code(config)}:
        places: Iterable[str] = folders
        for part in name.split("."):
            # By its last name, which imports no package around it.
            spec = PathFinder.find_spec(part, list(places))
            if spec is None:
                break
            if spec.origin:
                yield Path(spec.origin)
            places = spec.submodule_search_locations or []


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {path}" for name, path in found.items())


def _is_file(name: str, text: str) -> bool:
    # A source with its file, csv:other.csv; no such module is looked up.
    return name == "shift.ood" and text.partition(":")[0] in DATASETS


def _settings(config: Config) -> Iterator[tuple[str, Any]]:
    """The settings in which an import path is looked up, by their dotted names."""
    for section in (known.name for known in fields(config) if is_dataclass(getattr(config, known.name))):
        part = getattr(config, section)
        for name in (known.name for known in fields(part) if known.name not in per_host(type(part))):
            if f"{section}.{name}" not in _NO_CODE:
                yield f"{section}.{name}", getattr(part, name)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _is_own(path: Path) -> bool:
    # Systems without user ids cannot tell.
    return not hasattr(os, "geteuid") or not path.exists() or path.stat().st_uid == os.geteuid()


def _make_importable(run_folders: list[str], working: list[str]) -> None:
    """Put the folders first on Python's path. Modules of another run's folder are forgotten: this run has its own."""
    gone = [folder for folder in _run_folders if folder not in run_folders]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or "." in name or name in ("__main__", "ppl_bnn"):
            continue
        # A module nets.py, or a package nets/__init__.py.
        if {str(Path(file).parent), str(Path(file).parent.parent)} & set(gone):
            for other in [one for one in sys.modules if one == name or one.startswith(f"{name}.")]:
                del sys.modules[other]
    first = list(dict.fromkeys([*run_folders, *working]))
    sys.path[:] = [*first, *(path for path in sys.path if path not in {*first, *gone})]
    _run_folders[:] = run_folders
    importlib.invalidate_caches()
