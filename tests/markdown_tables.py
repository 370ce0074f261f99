"""Markdown's tables and figures, for tests that compare them with what was measured."""

import re
from typing import NamedTuple


class Table(NamedTuple):
    """One table.

    Attributes:
        before: the text between it and the table or heading before.
        section: the text, and the tables, between it and the heading before.
        columns: their titles.
        rows: by column, without emphasis.
    """

    before: str
    section: str
    columns: list[str]
    rows: list[dict[str, str]]


def tables(text: str) -> list[Table]:
    """All tables of a text, in their order."""
    found: list[Table] = []
    before, section, lines = "", "", []
    for line in [*prose(text).splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|")])
        elif lines:
            columns, _, *rows = lines
            found.append(Table(before, section, columns, [dict(zip(columns, row, strict=True)) for row in rows]))
            before, lines = "", []
        if line.startswith("#"):
            before = section = ""
        before, section = before + line + "\n", section + line + "\n"
    return found


def prose(text: str) -> str:
    """A text without its blocks of code."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def figures(text: str) -> list[str]:
    """Every number with decimals, as it is written, without a sign; versions of three parts are none."""
    return re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", text)


def measured_paragraphs(text: str) -> list[str]:
    """Those that speak of average precision, without tables and values of options."""
    lines = [line for line in re.sub(r"`[^`]*`", "", prose(text)).splitlines() if not line.startswith("|")]
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    return [each for each in paragraphs if re.search(r"\bAP\b|\balone\b", each)]
