"""How a benchmark says what it found and on what machine."""

import platform
import re
import sys
from pathlib import Path

Table = list[list[str]]


def aligned(table: Table) -> list[str]:
    """Lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]


def as_markdown(table: Table) -> list[str]:
    """Lines of markdown, aligned likewise."""
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    return [f"| {' | '.join(row)} |" for row in (table[0], rule, *table[1:])]


def cpu_name() -> str:
    """The processor's model, or its architecture where that is not told."""
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    named = re.search(r"model name\s*:\s*(.+)", info)
    return named[1] if named else platform.machine()
