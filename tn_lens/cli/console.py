"""Data frames as tables of the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 120
"""Where the output is no terminal."""


def open_console() -> Console:
    """A console as wide as the terminal, or as a file should be."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def frame_table(frame: pd.DataFrame, title: str | None = None) -> Table:
    """A data frame as a table of the terminal."""
    table = Table(title=title, title_justify="left")
    for column in frame.columns:
        table.add_column(str(column), justify="right")
    for row in frame.itertuples(index=False):
        table.add_row(
            *(
                "-" if str(value) in ("<NA>", "nan") else f"{value:.3g}" if isinstance(value, float) else str(value)
                for value in row
            )
        )
    return table
