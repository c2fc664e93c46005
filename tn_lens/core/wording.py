"""What sentences share."""

from __future__ import annotations


def plural(noun: str, n: int) -> str:
    """The noun as it stands behind a number."""
    return noun if n == 1 else f"{noun}s"
