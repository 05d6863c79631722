"""Print tables of plain text, at most as wide as the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ...checkpoint.untrusted import printable
from ...units import plural

if TYPE_CHECKING:
    from rich.console import Console

Row = tuple[str, ...]


def print_rows(console: Console, rows: list[Row]) -> None:
    """Print a table; the second column gets the width that the others leave, and is cut to it.

    Args:
        rows: of equal length, the headings first.
    """
    from rich.cells import cell_len, set_cell_size

    columns = len(rows[0])
    rows = [tuple(printable(cell) for cell in row) for row in rows]
    widths = [max(cell_len(row[i]) for row in rows) for i in range(columns)]
    others = sum(widths) - widths[1] + 2 * (columns - 1)
    widths[1] = min(widths[1], max(8, console.width - others))
    for number, row in enumerate(rows):
        cells = [
            set_cell_size(row[0], widths[0]),
            set_cell_size(_cut(row[1], widths[1]), widths[1]),
        ]
        cells += [cell.rjust(widths[i + 2]) for i, cell in enumerate(row[2:])]
        style = "dim" if not number else "bold" if row[0] == "4-bit" else None
        console.print("  ".join(cells), style=style, markup=False, no_wrap=True)


def _cut(text: str, cells: int) -> str:
    """Return a text that takes at most `cells` columns, with "..." where it is cut."""
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= cells else set_cell_size(text, max(0, cells - 3)) + "..."


def print_names(console: Console, heading: str, names: Iterable[str]) -> None:
    """Print names of files in a line; on a terminal as many as fit, and how many more there are."""
    names = [printable(name) for name in names]
    room = console.width - len(heading) - 1 if console.is_terminal else None
    shown = len(names)
    line = ", ".join(names)
    while room is not None and shown > 1 and len(line) > room:
        shown -= 1
        line = f"{', '.join(names[:shown])}, and {plural(len(names) - shown, 'file')} more"
    console.print(f"{heading}{line}", markup=False, soft_wrap=True)
