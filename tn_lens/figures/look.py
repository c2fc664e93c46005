"""Colours, marker styles and names that all figures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, get_args

from tn_lens.core.errors import BadInput
from tn_lens.core.options import Condition, Theme
from tn_lens.neurons import SITES, SiteName

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
"""Markers of series, so that colour is never the only difference."""
CONDITIONS = get_args(Condition)


@dataclass(frozen=True)
class Look:
    """The colours of a theme, checked for common kinds of colour blindness and in greyscale (`tests/test_figures.py`)."""

    paper: str
    ink: str
    soft: str
    """Secondary text."""
    line: str
    """Axes and grids."""
    scale: Sequence[tuple[float, str]]
    """Colour scale from zero to the largest value."""
    diverging: Sequence[tuple[float, str]]
    """Colour scale from negative through zero to positive values."""
    sites: Mapping[SiteName, str]
    conditions: Mapping[str, str]
    series: Sequence[str]

    def site(self, site: SiteName) -> str:
        """The colour of a site; a colour of the series for sites without a colour here."""
        return self.sites.get(site) or self.series[list(SITES).index(site) % len(self.series)]

    def condition(self, name: str, place: int) -> str:
        """The colour of a condition; the series' colour at a place for controls without a colour here."""
        return self.conditions.get(name) or self.series[place % len(self.series)]

    @property
    def dashed(self) -> dict[str, Any]:
        """The style of lines that mark a reference value."""
        return {"color": self.soft, "dash": "dash", "width": 1.5}

    def hollow(self, size: int, symbol: str = "circle", width: int = 2) -> dict[str, Any]:
        """The style of markers that are drawn on top of bars."""
        return {"size": size, "symbol": symbol, "color": self.paper, "line": {"color": self.ink, "width": width}}


LOOKS: Mapping[Theme, Look] = {
    "light": Look(
        paper="#ffffff",
        ink="#1c2733",
        soft="#56646f",
        line="#dde4ea",
        scale=((0.0, "#f3f6f9"), (0.15, "#d6e4f0"), (0.4, "#8fb8d6"), (0.7, "#2f7fb8"), (1.0, "#08306b")),
        diverging=((0.0, "#8c2d04"), (0.25, "#e08a4f"), (0.5, "#f3f6f9"), (0.75, "#5b9bd0"), (1.0, "#08306b")),
        sites={"mlp": "#0b4f8a", "attn": "#e08a1e"},
        conditions=dict(zip(CONDITIONS, ("#47545f", "#cfd8df", "#9fb0bd", "#74bde0", "#c2410c"), strict=True)),
        series=("#0b4f8a", "#e08a1e", "#00896b", "#b65a8a", "#56b4e9", "#8c2d04"),
    ),
    "dark": Look(
        paper="#14191f",
        ink="#e6edf3",
        soft="#9fb0bf",
        line="#33404c",
        scale=((0.0, "#1c242c"), (0.15, "#173a5a"), (0.4, "#1f6aa5"), (0.7, "#6db4e8"), (1.0, "#e8f4ff")),
        diverging=((0.0, "#ffd9b8"), (0.25, "#d9733a"), (0.5, "#1c242c"), (0.75, "#2f86c9"), (1.0, "#d6ecff")),
        sites={"mlp": "#4c9be8", "attn": "#ffc46b"},
        conditions=dict(zip(CONDITIONS, ("#d5dde4", "#4f5d69", "#7f8f9c", "#2f7fb8", "#ff8a50"), strict=True)),
        series=("#4c9be8", "#ffc46b", "#3fcfa8", "#e39ac0", "#a7dbff", "#ff8a50"),
    ),
}


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
    # a field would be replaced by data of the trace; its brace as an entity is text
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
