"""Runs the study's commands, each in a process of its own, and remembers which are done."""

import json
import logging
import math
import os
import shlex
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppl_bnn.errors import FileError, Interrupted
from ppl_bnn.files import write_text
from ppl_bnn.scaling.launch import PointFailed, launch
from ppl_bnn.study.scales import Scale
from ppl_bnn.version import __version__

MISSING = "not measured"

log = logging.getLogger("ppl_bnn")


@dataclass(frozen=True)
class Options:
    """What the command line of the study says.

    Args:
        runs: folder that holds the ``study-...`` run folders.
        data_dir: folder of the data sets.
        cifar10: archive of CIFAR-10's JPEG images to read, or None to download.
        launcher: how several ranks are started, as in `ppl_bnn.scaling`.
        ranks: numbers of ranks; None: the scale's own.
        cifar_image: number of the image of figure 4.
        cifar_images, digits: numbers of the images of figures 5 and 9; None: the first of each class.
        conv: out folder of a BNN-Conv to use; None: train one.
    """

    runs: Path
    data_dir: str
    cifar10: str | None
    launcher: str
    ranks: list[int] | None
    cifar_image: int | None
    cifar_images: list[int] | None
    digits: list[int] | None
    conv: Path | None


@dataclass(frozen=True)
class Outcome:
    """A command of the study, as a user would type it, and why it failed (None: it is done).

    Args:
        partly: whether a command that failed has right results beside those that are missing.
        found: the number that was read from its results.
    """

    command: str
    reason: str | None = None
    partly: bool = False
    found: float = math.nan

    def or_reason(self, ours: str) -> str:
        """Our number, with the reason where the command failed."""
        return f"{ours} ({self.reason})" if self.reason and (MISSING in ours or not self.partly) else ours


@dataclass
class Work:
    """The study's folder: its commands, their logs and what is done.

    Attributes:
        failures: the commands that failed, by name; they are not tried again until the next start.
    """

    out: Path
    scale: Scale
    options: Options
    failures: dict[str, Outcome] = field(default_factory=dict)
    _record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._record = self._opened()

    @property
    def ranks(self) -> list[int]:
        """The numbers of ranks to train on."""
        return self.options.ranks or list(self.scale.ranks)

    def run_folder(self, name: str) -> str:
        """The run folder of one of the study's networks."""
        return str(self.options.runs / f"study-{name}")

    def folder(self, name: str) -> Path:
        """The out folder of a training or a table of timings."""
        return self.out / name

    def data(self, name: str) -> list[str]:
        """The options that say where the data of a network are."""
        archive = ["--data.file", self.options.cifar10] if self.options.cifar10 and "cifar10" in name else []
        return ["--data.dir", self.options.data_dir, *archive]

    def do(
        self, name: str, module: str, *arguments: str, makes: Sequence[Path], after: Sequence[str] = (),
        of: str = "", read: Callable[[], float] = lambda: math.nan,
    ) -> Outcome:  # fmt: skip
        """Run ``python -m ppl_bnn.<module>``, unless the same command is done already.

        Args:
            name: names the command in the record and in ``logs/``.
            makes: files that are there once it is done.
            of: tells a version of what it reads from the next one.
            after: names of the commands whose results it uses; where one was done again, so is this one.
            read: reads a number from the results right after the command, which a later one may replace.

        Raises:
            Interrupted: the command was stopped.
        """
        words = ["-m", f"ppl_bnn.{module}", *arguments]
        command, done = shlex.join(["python", *words]), self._record["commands"]
        made_of = {
            "command": command,
            "runs": self._checksums(arguments),
            "of": of,
            "after": {before: done.get(before, {}).get("at") for before in after},
        }
        if done.get(name, {}).get("made_of") == made_of and all(path.exists() for path in makes):
            return Outcome(command, found=float(done[name]["found"]))
        if name in self.failures:
            return self.failures[name]
        log.info("study: %s", command)
        path = self.out / "logs" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            launch(words, path, ranks=1, launcher="", environment=os.environ)
        except Interrupted:
            raise Interrupted(f"stopped in {command}") from None
        except PointFailed as error:
            reason = f"error: {error} ({path} has the whole output)"
            log.error("study: %s failed: %s", name, reason)
            self.failures[name] = Outcome(command, reason)
            return self.failures[name]
        found = read()
        done[name] = {"made_of": made_of, "at": time.time(), "found": found}
        write_text(self.out / "study.json", json.dumps(self._record, indent=2) + "\n")
        return Outcome(command, found=found)

    def figures(self, name: str, captions: Mapping[str, str]) -> list[tuple[str, Path]]:
        """The figures of a command's out folder that are there, copied into ``figures/``: caption and path."""
        found = []
        for figure, caption in captions.items():
            path = self.folder(name) / "figures" / f"{figure}.png"
            if path.exists():
                copy = self.out / "figures" / f"{name}-{figure}.png"
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
                found.append((caption, copy))
        return found

    def _checksums(self, arguments: Sequence[str]) -> dict[str, Any]:
        # A run folder whose settings were edited, or another archive, makes another command.
        files = (Path(word) / "config.yaml" for word in arguments if Path(word).parent == self.options.runs)
        found: dict[str, Any] = {str(path): zlib.crc32(path.read_bytes()) for path in files if path.exists()}
        if self.options.cifar10 in arguments:
            stat = Path(str(self.options.cifar10)).stat()
            found["archive"] = [stat.st_size, stat.st_mtime_ns]
        return found

    def _opened(self) -> dict[str, Any]:
        path = self.out / "study.json"
        own = {"ppl_bnn": __version__, "scale": self.scale.name}
        if not path.exists():
            return {**own, "commands": {}}
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            for name, value in own.items():
                if there[name] != value:
                    raise FileError(
                        f"{self.out} holds a study with {name} {there[name]}, this one has {value}; choose another "
                        "folder with --out"
                    )
            return {**own, "commands": dict(there["commands"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"{path} is damaged; delete it, and the same command finds what is finished") from None
