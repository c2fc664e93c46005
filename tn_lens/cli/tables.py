"""The console and its tables; importing them loads neither torch nor pandas."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

WIDTH = 120
"""Width of output that goes to a file or a pipe."""


def open_console() -> Console:
    """A console that prints text literally: names of models and questions may contain rich's markup."""
    width = None if sys.stdout.isatty() else WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def table_of(columns: Sequence[object], rows: Sequence[Sequence[object]], title: str | None = None) -> Table:
    """A table of values, numbers with three digits."""
    table = Table(*map(str, columns), title=title, title_justify="left")
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(*map(_cell, row))
    return table


def _cell(value: object) -> str:
    if str(value) in ("<NA>", "nan", "None"):
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
