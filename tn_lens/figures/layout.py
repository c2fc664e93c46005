"""The layout that all figures share: titles, margins, axes and panels, and equal HTML for equal figures."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from tn_lens.core.options import Theme
from tn_lens.figures.look import look_of, plain

FONT = "Inter, Helvetica, Arial, sans-serif"
TEXT_SIZE, TITLE_SIZE, SUBTITLE_SIZE = 14, 18, 14
TITLE_WIDTH, SUBTITLE_WIDTH = 78, 104
"""Maximum number of characters in a line that fits into 800 pixels, next to plotly's mode bar."""
LINE_HEIGHT = 1.3
ROW = 26
"""Height of a row of bars or cells."""
LEGEND_ROW, LEGEND_WIDTH = 20, 760
"""Height of a row of a legend, and the maximum width of a legend."""
BUTTONS = ("zoom", "pan", "select", "lasso", "zoomIn", "zoomOut", "autoScale", "sendChartToCloud")
"""Buttons that are removed from plotly's mode bar, which would otherwise cover the title."""
BAR = 34
"""Room for plotly's mode bar above a figure in a page, since its icons would be hard to see on top of cells."""
DARK_CELL = 0.24
"""Luminance below which light text is easier to read than dark text."""
QUIET = {"showgrid": False, "zeroline": False}
"""Options of an axis without any lines."""
TOP_LEFT = {"x": 0, "xref": "container", "xanchor": "left", "yref": "container", "yanchor": "top"}


class Figure(go.Figure):
    """A plotly figure whose HTML depends only on its content: its id is a digest instead of a random number."""

    def to_html(self, *args: Any, **kwargs: Any) -> str:
        """Plotly's `to_html` with an id that is equal for equal figures."""
        return super().to_html(*args, **{"div_id": self.digest()} | kwargs)

    def write_html(self, *args: Any, **kwargs: Any) -> None:
        """Plotly's `write_html` with an id that is equal for equal figures."""
        super().write_html(*args, **{"div_id": self.digest()} | kwargs)

    def digest(self) -> str:
        """An id that differs between different figures."""
        return f"figure-{hashlib.sha256(str(self.to_json()).encode()).hexdigest()[:12]}"

    @property
    def traces(self) -> list[Any]:
        """The traces, as a list."""
        return list(self.data)

    @property
    def finding(self) -> str:
        """The title on one line, safe to use in HTML."""
        return self._title.get("text", "").replace("<br>", " ")

    @property
    def remark(self) -> str:
        """The subtitle on one line, safe to use in HTML."""
        return self._title.get("subtitle", {}).get("text", "").replace("<br>", " ")

    @property
    def _title(self) -> dict[str, Any]:
        return self.to_plotly_json()["layout"].get("title", {})

    def share_axis(self, axis: dict[str, Any], n_panels: int) -> None:
        """Give all panels the same horizontal axis, whose title is below the lowest panel only."""
        title = axis.pop("title")
        self.update_xaxes(axis, **QUIET)
        self.update_xaxes(title=title, row=n_panels, col=1)

    def add_text(self, *, color: Any, size: int = TEXT_SIZE, **options: Any) -> None:
        """Add text that is neither in the legend nor shown on hovering."""
        self.add_scatter(
            mode="text", textfont={"size": size, "color": color}, hoverinfo="skip", showlegend=False, **options
        )

    def add_points(self, **options: Any) -> None:
        """Add markers without lines between them."""
        self.add_scatter(mode="markers", **options)

    def add_cells(self, n_layers: int = 0, /, **options: Any) -> None:
        """Add a heatmap with gaps between its cells, which are smaller if there are many layers."""
        self.add_heatmap(xgap=2 if n_layers <= 32 else 1, ygap=2, **options)

    def bare(self) -> dict[str, Any]:
        """Data and layout as plain values without a title, for a page that has its own headings."""
        content = json.loads(str(self.to_json()))
        layout = content["layout"]
        # the plot keeps its size: only the margins change
        plot = layout["height"] - layout["margin"]["t"] - layout["margin"]["b"]
        legend = LEGEND_ROW + 6 if layout["showlegend"] else 0
        layout |= {"title": {}, "height": plot + layout["margin"]["b"] + BAR + legend}
        layout["margin"] |= {"t": BAR, "l": 10, "r": 10}
        layout["legend"] |= {"xref": "paper", "yref": "paper", "x": 0, "y": 1 + (BAR - 6) / plot, "yanchor": "bottom"}
        return {"data": content["data"], "layout": layout}


def tick_step(n: int, most: int = 13) -> int:
    """The distance of ticks on `n` integers that gives at most `most` ticks."""
    return next(step for step in (1, 2, 4, 5, 8, 10, 20, 50, 100, n) if n <= step * most or step == n)


def layer_axis(n_layers: int) -> dict[str, Any]:
    """Options of an axis of layers."""
    return {"title": {"text": "layer"}, "tickmode": "linear", "tick0": 0, "dtick": tick_step(n_layers)}


def panels(heights: Sequence[int], *, gap: int = 64, **options: Any) -> tuple[Figure, int]:
    """Panels above each other, and their total height in pixels."""
    total = sum(heights) + gap * (len(heights) - 1)
    figure = Figure()
    spacing = gap / total if len(heights) > 1 else 0
    make_subplots(
        len(heights), row_heights=list(map(float, heights)), vertical_spacing=spacing, figure=figure, **options
    )
    figure.update_annotations(x=0, xanchor="left")  # the titles of the panels
    return figure, total


