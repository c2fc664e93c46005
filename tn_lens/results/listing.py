"""What `tn-lens show` prints, in a form that is read without the packages that the results need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tn_lens.core.stored import Stored

LISTING = "listing.json"
COLUMNS = ("mean_difference", "ci_low", "ci_high", "cohens_d", "p_adjusted", "share", "case", "verdict")
"""Columns of the table, after the neuron's name."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Listing(Stored):
    """The found neurons and the cards of a run as text."""

    title: str
    rows: tuple[Mapping[str, Any], ...]
    """The name and the `COLUMNS` of each neuron, strongest first."""
    cards: Mapping[str, str]
    """The text of each card by the neuron's name, strongest first."""
    digests: Mapping[str, str]
    """SHA-256 of the files of the run that the listing summarises."""


def read_listing(folder: Path) -> Listing | None:
    """The listing of a finished run; None if there is none, or if a file that it summarises is missing or was altered.

    Raises:
        BadInput: the listing is damaged.
    """
    if not (folder / LISTING).is_file():
        return None
    listing = Listing.load(folder / LISTING)
    files = {folder / name: digest for name, digest in listing.digests.items()}
    is_current = all(file.is_file() and digest_of(file.read_bytes()) == digest for file, digest in files.items())
    return listing if is_current else None


def digest_of(content: bytes) -> str:
    """SHA-256 of the content of a file."""
    return sha256(content).hexdigest()
