"""Progress bars for notebooks and terminals, on standard error, and only where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def track(items: Iterable[T], text: str | None) -> Iterable[T]:
    """Iterate with a progress bar called `text`; without one where `text` is None or nobody watches."""
    if text is None:
        return items
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(items, desc=text, disable=not watched, leave=False)
