"""A spinner while packages and models load; importing it loads neither torch nor transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext


@contextmanager
def spinner(text: str) -> Iterator[None]:
    """Show a spinner and a text on standard error while the block runs: only in a terminal, and by one of several workers."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    # the rank that torchrun sets; `workers` would load torch
    is_shown = console.is_terminal and os.environ.get("RANK", "0") == "0"
    with console.status(escape(text)) if is_shown else nullcontext():
        yield
