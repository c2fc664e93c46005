"""Progress bars on standard error, shown only in notebooks and terminals."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

DELAY = 2.0
"""Seconds after which a bar appears outside a run, so that short computations show none."""


def progress_bar(items: Iterable[T] | None, text: str | None, *, total: int | None = None, delay: float = 0.0) -> Any:
    """A progress bar labelled `text`, over items or advanced with `update(n)`. It is disabled if `text` is None.

    The environment variable TQDM_DISABLE=1 turns all bars off.
    """
    watched = sys.stderr.isatty() or _in_notebook()
    # tqdm reads TQDM_DISABLE only if `disable` is not given
    silent: Any = {} if watched and text is not None else {"disable": True}
    return tqdm(items, desc=text, total=total, leave=False, delay=delay, **silent)


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
