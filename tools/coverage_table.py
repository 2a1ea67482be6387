"""Write the table of coverage into docs/networks.md, from the rows that tests/models/test_coverage.py tests.

python tools/coverage_table.py
"""

import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "networks.md"
COLUMNS = ("plain", "flipout", "groups", "local", "draws", "prune", "save")
BEGIN, END = "<!-- tools/coverage_table.py writes from here -->\n", "<!-- to here -->"


def table(rows: Iterable[Any]) -> str:
    """The rows as Markdown, a part for each group, and below it the messages of what is refused."""
    parts, messages = [], []
    for group, members in groupby(rows, key=lambda row: row.group):
        parts.append(f"### {group}\n")
        heads = ["network", "random parameters", "own noise", *COLUMNS]
        parts.append(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
        for row in members:
            cells = []
            for column in COLUMNS:
                message = row.refused.get(column)
                if message is not None and message not in messages:
                    messages.append(message)
                cells.append("yes" if message is None else f"no ({messages.index(message) + 1})")
            noise = f"{row.own_noise} of {row.sites}"
            parts.append(f"| {row.name} | {row.parameters:,} | {noise} | {' | '.join(cells)} |")
        parts.append("")
    notes = [f"{number}. `{message} ...`" for number, message in enumerate(messages, 1)]
    return "\n".join([*parts, "What is refused says so before any work:\n", *notes, ""])


def main() -> None:
    """Replace the page's table."""
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    from coverage_networks import ROWS

    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table(ROWS) + "\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
