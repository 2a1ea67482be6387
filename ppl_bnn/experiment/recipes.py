"""The recipes that come with the library: run folders that are known by their names, from any folder."""

from pathlib import Path

from ppl_bnn.errors import FileError, did_you_mean, some

# In a checkout it is a link to runs/.
_FOLDER = Path(__file__).parent.parent / "recipes"


def recipes() -> dict[str, Path]:
    """The recipes, {name: its config.yaml}."""
    return {path.parent.name: path for path in sorted(_FOLDER.glob("*/config.yaml"))}


def recipe_of(run: Path) -> Path | None:
    """The config.yaml of the recipe that is named where a run folder may be; None if this is a folder, or no name."""
    return None if run.exists() else recipes().get(str(run))


def config_of(run: Path) -> Path:
    """The config.yaml of a run folder, or of the recipe of that name where there is no such folder.

    Raises:
        FileError: there is neither.
    """
    path = run / "config.yaml"
    if path.exists():
        return path
    if found := recipe_of(run):
        return found
    known = ", ".join(sorted(str(found.parent) for found in Path("runs").glob("*/config.yaml"))) or "none in runs/"
    raise FileError(
        f"there is no {path}; give a folder with a config.yaml (here: {known}), or the name of a recipe"
        f"{did_you_mean(str(run), recipes()) or f' ({some(recipes())})'}"
    )
