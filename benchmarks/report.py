"""Formats the tables of the benchmarks, and names the machine."""

import platform
import re
import sys
from pathlib import Path

Table = list[list[str]]


def aligned(table: Table) -> list[str]:
    """Format a table as lines of text. The first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]


def as_markdown(table: Table) -> list[str]:
    """Format a table as lines of markdown, with the same alignment."""
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    return [f"| {' | '.join(row)} |" for row in (table[0], rule, *table[1:])]


def cpu_name() -> str:
    """Return the processor's model, or its architecture if the model is unknown."""
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    named = re.search(r"model name\s*:\s*(.+)", info)
    return named[1] if named else platform.machine()
