"""Write any text as Markdown: escape names, and lay out tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_ROWS = 20  # of a table; it says how many more there are

_LONGEST = 400  # characters of a name or message

# Characters that may mean something to Markdown. An underscore within a word and a colon before a
# space never do: they stay as they are, so that a card can be read and edited.
_SPECIAL = re.compile(r"[^\w\s./,;=()'\"+?%:-]|(?<![^\W_])_|_(?![^\W_])|:(?! )")

ACTIONS = {"quantize": "4-bit", "cast": "kept, cast", "copy": "kept", "drop": "left out"}
"""Action of a manifest -> what a card calls it."""


def escape(text: object) -> str:
    """Return any text as one line that Markdown shows as it is, also in a cell of a table."""
    line = " ".join(str(text).split())
    if len(line) > _LONGEST:
        line = line[: _LONGEST - 1] + "…"
    # A character that cannot be printed could also turn the text right to left.
    visible = "".join(c if c.isprintable() else "\ufffd" for c in line)
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", visible)


def table(headings: Iterable[str], rows: Sequence[tuple[str, ...]], align: str) -> list[str]:
    """Return the lines of a table and an empty line behind it; [] where there are no rows.

    Args:
        align: "l" or "r" for each column.
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
