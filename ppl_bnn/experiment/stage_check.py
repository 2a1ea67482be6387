"""A run's stages: their names, and the check that needs its data and network, before any work."""

from collections.abc import Collection, Mapping

from ppl_bnn.errors import UserError
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.experiment.shift_kinds import check_shift
from ppl_bnn.pruning.masks import check_patterns

STAGES = ("summary", "train", "diagnose", "predict", "shift", "prune", "report")
# Names of before, which are still accepted.
_ALIASES = {"posterior": "diagnose"}


def stage_names(text: str) -> list[str]:
    """The stages in a comma-separated list. Raises UserError for one that is not in `STAGES`."""
    names = [_ALIASES.get(name.strip(), name.strip()) for name in text.split(",")]
    for name in names:
        if name not in STAGES:
            raise UserError(f"unknown stage {name!r}; the stages are {', '.join(STAGES)}")
    return names


def check_stages(run: Experiment, names: Collection[str]) -> None:
    """Raise UserError for the first setting that does not fit the data or the layers of the stages `names`."""
    if "shift" in names:
        check_shift(run)
    if "prune" in names:
        count = len(run.test_data)
        if outside := [image for image in run.config.pruning.keep_images or [] if image >= count]:
            raise UserError(
                f"pruning.keep_images must be numbers of test {run.examples}, from 0 to {count - 1}; got {outside[0]}"
            )
    if "prune" in names and run.guide.sites:
        for threshold in run.config.pruning.thresholds():
            if isinstance(threshold, Mapping):
                check_patterns(threshold, run.guide.sites)
