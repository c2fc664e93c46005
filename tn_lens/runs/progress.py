"""Progress on standard error: bars in notebooks and terminals, lines in the log of a batch job."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

DELAY = 2.0
"""Seconds after which a bar appears outside a run, so that short computations show none."""


INTERVAL = 30.0
"""Seconds between two lines about one stage where there is neither a notebook nor a terminal."""


def progress_bar(items: Collection[T], text: str | None, *, delay: float = 0.0) -> Iterable[T]:
    """Iterate with a progress bar labelled `text`, or without one if `text` is None.

    Where there is neither a notebook nor a terminal, a stage of a run (`delay` is 0) prints a line now and then instead. The
    environment variable TQDM_DISABLE=1 turns all of this off.
    """
    if text is None:
        return items
    if sys.stderr.isatty() or _in_notebook():
        # tqdm reads TQDM_DISABLE only if `disable` is not given
        return tqdm(items, desc=text, leave=False, delay=delay)
    is_off = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return items if delay or is_off else _in_lines(items, text)


def _in_lines(items: Collection[T], text: str) -> Iterator[T]:
    """Print how many items are done, and the time that the others will take, in the log of a batch job."""
    started = said = time.monotonic()
    for n_done, item in enumerate(items):
        now = time.monotonic()
        if n_done and now - said >= INTERVAL:
            left = tqdm.format_interval((now - started) / n_done * (len(items) - n_done))
            print(f"{text}: {n_done} of {len(items)}, {left} left", file=sys.stderr, flush=True)
            said = now
        yield item


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
