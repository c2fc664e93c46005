"""Progress bars for notebooks and terminals, on standard error, and only where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def track(items: Iterable[T], text: str | None) -> Iterable[T]:
    """Iterate with a progress bar called `text`; without one where `text` is None or nobody watches."""
    if text is None:
        return items
    return tqdm(items, desc=text, disable=not _watched(), leave=False)


def counter(total: int, text: str | None) -> Any:
    """A progress bar to be advanced by hand, with `update(n)`; None where `text` is."""
    return None if text is None else tqdm(total=total, desc=text, disable=not _watched(), leave=False)


def _watched() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
