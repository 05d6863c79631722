"""Any text as Markdown: names escaped, tables of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_ROWS = 20

_LONGEST = 400  # characters of a name or message

# What Markdown could take for more than text: an underscore within a word and a colon before a
# space are none of it, and cards full of &#95; are nothing to edit.
_SPECIAL = re.compile(r"[^\w\s./,;=()'\"+?%:-]|(?<![^\W_])_|_(?![^\W_])|:(?! )")

ACTIONS = {"quantize": "4-bit", "cast": "kept, cast", "copy": "kept", "drop": "left out"}


def escape(text: object) -> str:
    """Any text as one line of plain text in a cell of a table."""
    line = " ".join(str(text).split())
    if len(line) > _LONGEST:
        line = line[: _LONGEST - 1] + "…"
    seen = "".join(c if c.isprintable() else "\ufffd" for c in line)  # nor turned right to left
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", seen)


def table(headings: Iterable[str], rows: Sequence[tuple[str, ...]], align: str) -> list[str]:
    """The lines of a table, and an empty one behind it; [] for one without rows.

    Args:
        align: a letter a column, "l" or "r".
    """
    if not rows:
        return []
    marks = {"l": ":--", "r": "--:"}
    lines = [_row(headings), _row(marks[letter] for letter in align)]
    lines += [_row(row) for row in rows[:_ROWS]]
    hidden = len(rows) - _ROWS
    return [*lines, "", *((f"... and {hidden:,} more", "") if hidden > 0 else ())]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
