"""Tables on standard output: no figure is cut off, however narrow the terminal is."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_UNBOUNDED = 10_000  # characters of a line that goes to a file or to another program
_GAP = 3  # between two columns
_EDGES = 1  # left and right of a table, beyond half a gap each


def output() -> Console:
    """Standard output: as wide as the terminal, or as COLUMNS says; elsewhere lines are as long as they are."""
    return Console() if sys.stdout.isatty() or os.environ.get("COLUMNS") else Console(width=_UNBOUNDED)


def print_table(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[str] = ()
) -> None:
    """The first column names the rows; it is aligned left, as those whose heading is in ``left`` are.

    Columns that do not fit beside the others follow below, with the names again.
    """
    console = output()
    columns = [[_heading(h, [row[n] for row in rows]), *(row[n] for row in rows)] for n, h in enumerate(headings)]
    console.print(title, style="italic", highlight=False, soft_wrap=True)
    for part, width in _parts(columns, console.width):
        table = Table(box=SIMPLE_HEAD)
        for number in part:
            is_left = number == 0 or headings[number] in left
            table.add_column(columns[number][0], justify="left" if is_left else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[number] for number in part))
        console.width = max(width, console.width)
        console.print(table)


def _heading(heading: str, cells: Sequence[str]) -> str:
    """Over as many lines as make it no wider than it must be."""
    return textwrap.fill(heading, max([1, *map(len, [*heading.split(), *cells])]))


def _parts(columns: Sequence[Sequence[str]], width: int) -> Iterator[tuple[list[int], int]]:
    """The columns of each table by number, the first and one other at least; and how wide it is."""
    widths = [max(len(line) for text in column for line in text.split("\n")) + _GAP for column in columns]
    part, used = [0], _EDGES + widths[0]
    for number in range(1, len(columns)):
        if len(part) > 1 and used + widths[number] > width:
            yield part, used
            part, used = [0], _EDGES + widths[0]
        part.append(number)
        used += widths[number]
    yield part, used
