"""A spinner while packages and models load; importing it loads neither torch nor transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def spinner(text: str) -> Iterator[None]:
    """Show a spinner and a text on standard error while the block runs: only in a terminal, and by one of several workers."""
    from rich.console import Console
    from rich.markup import escape

    if os.environ.get("RANK", "0") != "0":
        yield
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(escape(text)):
        yield
