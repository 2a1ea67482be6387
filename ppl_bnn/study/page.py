"""The study's page, as Markdown and as HTML."""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ppl_bnn.files import write_text


@dataclass(frozen=True)
class Row:
    """One number of the study beside ours.

    Args:
        what: what was measured.
        published: the study's number, or "figure only" where it stands in a picture alone.
        source: the table, figure or section of the study.
        ours: our number, or why there is none.
        command: the number of the section's command that measured ours, from 1; None: no command is needed.
    """

    what: str
    published: str
    source: str
    ours: str
    command: int | None = 1


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first line is its header."""

    caption: str
    lines: Sequence[Sequence[str]]


@dataclass
class Section:
    """One table or figure of the study: its numbers, ours, the commands, and what differs and why."""

    title: str
    rows: list[Row] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[str, Path]] = field(default_factory=list)


_HEADER = ("what", "the study", "where", "ours", "command")


def write_page(sections: Sequence[Section], introduction: Sequence[str], out: Path) -> None:
    """Write ``study.md`` and ``study.html`` into `out`. Figures are named relative to it."""
    write_text(out / "study.md", _markdown(sections, introduction, out))
    write_text(out / "study.html", _html(sections, introduction, out))


def keep_section(name: str, section: Section, out: Path) -> dict[str, Section]:
    """Keep a section in ``sections.json`` beside those of earlier commands, and return them all by name."""
    path = out / "sections.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    kept[name] = asdict(section)
    write_text(path, json.dumps(kept, indent=1, default=str) + "\n")
    return {name: _section(fields) for name, fields in kept.items()}


def _section(fields: dict[str, Any]) -> Section:
    return Section(
        title=fields["title"],
        rows=[Row(**row) for row in fields["rows"]],
        commands=fields["commands"],
        notes=fields["notes"],
        tables=[Table(**table) for table in fields["tables"]],
        figures=[(caption, Path(path)) for caption, path in fields["figures"]],
    )


def _compared(section: Section) -> Table | None:
    lines = [
        (row.what, row.published, row.source, row.ours, "" if row.command is None else f"({row.command})")
        for row in section.rows
    ]
    return Table("", [_HEADER, *lines]) if lines else None


def _tables(section: Section) -> list[Table]:
    compared = _compared(section)
    return [*([compared] if compared else []), *section.tables]


def _markdown(sections: Sequence[Section], introduction: Sequence[str], out: Path) -> str:
    parts = ["# The study, side by side", *introduction]
    for section in sections:
        parts.append(f"## {section.title}")
        for table in _tables(section):
            if table.caption:
                parts.append(f"**{table.caption}**")
            header, *lines = (
                "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table.lines
            )
            parts.append("\n".join([header, "| " + " | ".join("---" for _ in table.lines[0]) + " |", *lines]))
        if section.commands:
            numbered = [f"{command}   # ({number})" for number, command in enumerate(section.commands, 1)]
            parts.append("\n".join(["```", *numbered, "```"]))
        parts += [f"![{caption}]({_relative(path, out)})" for caption, path in section.figures]
        parts.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join(part for part in parts if part) + "\n"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px } caption { text-align: left; font-weight: 600 }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top }
pre { background: #f5f5f5; padding: .6rem; overflow-x: auto; font-size: 12px } img { max-width: 100% }
"""


def _html(sections: Sequence[Section], introduction: Sequence[str], out: Path) -> str:
    escape = html.escape
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>The study, side by side</title><style>{_STYLE}"
        "</style><h1>The study, side by side</h1>",
        *(f"<p>{escape(text)}</p>" for text in introduction),
    ]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        for table in _tables(section):
            header, *lines = table.lines
            cells = "".join(f"<th>{escape(cell)}</th>" for cell in header)
            body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
            caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
            parts.append(f"<table>{caption}<tr>{cells}</tr>{body}</table>")
        if section.commands:
            numbered = (f"{escape(command)}   # ({number})" for number, command in enumerate(section.commands, 1))
            parts.append(f"<pre>{chr(10).join(numbered)}</pre>")
        parts += [
            f"<figure><img src='{escape(_relative(path, out))}' alt='{escape(caption)}'>"
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for caption, path in section.figures
        ]
        if section.notes:
            parts.append("<ul>" + "".join(f"<li>{_bold(escape(note))}</li>" for note in section.notes) + "</ul>")
    return "\n".join(parts) + "\n"


def _bold(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)


def _relative(path: Path, out: Path) -> str:
    return path.relative_to(out).as_posix()
