"""Figures: a result in, a plotly Figure out. Nothing is shown and no file is written here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .errors import BadInput
from .neurons import SITES, NeuronSet, Site
from .selection import Selection

FONT = "Inter, Helvetica, Arial, sans-serif"
SCALE = [[0.0, "#f7f9fb"], [0.15, "#dbe7f1"], [0.4, "#8fb8d6"], [0.7, "#2f7fb8"], [1.0, "#08306b"]]
"""White to dark blue: even in grey print, and the same for every kind of colour vision."""
SITE_NAMES: Mapping[Site, str] = {"mlp": "MLP (hook_post)", "attn": "Attention (hook_z)"}


def plot_layers(found: Selection | NeuronSet, n_layers: int | None = None, *, title: str | None = None) -> go.Figure:
    """Where the truth neurons sit: the fraction of all found neurons in each layer, per site (paper figure 5).

    Args:
        found: a selection, or a set of neurons.
        n_layers: of the model; a selection knows it.
        title: of the figure; by default it says how many neurons were found.

    Returns:
        A heatmap, sites by layers, whose cells sum to 1; hovering shows counts.

    Raises:
        BadInput: the number of layers is needed and missing, or too small.
    """
    neurons = found.neurons if isinstance(found, Selection) else found
    n_layers = found.space.n_layers if isinstance(found, Selection) else n_layers
    if n_layers is None or any(n.layer >= n_layers for n in neurons):
        raise BadInput(f"plot_layers needs n_layers, more than every neuron's layer; got {n_layers}")
    counts = neurons.by_layer(n_layers)
    total = max(len(neurons), 1)
    fractions = [[n / total for n in counts[site]] for site in SITES]
    figure = go.Figure(
        go.Heatmap(
            z=fractions,
            x=list(range(n_layers)),
            y=[SITE_NAMES[site] for site in SITES],
            customdata=[counts[site] for site in SITES],
            colorscale=SCALE,
            zmin=0,
            zmax=max(max(map(max, fractions)), 1e-9),
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": "fraction", "side": "right"}, "tickformat": ".0%", "thickness": 12},
            hovertemplate="%{y}, layer %{x}<br>%{customdata} neurons, %{z:.1%} of those found<extra></extra>",
        )
    )
    if n_layers <= 12 and len(neurons):
        shown = [[str(n) if n else "" for n in counts[site]] for site in SITES]
        figure.update_traces(text=shown, texttemplate="%{text}", textfont={"size": 13})
    return _finish(
        figure,
        title or f"{len(neurons)} truth neurons over {n_layers} layers",
        height=270,
        margin={"l": 150, "r": 30, "t": 60, "b": 55},
        xaxis={"title": {"text": "layer"}, "tickmode": "linear", "dtick": max(1, n_layers // 16), "showgrid": False},
        yaxis={"autorange": "reversed", "showgrid": False},
    )


def plot_sweep(frame: pd.DataFrame, *, title: str = "Neurons found, by thresholds") -> go.Figure:
    """How many neurons each pair of thresholds finds (see `sweep`).

    Args:
        frame: columns t, p, n_candidates, n_found.
        title: of the figure.

    Returns:
        A heatmap, t by p, with the count in every cell.

    Raises:
        BadInput: a column is missing.
    """
    if missing := {"t", "p", "n_candidates", "n_found"} - set(frame.columns):
        raise BadInput(f"plot_sweep needs what sweep(...) returns; the column {sorted(missing)[0]!r} is missing")
    found, candidates = (frame.pivot(index="t", columns="p", values=name) for name in ("n_found", "n_candidates"))
    figure = go.Figure(
        go.Heatmap(
            z=np.log10(1 + found.to_numpy()),
            x=[f"{p:.0%}" for p in found.columns],
            y=[f"{t:.0%}" for t in found.index],
            text=found.to_numpy(),
            texttemplate="%{text}",
            customdata=candidates.to_numpy(),
            colorscale=SCALE,
            showscale=False,
            xgap=2,
            ygap=2,
            hovertemplate="t = %{y}, p = %{x}<br>%{text} found of %{customdata} candidates<extra></extra>",
        )
    )
    return _finish(
        figure,
        title,
        height=90 + 38 * len(found.index) + 60,
        margin={"l": 80, "r": 30, "t": 60, "b": 55},
        xaxis={"title": {"text": "share threshold p"}, "type": "category", "showgrid": False},
        yaxis={"title": {"text": "adaptive threshold t"}, "type": "category", "showgrid": False},
    )


def _finish(figure: go.Figure, title: str, **layout: Any) -> go.Figure:
    """The look that all figures share."""
    figure.update_layout(
        title={"text": title, "x": 0, "xanchor": "left", "xref": "paper"},
        font={"family": FONT, "size": 14, "color": "#1c2733"},
        template="plotly_white",
        **layout,
    )
    return figure
