"""The look that all figures share: type, colours, margins, and the same bytes for the same figure."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal, get_args

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tn_lens.core.errors import BadInput
from tn_lens.neurons.neuron import Site

Theme = Literal["light", "dark"]
"""The background that a figure is drawn for."""

FONT = "Inter, Helvetica, Arial, sans-serif"
TEXT_SIZE, TITLE_SIZE, SUBTITLE_SIZE = 14, 18, 14
TITLE_WIDTH, SUBTITLE_WIDTH = 78, 104
"""Characters of a line: what fits into 800 pixels, beside plotly's bar."""
LINE_HEIGHT = 1.3
ROW = 26
"""Height of a row of bars or cells."""
LEGEND_ROW, LEGEND_WIDTH = 20, 760
"""Height of a row of a legend, and how wide it may be."""
BUTTONS = ("zoom", "pan", "select", "lasso", "zoomIn", "zoomOut", "autoScale", "sendChartToCloud")
"""Of plotly's bar that are left out: it would cover the title."""
BAR = 34
"""Room of plotly's bar above a figure in a page: over the cells its icons would not be seen."""
DARK_CELL = 0.24
"""Luminance below which light text is read better than dark."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
"""Of series, so that colour is never the only sign."""
LONGEST_NAME = 40

SITE_NAMES: Mapping[str, str] = {"mlp": "MLP (hook_post)", "attn": "Attention (hook_z)"}


@dataclass(frozen=True)
class Look:
    """The colours of a theme. Checked for the common kinds of colour blindness, and in grey (`tests/test_figures.py`)."""

    paper: str
    ink: str
    soft: str
    """Text that explains."""
    line: str
    """Axes and grids."""
    scale: Sequence[tuple[float, str]]
    """From nothing to much."""
    diverging: Sequence[tuple[float, str]]
    """From against, over nothing, to for."""
    sites: Mapping[Site, str]
    arms: Mapping[str, str]
    series: Sequence[str]


LOOKS: Mapping[Theme, Look] = {
    "light": Look(
        paper="#ffffff",
        ink="#1c2733",
        soft="#56646f",
        line="#dde4ea",
        scale=((0.0, "#f3f6f9"), (0.15, "#d6e4f0"), (0.4, "#8fb8d6"), (0.7, "#2f7fb8"), (1.0, "#08306b")),
        diverging=((0.0, "#8c2d04"), (0.25, "#e08a4f"), (0.5, "#f3f6f9"), (0.75, "#5b9bd0"), (1.0, "#08306b")),
        sites={"mlp": "#0b4f8a", "attn": "#e08a1e"},
        arms={
            "baseline": "#47545f",
            "random": "#cfd8df",
            "random_matched": "#9fb0bd",
            "top_activation": "#74bde0",
            "suppressed": "#c2410c",
        },
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
        arms={
            "baseline": "#d5dde4",
            "random": "#4f5d69",
            "random_matched": "#7f8f9c",
            "top_activation": "#2f7fb8",
            "suppressed": "#ff8a50",
        },
        series=("#4c9be8", "#ffc46b", "#3fcfa8", "#e39ac0", "#a7dbff", "#ff8a50"),
    ),
}


class Figure(go.Figure):
    """A plotly figure whose HTML depends on nothing but the figure: its id is a digest instead of a random number."""

    def to_html(self, *args: Any, **kwargs: Any) -> str:
        """As plotly's, with an id that is the same for the same figure."""
        return super().to_html(*args, **{"div_id": self.digest()} | kwargs)

    def write_html(self, *args: Any, **kwargs: Any) -> None:
        """As plotly's, with an id that is the same for the same figure."""
        super().write_html(*args, **{"div_id": self.digest()} | kwargs)

    def digest(self) -> str:
        """What tells this figure from others."""
        return f"figure-{hashlib.sha256(str(self.to_json()).encode()).hexdigest()[:12]}"

    @property
    def traces(self) -> list[Any]:
        """What is drawn."""
        return list(self.data)

    @property
    def finding(self) -> str:
        """The title on one line, safe to stand in HTML."""
        return self._title.get("text", "").replace("<br>", " ")

    @property
    def remark(self) -> str:
        """The subtitle on one line, safe to stand in HTML."""
        return self._title.get("subtitle", {}).get("text", "").replace("<br>", " ")

    @property
    def _title(self) -> dict[str, Any]:
        return self.to_plotly_json()["layout"].get("title", {})

    def bare(self) -> dict[str, Any]:
        """Data and layout as plain values, for a page that has its own headings: without a title, as wide as its place."""
        held = json.loads(str(self.to_json()))
        layout = held["layout"]
        plot = layout["height"] - layout["margin"]["t"] - layout["margin"]["b"]
        top = BAR
        legend = LEGEND_ROW + 6 if layout["showlegend"] else 0
        layout |= {"title": {}, "height": plot + layout["margin"]["b"] + top + legend}
        layout["margin"] |= {"t": top, "l": 10, "r": 10}
        layout["legend"] |= {"xref": "paper", "yref": "paper", "x": 0, "y": 1 + (top - 6) / plot, "yanchor": "bottom"}
        return {"data": held["data"], "layout": layout}


