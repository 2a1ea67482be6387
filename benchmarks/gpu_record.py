"""The results of benchmarks/gpu.py, written as they come: JSON and Markdown files that are always whole."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ppl_bnn.files import write_text
from report import as_markdown


class Record:
    """What the run has measured so far, in ``gpu.json`` and ``gpu.md`` of the folder `out`.

    ``parts`` maps a part's name to its ``title``, ``about``, ``status`` (``running``, ``finished``, ``failed``, or ``no
    time`` if it was not started), ``note``, ``seconds`` and ``cells``. A cell has a ``status`` (``running``,
    ``finished``, ``failed``, ``not here``, ``waiting`` or ``no time``), a ``note`` that says why, ``seconds`` and
    ``rows``.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out = out
        self.content: dict[str, Any] = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "settings": dict(settings),
            "seconds": 0.0,
            "finished": False,
            "parts": {},
        }
        self._starts = {"": time.monotonic()}

    def start_part(self, name: str, title: str, about: str) -> None:
        """Open a part."""
        self._starts[name] = time.monotonic()
        part = {"title": title, "about": about, "status": "running", "note": "", "seconds": None, "cells": {}}
        self.content["parts"][name] = part
        self._write()

    def end_part(self, name: str, status: str, note: str = "") -> None:
        """Close a part. Cells that were not started had no time."""
        for cell in self.cells(name).values():
            if cell["status"] == "waiting":
                cell["status"] = "no time"
        self.content["parts"][name] |= {"status": status, "note": note, "seconds": self._seconds_since(name)}
        self._write()

    def cells(self, part: str) -> dict[str, Any]:
        """Return the cells of a part so far, by name."""
        return self.content["parts"][part]["cells"]  # type: ignore[no-any-return]

    def started(self, part: str) -> list[str]:
        """Return the names of the cells of a part that were started, or left out."""
        return [name for name, cell in self.cells(part).items() if cell["status"] != "waiting"]

    def expect(self, part: str, cells: Iterable[str]) -> None:
        """Name the cells that are to come."""
        for cell in cells:
            self.cells(part)[cell] = {"status": "waiting", "note": "", "seconds": 0.0, "rows": []}

    def start_cell(self, part: str, cell: str) -> None:
        """Open a cell. Nothing is written until it has a row or ends."""
        self._starts[cell] = time.monotonic()
        self.cells(part)[cell] = {"status": "running", "note": "", "seconds": None, "rows": []}

    def add_row(self, part: str, cell: str, row: Mapping[str, Any]) -> None:
        """Add a row to the cell that is running."""
        self.cells(part)[cell]["rows"].append({key: _plain(value) for key, value in row.items()})
        self._write_json()

    def end_cell(self, part: str, cell: str, status: str, note: str) -> None:
        """Close a cell, started or not."""
        seconds = 0.0 if self.cells(part)[cell]["status"] == "waiting" else self._seconds_since(cell)
        self.cells(part)[cell] |= {"status": status, "note": note, "seconds": seconds}
        self._write()

    def finish(self) -> None:
        """Say that the run came to its end."""
        self.content["finished"] = True
        self._write()

    def _seconds_since(self, what: str) -> float:
        return round(time.monotonic() - self._starts[what], 1)

    def _write(self) -> None:
        self._write_json()
        write_text(self.out / "gpu.md", "\n".join(as_text(self.content)) + "\n")

    def _write_json(self) -> None:
        self.content["seconds"] = self._seconds_since("")
        write_text(self.out / "gpu.json", json.dumps(self.content, indent=1, allow_nan=False) + "\n")


def as_text(content: Mapping[str, Any]) -> list[str]:
    """Return a record's content as lines of Markdown: a table a part, and what was not measured and why."""
    state = "finished" if content["finished"] else "not finished"
    lines = ["# GPU check", "", f"Started {content['started']}, {content['seconds']:.0f} s, {state}."]
    for part in content["parts"].values():
        lines += ["", f"## {part['title']}", "", part["about"], ""]
        rows = [row for cell in part["cells"].values() for row in cell["rows"]]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            table = [columns, *([_shown(row.get(column)) for column in columns] for row in rows)]
            lines += [*as_markdown(table), ""]
        if part["status"] not in ("finished", "running"):
            lines.append(f"This part: {part['status']}. {part['note']}".rstrip())
        for name, cell in part["cells"].items():
            if cell["status"] != "finished":
                lines.append(f"- {name}: {cell['status']}{': ' if cell['note'] else ''}{cell['note']}")
    return lines


def _plain(value: Any) -> Any:
    # JSON has neither NaN nor infinity.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")
