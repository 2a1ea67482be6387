"""A run's out folder: its settings, its run's name, and the check that it may take a run's results."""

import os
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from ppl_bnn.errors import FileError, UserError
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.config import Config
from ppl_bnn.experiment.config_check import check
from ppl_bnn.experiment.located import locate_files
from ppl_bnn.experiment.trust import check_trust
from ppl_bnn.inference import checkpoint


def saved_settings(out: Path, *, device: str = "cpu", data_dir: str | None = None, trusted: bool = False) -> Config:
    """The settings saved in an out folder, for another device, and with another `data_dir` if the data moved.

    A file of data that is no longer where it was is looked for by its name in `data_dir`.

    Raises:
        FileError: the folder has no settings, or invalid ones, or is another user's and not `trusted` (`check_trust`);
            code that they name cannot be imported.
    """
    config, path = Config(), out / "config.yaml"
    try:
        for name, value in saved_config.read(path).items():
            part: Any = getattr(config, name)
            setattr(config, name, replace(part, **value) if is_dataclass(part) else value)  # type: ignore[type-var]
        config.device, config.data.dir = device, data_dir or config.data.dir
        check_trust(config, out, trusted=trusted)
        check(config)
        locate_files(config, out)
    except (AttributeError, TypeError, UserError) as error:
        if isinstance(error, FileError):
            raise
        # Code of the run's own that does not import says so itself.
        if error.__cause__ is not None:
            raise FileError(f"{path}: {error}") from error
        raise FileError(f"{path} is damaged, or of another version of ppl_bnn: {error}") from None
    return config


def run_name(folder: Path) -> str:
    """The run's name in its results: that of the run folder, which an out folder's last checkpoint remembers.

    For a checkpoint of version 0.1.0 it is the name of the out folder, or of the folder around one called ``out``.
    """
    folder = folder.resolve()
    if not saved_config.is_out(folder):
        return folder.name
    saved = checkpoint.saved(folder / "checkpoints")
    known = checkpoint.read_meta(saved[-1]).get("origin", {}).get("run") if saved else None
    return known or (folder.parent if folder.name == "out" else folder).name


def check_out(config: Config, out: Path, folder: Path) -> None:
    """Make the out folder. Refuse one that holds another run, or is the run folder `folder` itself.

    Raises:
        FileError: it holds a run trained with other settings (the message names the first), or cannot be written.
    """
    if out.resolve() == folder.resolve() and not saved_config.is_out(folder):
        raise FileError(f"--out {out} is the run folder itself, whose config.yaml it would overwrite; choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"the out folder {out} cannot be written: {error.strerror or error}") from None
    if not os.access(out, os.W_OK):
        raise FileError(f"the out folder {out} cannot be written: permission denied")
    path = out / "config.yaml"
    results = [*out.glob("predictive*.nc"), *out.glob("pruning*.nc"), *checkpoint.saved(out / "checkpoints")]
    if not path.exists() or not results:
        return
    there = saved_config.read(path)
    for part, here in saved_config.trained_part(config).items():
        own = there.get(part)
        own = saved_config.completed(part, own) if isinstance(own, dict) else {}
        if difference := saved_config.first_difference(here, own, prefix=f"{part}."):
            raise FileError(
                f"{out} holds a run with other settings: {difference}; "
                "choose another folder with --out, or delete that one"
            )
