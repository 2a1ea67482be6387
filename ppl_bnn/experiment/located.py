"""Where the files are that settings name."""

from collections.abc import Callable
from pathlib import Path

from ppl_bnn.data import DATASETS
from ppl_bnn.experiment.config import Config


def locate_files(config: Config, folder: Path) -> None:
    """Make paths of files absolute.

    Those of data.file, data.test_file and shift.ood are looked for here, then in `folder`, then by their names in
    `data.dir`. A file that is nowhere keeps the first of these places. The posterior is looked for here alone.
    """
    if config.predict.posterior is not None:
        config.predict.posterior = str(Path(config.predict.posterior).expanduser().absolute())
    if config.shift.ood is not None:
        config.shift.ood = [_with_file(name, lambda file: _located(file, config, folder)) for name in config.shift.ood]
    # The archive that stands in for a download is looked for here alone.
    if config.data.name == "cifar10":
        return
    for name in ("file", "test_file"):
        given = getattr(config.data, name)
        if given is not None:
            setattr(config.data, name, _located(given, config, folder))


def without_folder(name: str) -> str:
    """A source with its file as `shift.ood` names it, without the file's folder: ``csv:other.csv``."""
    return _with_file(name, lambda file: Path(file).name)


def _with_file(name: str, change: Callable[[str], str]) -> str:
    source, _, file = name.partition(":")
    return f"{source}:{change(file)}" if source in DATASETS and file else name


def _located(given: str, config: Config, folder: Path) -> str:
    here = Path(given).expanduser().absolute()
    places = [here, (folder / given).absolute()]
    if config.data.dir is not None:
        places.append((Path(config.data.dir) / here.name).absolute())
    return str(next((place for place in places if place.exists()), here))
