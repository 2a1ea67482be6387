"""All settings of a run that is to be timed: its config.yaml, and the options of the study laid over it."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ppl_bnn.experiment.command import parse_run, settings_parser


def run_settings(run: str, options: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a run folder with these options of `ppl_bnn.run` over them, as JSON holds them.

    Raises:
        UserError, ArgumentError: a folder without settings, or settings that cannot be read.
    """
    _, config = parse_run(settings_parser, [run, *options])
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return settings