def look_of(theme: Theme) -> Look:
    """The colours of a theme.

    Raises:
        BadInput: there is no such theme.
    """
    if theme not in LOOKS:
        raise BadInput(f"expected theme {' or '.join(map(repr, get_args(Theme)))}, got {theme!r}")
    return LOOKS[theme]


def plain(text: str) -> str:
    """Text as plotly shows it unchanged: it reads a little HTML in every label, and fields in `%{...}`."""
    return escape(" ".join(text.split()), quote=False).replace("%{", "%&#123;")


def name_of(text: str) -> str:
    """The same for a name, cut where it is long."""
    return plain(text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…")


def tick_step(n: int, most: int = 13) -> int:
    """The distance of ticks on `n` whole numbers, so that there are at most so many."""
    return next(step for step in (1, 2, 4, 5, 8, 10, 20, 50, 100, n) if n <= step * most or step == n)


def panels(heights: Sequence[int], *, gap: int = 64, **options: Any) -> tuple[Figure, int]:
    """Panels above each other, and the height of all in pixels."""
    total = sum(heights) + gap * (len(heights) - 1)
    figure = Figure()
    make_subplots(
        rows=len(heights),
        row_heights=[float(h) for h in heights],
        vertical_spacing=gap / total if len(heights) > 1 else 0,
        figure=figure,
        **options,
    )
    return figure, total


def finish(
    figure: Figure,
    title: str,
    *,
    theme: Theme,
    height: int,
    subtitle: str = "",
    legend: bool = False,
    top: int = 0,
    bottom: int = 58,
    **layout: Any,
) -> Figure:
    """Give a figure its title, margins and colours.

    Args:
        figure: to finish.
        title: what it shows, in words; wrapped.
        theme: of the colours.
        height: of the plot within its margins, in pixels.
        subtitle: what else should be known; wrapped.
        legend: leave room for one above the plot.
        top: more room above the plot.
        bottom: room below it.
        layout: of plotly, on top.
    """
    look = look_of(theme)
    lines = [_wrap(text, width) for text, width in ((title, TITLE_WIDTH), (subtitle, SUBTITLE_WIDTH))]
    n_pixels = sum(
        round(LINE_HEIGHT * size) * len(part) for part, size in zip(lines, (TITLE_SIZE, SUBTITLE_SIZE), strict=True)
    )
    names = [trace.name or "" for trace in figure.traces if trace.showlegend is not False] if legend else []
    in_a_row = max(1, int(LEGEND_WIDTH // (8 * max(map(len, names), default=1) + 48)))
    for_legend = 14 + LEGEND_ROW * -(-len(names) // in_a_row) if names else 0
    above = 22 + n_pixels + 16 + top + for_legend
    legend_at = 22 + n_pixels + 14
    axis = {
        "gridcolor": look.line,
        "linecolor": look.line,
        "zerolinecolor": look.line,
        "automargin": True,
        "title": {"standoff": 12, "font": {"size": TEXT_SIZE}},
        "tickfont": {"size": TEXT_SIZE - 1},
    }
    figure.update_layout(
        template="none",
        title={
            "text": "<br>".join(lines[0]),
            "font": {"size": TITLE_SIZE, "weight": 600, "color": look.ink},
            "subtitle": {"text": "<br>".join(lines[1]), "font": {"size": SUBTITLE_SIZE, "color": look.soft}},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 16, "t": 18 + round(LINE_HEIGHT * TITLE_SIZE / 2) * (len(lines[0]) - 1)},
        },
        font={"family": FONT, "size": TEXT_SIZE, "color": look.ink},
        paper_bgcolor=look.paper,
        plot_bgcolor=look.paper,
        height=above + height + bottom,
        margin={"l": 60, "r": 24, "t": above, "b": bottom},
        showlegend=legend,
        legend={
            "orientation": "h",
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1 - legend_at / (above + height + bottom),
            "yref": "container",
            "yanchor": "top",
            "font": {"size": TEXT_SIZE - 1},
            "itemsizing": "constant",
        },
        modebar={"remove": list(BUTTONS), "bgcolor": "rgba(0,0,0,0)", "color": look.soft, "activecolor": look.ink},
        hoverlabel={"font": {"family": FONT, "size": TEXT_SIZE - 1}, "align": "left"},
        barcornerradius=2,
    )
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
    figure.update_annotations(font={"family": FONT, "size": TEXT_SIZE, "color": look.ink})
    figure.update_layout(**layout)
    return figure


def say_nothing_to_show(figure: Figure, text: str) -> None:
    """A sentence where the plot would be."""
    figure.add_annotation(text=plain(text), x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)


def write_in_cells(figure: Figure, texts: Sequence[Sequence[str]], theme: Theme, *, size: int = TEXT_SIZE) -> None:
    """Write into the cells of the figure's heatmap, light on dark and dark on light: plotly's own choice is hard to read."""
    look, (heatmap,) = look_of(theme), figure.traces
    z = [[float(value) for value in row] for row in heatmap.z]
    low, high = heatmap.zmin or 0.0, heatmap.zmax or max([1e-12, *(value for row in z for value in row)])
    written = [
        (x, y, texts[i][j], _luminance(_between(look.scale, (z[i][j] - low) / (high - low or 1))))
        for i, y in enumerate(heatmap.y)
        for j, x in enumerate(heatmap.x)
    ]
    light, dark = (look.paper, look.ink) if theme == "light" else (look.ink, look.paper)
    figure.add_scatter(
        x=[cell[0] for cell in written],
        y=[cell[1] for cell in written],
        text=[cell[2] for cell in written],
        mode="text",
        textfont={"size": size, "color": [light if cell[3] < DARK_CELL else dark for cell in written]},
        hoverinfo="skip",
        showlegend=False,
    )


def colour_bar(title: str, form: str = ".0%") -> dict[str, Any]:
    """A slim colour bar at the right."""
    return {
        "title": {"text": title, "side": "right", "font": {"size": TEXT_SIZE - 1}},
        "tickformat": form,
        "tickfont": {"size": TEXT_SIZE - 2},
        "thickness": 12,
        "nticks": 5,
        "outlinewidth": 0,
    }


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _between(scale: Sequence[tuple[float, str]], value: float) -> list[float]:
    """The colour of a scale at a value in [0, 1]."""
    stops = [stop for stop, _ in scale]
    return [
        float(np.interp(value, stops, channel)) for channel in zip(*(_rgb(colour) for _, colour in scale), strict=True)
    ]


def _luminance(rgb: Sequence[float]) -> float:
    """Relative luminance, in [0, 1] (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
