"""Tables of results: side by side where the terminal is wide enough, one row below the other where not."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

__all__ = ["ANY_WIDTH", "print_table"]

Cell = str | Text
ANY_WIDTH = 10_000
"""Wider than any table here [columns]."""


def print_table(
    console: Console, headings: Sequence[str], rows: Sequence[Sequence[Cell]], *, numbers: Sequence[int] = ()
) -> None:
    """Print rows below their headings, or, where that has no room, each row as lines of heading and value.

    Args:
        console: Where to.
        headings: Of the columns; a line break is one in a table alone.
        rows: Values; an empty one is left out of a row that stands alone.
        numbers: Columns that are aligned to the right.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", collapse_padding=True)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index in numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    unbounded = console.options.update(max_width=ANY_WIDTH)
    if Measurement.get(console, unbounded, table).maximum <= console.width:
        console.print(table)
        return
    for index, row in enumerate(rows):
        if index:
            console.print()
        console.print(_alone(headings, row))


def _alone(headings: Sequence[str], row: Sequence[Cell]) -> Table:
    lines = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column(overflow="fold")
    for heading, value in zip(headings, row, strict=True):
        if value:
            lines.add_row(heading.replace("\n", " "), value)
    return lines
