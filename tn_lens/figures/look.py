"""Colours, marker styles and names that all figures share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, get_args

from tn_lens.core.errors import BadInput
from tn_lens.core.options import Theme
from tn_lens.core.stored import Stored
from tn_lens.neurons import SITES, SiteName

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
"""Markers of series, which differ not only in colour."""


@dataclass(frozen=True)
class Look:
    """The colours of a theme, checked for common kinds of colour blindness and in greyscale (`tests/test_figures.py`)."""

    paper: str
    ink: str
    soft: str
    """Secondary text."""
    line: str
    """Axes and grids."""
    scale: tuple[tuple[float, str], ...]
    """Colour scale from zero to the largest value."""
    diverging: tuple[tuple[float, str], ...]
    """Colour scale from negative through zero to positive values."""
    sites: Mapping[SiteName, str]
    conditions: Mapping[str, str]
    series: tuple[str, ...]

    def site(self, site: SiteName) -> str:
        """The colour of a site; sites that the theme does not list use a colour of the series."""
        return self.sites.get(site) or self.series[list(SITES).index(site) % len(self.series)]

    def condition(self, name: str, place: int) -> str:
        """The colour of a condition; controls that the theme does not list use the colour of the series at `place`."""
        return self.conditions.get(name) or self.series[place % len(self.series)]

    @property
    def dashed(self) -> dict[str, Any]:
        """The style of lines that mark a reference value."""
        return {"color": self.soft, "dash": "dash", "width": 1.5}

    def hollow(self, size: int, symbol: str = "circle", width: int = 2) -> dict[str, Any]:
        """The style of markers that are drawn on top of bars."""
        return {"size": size, "symbol": symbol, "color": self.paper, "line": {"color": self.ink, "width": width}}


@dataclass(frozen=True)
class Looks(Stored):
    """The content of looks.json."""

    themes: Mapping[str, Look]


LOOKS = Looks.load(Path(__file__).with_name("looks.json")).themes
"""The look of each theme."""


def look_of(theme: Theme) -> Look:
    """The colours of a theme.

    Raises:
        BadInput: there is no such theme.
    """
    if theme not in LOOKS:
        raise BadInput(f"expected theme {' or '.join(map(repr, get_args(Theme)))}, got {theme!r}")
    return LOOKS[theme]


def plain(text: str) -> str:
    """Escape text for plotly, which interprets some HTML and fields in `%{...}` in every label."""
    # plotly would replace a field by data of the trace; with its brace as an entity it stays text
    return escape(" ".join(text.split()), quote=False).replace("%{", "%&#123;")


def name_of(text: str, most: int = 40) -> str:
    """Escape a name, and cut it if it has more than `most` characters."""
    return plain(text if len(text) <= most else text[: most - 1] + "…")


def site_name(site: SiteName) -> str:
    """The name of a site in figures, for example "MLP (hook_post)"."""
    return plain(SITES[site].label)


def short_site_name(site: SiteName) -> str:
    """The name of a site without its hook, unless several sites share it."""
    names = [entry.label.partition(" (")[0] for entry in SITES.values()]
    short = SITES[site].label.partition(" (")[0]
    return plain(short) if names.count(short) == 1 else site_name(site)