def finish(
    figure: Figure,
    sentences: Sequence[str],
    title: str | None,
    theme: Theme,
    *,
    height: int,
    legend: bool = False,
    top: int = 0,
    bottom: int = 58,
) -> Figure:
    """Give a figure its title, margins and colours.

    Args:
        figure: the figure to finish.
        sentences: the default title, then the sentences of the subtitle.
        title: replaces the default title.
        theme: "light" or "dark".
        height: height of the plot within its margins, in pixels.
        legend: leave room for a legend above the plot.
        top: additional room above the plot.
        bottom: room below the plot.
    """
    look = look_of(theme)
    title_lines = _wrap(title or sentences[0], TITLE_WIDTH)
    subtitle_lines = _wrap(" ".join(sentences[1:]), SUBTITLE_WIDTH)
    # plotly does not make room for titles and legends, so their heights are computed here
    below_title = 22 + round(LINE_HEIGHT * TITLE_SIZE) * len(title_lines)
    below_title += round(LINE_HEIGHT * SUBTITLE_SIZE) * len(subtitle_lines)
    above = below_title + 16 + top + (_legend_height(figure) if legend else 0)
    total = above + height + bottom
    figure.update_layout(
        template="none",
        title={
            "text": "<br>".join(title_lines),
            "font": {"size": TITLE_SIZE, "weight": 600, "color": look.ink},
            "subtitle": {"text": "<br>".join(subtitle_lines), "font": {"size": SUBTITLE_SIZE, "color": look.soft}},
            **TOP_LEFT,
            "y": 1,
            # plotly places the first line by the middle of all lines
            "pad": {"l": 16, "t": 18 + round(LINE_HEIGHT * TITLE_SIZE / 2) * (len(title_lines) - 1)},
        },
        font={"family": FONT, "size": TEXT_SIZE, "color": look.ink},
        paper_bgcolor=look.paper,
        plot_bgcolor=look.paper,
        height=total,
        margin={"l": 60, "r": 24, "t": above, "b": bottom},
        showlegend=legend,
        legend={
            "orientation": "h",
            **TOP_LEFT,
            "y": 1 - (below_title + 14) / total,
            "font": {"size": TEXT_SIZE - 1},
            "itemsizing": "constant",
        },
        modebar={"remove": list(BUTTONS), "bgcolor": "rgba(0,0,0,0)", "color": look.soft, "activecolor": look.ink},
        hoverlabel={"font": {"family": FONT, "size": TEXT_SIZE - 1}, "align": "left"},
        barcornerradius=2,
    )
    axis = {
        **dict.fromkeys(("gridcolor", "linecolor", "zerolinecolor"), look.line),
        "automargin": True,
        "title": {"standoff": 12, "font": {"size": TEXT_SIZE}},
        "tickfont": {"size": TEXT_SIZE - 1},
    }
    # figures with several panels have several axes of each kind, and all get the same style
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
    figure.update_annotations(font={"family": FONT, "size": TEXT_SIZE, "color": look.ink})
    return figure


def _legend_height(figure: Figure) -> int:
    """Room for the legend, with an estimate of how many names fit into a row."""
    # about 8 pixels for a character and 48 for a marker
    names = [trace.name or "" for trace in figure.traces if trace.showlegend is not False]
    in_a_row = max(1, int(LEGEND_WIDTH // (8 * max(map(len, names), default=1) + 48)))
    return 14 + LEGEND_ROW * -(-len(names) // in_a_row) if names else 0


def say_nothing_to_show(figure: Figure, text: str) -> None:
    """Put a sentence in place of the plot."""
    figure.add_annotation(text=plain(text), x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)


def write_in_cells(figure: Figure, texts: Sequence[Sequence[str]], theme: Theme) -> None:
    """Write text into the cells of a figure's heatmap, light on dark cells and dark on light ones for legibility."""
    look, (heatmap,) = look_of(theme), figure.traces  # fails if there is any other trace
    z = np.array(heatmap.z, dtype=np.float64)  # [row, column]
    low, high = heatmap.zmin or 0.0, heatmap.zmax or max(1e-12, float(z.max(initial=0)))
    light, dark = (look.paper, look.ink) if theme == "light" else (look.ink, look.paper)
    # [row * column]: the background behind each text
    luminance = _luminance(look.scale, ((z - low) / (high - low or 1)).ravel()).tolist()
    figure.add_text(
        x=[x for _ in heatmap.y for x in heatmap.x],
        y=[y for y in heatmap.y for _ in heatmap.x],
        text=[text for row in texts for text in row],
        color=[light if value < DARK_CELL else dark for value in luminance],
    )


def colour_bar(title: str, form: str = ".0%") -> dict[str, Any]:
    """Options of a narrow colour bar."""
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


def _luminance(scale: Sequence[tuple[float, str]], values: Float[np.ndarray, " cell"]) -> Float[np.ndarray, " cell"]:
    """Relative luminance in [0, 1] (WCAG 2) of the colours of a scale at values in [0, 1]."""
    # the scale is linear between its stops, as plotly draws it
    stops = [stop for stop, _ in scale]
    colours = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for _, colour in scale])  # [stop, 3]
    rgb = np.stack([np.interp(values, stops, channel) for channel in colours.T]) / 255  # [3, cell]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.array([0.2126, 0.7152, 0.0722]) @ linear
