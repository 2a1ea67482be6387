"""All settings of a run that is to be timed: its config.yaml, and the options of the study laid over it."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from ppl_bnn.experiment.command import command_parser, parse_run
from ppl_bnn.experiment.config import Config


def run_settings(run: str, options: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a run folder with these options of `ppl_bnn.run` over them, as JSON holds them.

    Raises:
        UserError, ArgumentError: a folder without settings, or settings that cannot be read.
    """
    _, config = parse_run(_parser, [run, *options])
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return settings


def _parser() -> ArgumentParser:
    parser = command_parser("run", None, trust=True)
    parser.add_argument("run", type=str)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Config)
    return parser
