"""Settings as they are saved beside the results, read back, and compared with a run's."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ppl_bnn.errors import FileError
from ppl_bnn.experiment.config import Config
from ppl_bnn.experiment.recipes import recipe_of
from ppl_bnn.files import write_text
from ppl_bnn.inference.manifest import MANIFEST
from ppl_bnn.settings import decisive, per_host

# What a command writes has every setting of this section, since version 0.1.0; what a person writes has a few.
_RESOLVED = {"name", "dir", "file", "holdout", "num_train", "num_test"}

# They are mappings of the user's own: two with other keys differ.
_WHOLE = ("model.prior", "model.options", "data.options")


def is_out(folder: Path) -> bool:
    """Whether this is a run's out folder: resolved settings beside what a training writes.

    Raises:
        FileError: its settings cannot be read.
    """
    path = folder / "config.yaml"
    if not path.exists() or not any((folder / name).exists() for name in ("checkpoints", MANIFEST)):
        return False
    data = read(path).get("data")
    return isinstance(data, dict) and data.keys() >= _RESOLVED


def out_of(folder: Path) -> Path:
    """Where results go without ``--out``: into ``out`` of a run folder, into an out folder itself, and for the name of
    a recipe into ``runs/<name>/out`` of the working directory."""
    if recipe_of(folder):
        return Path("runs") / folder / "out"
    return folder if is_out(folder) else folder / "out"


def trained_part(config: Config) -> dict[str, dict[str, Any]]:
    """The settings that decide what training produces: two runs that agree here may share an out folder."""
    parts = {name: getattr(config, name) for name in ("data", "model", "guide", "train")}
    return {name: {key: getattr(part, key) for key in decisive(type(part))} for name, part in parts.items()}


def completed(part: str, there: Mapping[str, Any]) -> dict[str, Any]:
    """A saved part of the settings. A setting added since then has its default."""
    return {**dataclasses.asdict(getattr(Config(), part)), **there}


def shared_part(config: Config) -> str:
    """The settings that must be the same on all ranks, as JSON: all but those of each host."""
    part = dataclasses.asdict(config)
    for name in per_host(Config):
        del part[name]
    for name in (name for name, value in part.items() if isinstance(value, dict)):
        for key in per_host(type(getattr(config, name))):
            del part[name][key]
    return json.dumps(part, sort_keys=True)


def first_difference(
    now: dict[str, Any], saved: dict[str, Any], *, prefix: str = "", words: tuple[str, str] = ("saved", "now")
) -> str | None:
    """``train.lr: saved 0.001, now 0.01`` for the first setting of `now` that differs in `saved`, or None."""
    for name, value in now.items():
        other = saved.get(name, "absent")
        if isinstance(value, dict) and isinstance(other, dict) and not f"{prefix}{name}".endswith(_WHOLE):
            if found := first_difference(value, other, prefix=f"{prefix}{name}.", words=words):
                return found
        elif value != other:
            return f"{prefix}{name}: {words[0]} {other!r}, {words[1]} {value!r}"
    return None


def save(config: Config, path: Path) -> None:
    """Write the resolved settings as YAML."""
    write_text(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def check_sections(path: Path) -> None:
    """Raise FileError for a file that holds no settings, or has a single value in place of a section."""
    sections = {field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)}
    for name, value in read(path).items():
        if name in sections and not isinstance(value, dict):
            raise FileError(f"{path}: {name} must hold settings, such as {name}.{_example(name)}; got {value!r}")


def _example(section: str) -> str:
    return dataclasses.fields(getattr(Config(), section))[0].name


def read(path: Path) -> dict[str, Any]:
    """Read saved settings.

    Raises:
        FileError: the file cannot be read, or is not a YAML mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise FileError(f"{path} must be a mapping of settings, got {type(content).__name__}")
    return content
