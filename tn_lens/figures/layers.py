"""Where the neurons sit: figure 5 of the paper, for one model and for several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from tn_lens.core.errors import BadInput
from tn_lens.core.wording import plural
from tn_lens.figures.look import (
    ROW,
    SITE_NAMES,
    Figure,
    Theme,
    colour_bar,
    finish,
    look_of,
    name_of,
    panels,
    plain,
    tick_step,
    write_in_cells,
)
from tn_lens.neurons.neuron import SITES, NeuronSet, layer_in_words
from tn_lens.selection.select import Selection

Found = Selection | NeuronSet
SitesShown = Literal["apart", "together"]
Across = Literal["layer", "depth"]

TOGETHER = "MLP and attention"
MOST_COUNTS = 12
"""Layers up to which the cells show their counts."""
THIRDS = ("first", "middle", "last")
LEAST_LAYERS = 6
"""Below, a layer is too much of a third to speak of thirds."""


def plot_layers(
    found: Found | Mapping[str, Found],
    n_layers: int | Mapping[str, int] | None = None,
    *,
    sites: SitesShown = "apart",
    across: Across | None = None,
    title: str | None = None,
    theme: Theme = "light",
) -> Figure:
    """Where the truth neurons sit: the fraction of a model's found neurons in each layer (paper figure 5).

    Args:
        found: a selection or a set of neurons, or several by the name of their model.
        n_layers: of the model, or of each by name; a selection knows its own.
        sites: MLP and attention "apart" (a panel each, for one model a row each) or "together".
        across: the columns: each "layer", or relative "depth", where models of different depth can be compared; by default
            depth where the models differ in it.
        title: of the figure; by default it says where most of the neurons are.
        theme: "light" or "dark".

    Returns:
        A heatmap whose cells sum to 1 for every model, both sites together; hovering shows counts.

    Raises:
        BadInput: a number of layers is needed and missing, or too small; no model; an unknown option.
    """
    named = found if isinstance(found, Mapping) else {"": found}
    if not named:
        raise BadInput("plot_layers needs the neurons of a model; got none")
    if sites not in get_args(SitesShown) or across not in (None, *get_args(Across)):
        raise BadInput(
            f"expected sites 'apart' or 'together' and across 'layer' or 'depth'; got {sites!r} and {across!r}"
        )
    depths = {name: _depth(name, one, n_layers) for name, one in named.items()}
    counts = {
        name: (one.neurons if isinstance(one, Selection) else one).by_layer(depths[name]) for name, one in named.items()
    }
    rows = {
        name: {SITE_NAMES[site]: np.array(of[site]) for site in SITES}
        if sites == "apart"
        else {TOGETHER: np.sum([of[site] for site in SITES], axis=0)}
        for name, of in counts.items()
    }
    across = across or ("layer" if len(set(depths.values())) == 1 else "depth")
    title = title or finding({name: np.sum(list(of.values()), axis=0) for name, of in rows.items()})
    if len(named) == 1:
        (of,) = rows.values()
        return _one_model(of, across, title, theme)
    return _several_models(rows, across, title, theme)


def plot_overlap(
    names: Sequence[str],
    overlap: Float[np.ndarray, "model model"],
    *,
    title: str | None = None,
    theme: Theme = "light",
) -> Figure:
    """How alike the models' distributions over relative depth are (see `tn_lens.compare`).

    Args:
        names: of the models.
        overlap: of every pair, in [0, 1].
        title: of the figure; by default it gives the mean over the pairs.
        theme: "light" or "dark".
    """
    look = look_of(theme)
    shown = [name_of(name) for name in names]
    places = list(range(len(names)))
    cells = [[f"{100 * value:.0f}" for value in row] for row in overlap]
    figure = Figure()
    figure.add_heatmap(
        z=overlap,
        x=places,
        y=places,
        customdata=[[f"{a} and {b}" for b in shown] for a in shown],
        text=cells,
        colorscale=look.scale,
        zmin=0,
        zmax=1,
        xgap=2,
        ygap=2,
        showscale=False,
        hovertemplate="%{customdata}<br>%{text} % of the neurons at the same relative depth and site<extra></extra>",
    )
    write_in_cells(figure, cells, theme)
    pairs = overlap[np.triu_indices(len(names), 1)]
    return finish(
        figure,
        title
        or (
            f"Two models share {100 * pairs.mean():.0f} % of their distribution over depth on average"
            if len(pairs)
            else "One model has no other to overlap with"
        ),
        subtitle="Overlap of the fractions of found neurons over relative depth, MLP and attention apart (%); 100: the same.",
        theme=theme,
        height=max(120, 44 * len(names)),
        bottom=70,
        xaxis={"tickvals": places, "ticktext": shown, "showgrid": False, "tickangle": -35},
        yaxis={"tickvals": places, "ticktext": shown, "showgrid": False, "autorange": "reversed"},
    )


def _depth(name: str, found: Found, n_layers: int | Mapping[str, int] | None) -> int:
    if isinstance(found, Selection):
        return found.space.n_layers
    depth = n_layers.get(name) if isinstance(n_layers, Mapping) else n_layers
    if depth is None or any(n.layer >= depth for n in found):
        of = f" of {name!r}" if name else ""
        raise BadInput(f"plot_layers needs n_layers{of}, more than every neuron's layer; got {depth}")
    return depth


def _edges(n_layers: int, across: Across) -> list[float]:
    """The borders of the cells."""
    return [i - 0.5 for i in range(n_layers + 1)] if across == "layer" else [i / n_layers for i in range(n_layers + 1)]


def _axis(n_layers: int, across: Across) -> dict[str, Any]:
    if across == "depth":
        return {
            "title": {"text": "relative depth (0: input, 1: output)"},
            "range": [0, 1],
            "tickformat": ".1f",
            "dtick": 0.2,
        }
    return {
        "title": {"text": "layer"},
        "tickmode": "linear",
        "tick0": 0,
        "dtick": tick_step(n_layers),
        "range": [-0.5, n_layers - 0.5],
    }


def _one_model(of: Mapping[str, np.ndarray], across: Across, title: str, theme: Theme) -> Figure:
    look = look_of(theme)
    counts = np.stack(list(of.values()))
    total, n_layers = max(int(counts.sum()), 1), counts.shape[1]
    fractions = counts / total
    figure = Figure()
    figure.add_heatmap(
        z=fractions,
        x=list(range(n_layers)) if across == "layer" else _edges(n_layers, across),
        y=list(of),
        customdata=np.dstack([counts, np.broadcast_to(np.arange(n_layers), counts.shape), 100 * fractions]),
        colorscale=look.scale,
        zmin=0,
        zmax=max(float(fractions.max()), 1e-9),
        xgap=_gap(n_layers),
        ygap=2,
        text=[[str(n) if n else "" for n in row] for row in counts.tolist()],
        colorbar={**colour_bar("fraction"), "nticks": 2 * len(of) + 1},
        showscale=bool(counts.any()),
        hovertemplate="%{y}, layer %{customdata[1]}<br>%{customdata[0]} neurons, %{customdata[2]:.1f} % of those found<extra></extra>",
    )
    if n_layers <= MOST_COUNTS and across == "layer" and counts.any():
        write_in_cells(figure, [[str(n) if n else "" for n in row] for row in counts.tolist()], theme)
    return finish(
        figure,
        title,
        theme=theme,
        height=52 * len(of) + 20,
        xaxis={**_axis(n_layers, across), "showgrid": False, "zeroline": False},
        yaxis={"autorange": "reversed", "showgrid": False, "ticks": "", "type": "category"},
    )


def _several_models(rows: Mapping[str, Mapping[str, np.ndarray]], across: Across, title: str, theme: Theme) -> Figure:
    look = look_of(theme)
    kinds = list(next(iter(rows.values())))
    height = ROW * len(rows)
    figure, total_height = panels(
        [height] * len(kinds), gap=40, shared_xaxes=True, subplot_titles=kinds if len(kinds) > 1 else None
    )
    deepest = max(len(counts) for of in rows.values() for counts in of.values())
    largest = 1e-9
    for place, (name, of) in enumerate(rows.items()):
        total = max(sum(int(counts.sum()) for counts in of.values()), 1)
        for panel, (kind, counts) in enumerate(of.items()):
            n_layers = len(counts)
            largest = max(largest, float(counts.max()) / total)
            figure.add_heatmap(
                z=[(counts / total).tolist()],
                x=_edges(n_layers, across),
                y=[place - 0.5, place + 0.5],
                customdata=[
                    [
                        [n, layer, n_layers, name_of(name), kind, 100 * n / total]
                        for layer, n in enumerate(counts.tolist())
                    ]
                ],
                coloraxis="coloraxis",
                xgap=_gap(deepest),
                ygap=2,
                name=name_of(name),
                hovertemplate="%{customdata[3]}, %{customdata[4]}, layer %{customdata[1]} of %{customdata[2]}, counted from 0"
                "<br>%{customdata[0]} neurons, %{customdata[5]:.1f} % of those found<extra></extra>",
                row=panel + 1,
                col=1,
            )
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[name_of(name) for name in rows],
        range=[len(rows) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    axis = _axis(deepest, across)
    figure.update_xaxes({key: value for key, value in axis.items() if key != "title"}, showgrid=False, zeroline=False)
    figure.update_xaxes(title=axis["title"], row=len(kinds), col=1)
    if len(kinds) > 1:
        figure.update_annotations(x=0, xanchor="left")
    return finish(
        figure,
        title,
        theme=theme,
        height=total_height,
        top=24 if len(kinds) > 1 else 0,
        coloraxis={"colorscale": look.scale, "cmin": 0, "cmax": largest, "colorbar": colour_bar("fraction")},
    )


def _gap(n_layers: int) -> int:
    return 2 if n_layers <= 32 else 1


def shares_of_thirds(counts: Int[np.ndarray, " layer"]) -> Float[np.ndarray, " third"]:
    """The fraction of the neurons in each third of the depth; a layer on a border counts for both by its parts."""
    n_layers = len(counts)
    cumulative = np.concatenate([[0], np.cumsum(counts / max(counts.sum(), 1))])
    return np.diff(np.interp([0, 1 / 3, 2 / 3, 1], np.linspace(0, 1, n_layers + 1), cumulative))


def finding(counts: Mapping[str, np.ndarray], noun: str = "models") -> str:
    """Where most of the neurons are, in words."""
    if len(counts) == 1:
        ((name, of),) = counts.items()
        total, n_layers = int(of.sum()), len(of)
        whose = f" of {plain(name)}" if name else ""
        if not total:
            return f"0 truth neurons{whose} over {n_layers} {plural('layer', n_layers)}: none was found"
        if total == 1:
            return f"The only truth neuron{whose} sits in {layer_in_words(int(of.argmax()), n_layers)}"
        if n_layers < LEAST_LAYERS:
            top = int(of.argmax())
            share = f"{100 * of[top] / total:.0f} %"
            return f"{share} of the {total:,} truth neurons{whose} sit in {layer_in_words(top, n_layers)}"
        shares = shares_of_thirds(of)
        if shares.max() >= 0.5:
            third = THIRDS[int(shares.argmax())]
            return f"{100 * shares.max():.0f} % of the {total:,} truth neurons{whose} sit in the {third} third of {n_layers} layers"
        said = ", ".join(f"{100 * share:.0f} % in the {third}" for share, third in zip(shares, THIRDS, strict=True))
        return f"The {total:,} truth neurons{whose} spread over {n_layers} layers: {said} third"
    held = {name: of for name, of in counts.items() if of.any()}
    if not held:
        return f"No truth neurons were found in {len(counts)} {noun}"
    some = "" if len(held) == len(counts) else " in which some were found"
    place = fullest_place(list(held.values()))
    if place is None:
        return f"Where the truth neurons of {len(held)} {noun}{some} sit, by relative depth"
    return f"In {place[1]} of {len(held)} {noun}{some} the most truth neurons sit in {place[0]}"


def fullest_place(counts: Sequence[Int[np.ndarray, " _"]]) -> tuple[str, int] | None:
    """Where most models hold the most of their neurons, and how many do: a third, or a layer of equally shallow models.

    None where some are too shallow for thirds and others have another number of layers.
    """
    depths = {len(of) for of in counts}
    if min(depths) >= LEAST_LAYERS:
        favourite = [int(shares_of_thirds(of).argmax()) for of in counts]
        names = [f"the {third} third of the layers" for third in THIRDS]
    elif len(depths) == 1:
        favourite = [int(of.argmax()) for of in counts]
        names = [layer_in_words(layer, len(counts[0])) for layer in range(len(counts[0]))]
    else:
        return None
    most = max(range(len(names)), key=favourite.count)
    return names[most], favourite.count(most)
