"""Positions of the neurons: figure 5 of the paper, for one model and for several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float, Int

from tn_lens.core.errors import BadInput
from tn_lens.core.options import NEURON_SITES, Theme
from tn_lens.core.sentences import say_each
from tn_lens.figures.layout import QUIET, ROW, Figure, colour_bar, finish, layer_axis, panels, write_in_cells
from tn_lens.figures.look import look_of, name_of, plain, site_name
from tn_lens.neurons import SITES, NeuronSet
from tn_lens.selection.result import Selection

Found: TypeAlias = Selection | NeuronSet
SitesShown = Literal["apart", "together"]
Across = Literal["layer", "depth"]
Counts: TypeAlias = Mapping[str, Int[np.ndarray, " layer"]]
"""Number of neurons in each layer, by the name of a row of cells."""

MOST_COUNTS = 12
"""Maximum number of layers for which the cells show their counts."""
THIRDS = ("first", "middle", "last")
LEAST_LAYERS = 6
"""Minimum number of layers for statements about thirds; with fewer, one layer is too large a part of a third."""


@dataclass(frozen=True)
class FullestPlace:
    """The third of the layers, or the layer, in which most models have the largest fraction of their neurons."""

    index: int
    """Third of the layers, or layer, counted from 0."""
    is_third: bool
    n_layers: int
    """Number of layers of the models, if they are equally deep."""
    n_models: int
    """Number of models for which this is the place."""


def plot_layers(
    found: Found | Mapping[str, Found],
    n_layers: int | Mapping[str, int] | None = None,
    *,
    sites: SitesShown = "apart",
    across: Across | None = None,
    noun: str = "models",
    title: str | None = None,
    theme: Theme = "light",
) -> Figure:
    """The fraction of a model's found neurons in each layer (paper figure 5).

    Args:
        found: a selection or a set of neurons, or several by the name of their model.
        n_layers: number of layers of the model, or of each model by name; a selection contains it.
        sites: "apart" shows sites separately (a row each for one model, a panel each for several), "together" sums over them.
        across: the horizontal axis: the "layer", or relative "depth", by which models with different numbers of layers can be
            compared; by default "depth" if the models differ in their number of layers.
        noun: what several entries are called in the default title, for example "runs".
        title: title of the figure; by default it says where most of the neurons are.
        theme: "light" or "dark".

    Returns:
        A heatmap whose cells sum to 1 for every model, over all sites; hovering shows counts.

    Raises:
        BadInput: there is no model, an option is unknown, or a number of layers is missing or too small.
    """
    named = found if isinstance(found, Mapping) else {"": found}
    if not named:
        raise BadInput("plot_layers needs the neurons of at least one model; got none")
    if sites not in get_args(SitesShown) or across not in (None, *get_args(Across)):
        raise BadInput(
            f"expected sites 'apart' or 'together' and across 'layer' or 'depth'; got {sites!r} and {across!r}"
        )
    depths = {name: _depth(name, entry, n_layers) for name, entry in named.items()}
    sets = {name: entry.neurons if isinstance(entry, Selection) else entry for name, entry in named.items()}
    # MLP and attention are always shown, other sites only if they have neurons
    every = {*NEURON_SITES, *(site for neurons in sets.values() for site in neurons.sites)}
    shown = [site for site in SITES if site in every]
    rows = {name: _counts(neurons, shown, depths[name], sites) for name, neurons in sets.items()}
    # layers of models that differ in depth are only comparable by their relative depth
    across = across or ("layer" if len(set(depths.values())) == 1 else "depth")
    sentences = _title({name: np.sum(list(counts.values()), axis=0) for name, counts in rows.items()}, noun)
    if len(rows) == 1:
        (counts,) = rows.values()
        return _one_model(counts, across, sentences, title, theme)
    return _several_models(rows, across, sentences, title, theme)


def plot_overlap(
    names: Sequence[str],
    overlap: Float[np.ndarray, "model model"],
    *,
    noun: str = "models",
    title: str | None = None,
    theme: Theme = "light",
) -> Figure:
    """The overlap of the models' distributions over relative depth (see `tn_lens.results.compare`).

    Args:
        names: names of the models.
        overlap: overlap of every pair, in [0, 1].
        noun: what the entries are called in the default title, for example "runs".
        title: title of the figure; by default it gives the range over the pairs.
        theme: "light" or "dark".
    """
    shown = [name_of(name) for name in names]
    places = list(range(len(names)))
    cells = [[f"{100 * value:.0f}" for value in row] for row in overlap]
    style = {"colorscale": look_of(theme).scale, "zmin": 0, "zmax": 1, "showscale": False}
    figure = Figure()
    figure.add_cells(
        z=overlap,
        x=places,
        y=places,
        customdata=[[f"{a} and {b}" for b in shown] for a in shown],  # [model, model]
        text=cells,
        **style,
        hovertemplate="%{customdata}<br>%{text} % of the neurons at the same relative depth and site<extra></extra>",
    )
    write_in_cells(figure, cells, theme)
    # [model, model] -> [pair]: above the diagonal, so that each pair counts once
    pairs = overlap[np.triu_indices(len(names), 1)]
    figure.update_xaxes(tickvals=places, ticktext=shown, showgrid=False, tickangle=-35)
    figure.update_yaxes(tickvals=places, ticktext=shown, showgrid=False, autorange="reversed")
    sentences = say_each("figures.overlap", pairs.tolist(), float(pairs.mean()) if len(pairs) else None, noun)
    return finish(figure, sentences, title, theme, height=max(120, 44 * len(names)), bottom=70)


def _depth(name: str, found: Found, n_layers: int | Mapping[str, int] | None) -> int:
    if isinstance(found, Selection):
        return found.space.n_layers
    depth = n_layers.get(name) if isinstance(n_layers, Mapping) else n_layers
    if depth is None or any(neuron.layer >= depth for neuron in found):
        whose = f" of {name!r}" if name else ""
        raise BadInput(f"plot_layers needs n_layers{whose}, greater than every neuron's layer; got {depth}")
    return depth


def _counts(neurons: NeuronSet, shown: Sequence[str], n_layers: int, sites: SitesShown) -> Counts:
    by_site = neurons.by_layer(n_layers)
    counts = {site: np.array(by_site.get(site, [0] * n_layers)) for site in shown}
    if sites == "apart":
        return {site_name(site): values for site, values in counts.items()}
    label = "MLP and attention" if set(shown) == set(NEURON_SITES) else "all sites"
    return {label: np.sum(list(counts.values()), axis=0)}


def _edges(n_layers: int, across: Across) -> list[float]:
    """The borders of the cells."""
    return [i - 0.5 if across == "layer" else i / n_layers for i in range(n_layers + 1)]


def _axis(n_layers: int, across: Across) -> dict[str, Any]:
    if across == "depth":
        title = {"text": "relative depth (0: input, 1: output)"}
        return {"title": title, "range": [0, 1], "tickformat": ".1f", "dtick": 0.2}
    return {**layer_axis(n_layers), "range": [-0.5, n_layers - 0.5]}


def _one_model(rows: Counts, across: Across, sentences: Sequence[str], title: str | None, theme: Theme) -> Figure:
    counts = np.stack(list(rows.values()))  # [site, layer]
    n_layers = counts.shape[1]
    fractions = counts / max(int(counts.sum()), 1)
    # empty cells show no number
    texts = [[str(n) if n else "" for n in row] for row in counts.tolist()]
    figure = Figure()
    figure.add_cells(
        n_layers,
        z=fractions,
        x=list(range(n_layers)) if across == "layer" else _edges(n_layers, across),
        y=list(rows),
        customdata=np.dstack([counts, np.broadcast_to(np.arange(n_layers), counts.shape), 100 * fractions]),
        colorscale=look_of(theme).scale,
        zmin=0,
        zmax=max(float(fractions.max()), 1e-9),  # plotly needs a range even if nothing was found
        text=texts,
        colorbar={**colour_bar("fraction"), "nticks": 2 * len(rows) + 1},
        showscale=bool(counts.any()),
        hovertemplate="%{y}, layer %{customdata[1]}<br>%{customdata[0]} neurons, %{customdata[2]:.1f} % of those found"
        "<extra></extra>",
    )
    if n_layers <= MOST_COUNTS and across == "layer" and counts.any():
        write_in_cells(figure, texts, theme)
    figure.update_xaxes(_axis(n_layers, across), **QUIET)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", type="category")
    return finish(figure, sentences, title, theme, height=52 * len(rows) + 20)


def _several_models(
    rows: Mapping[str, Counts], across: Across, sentences: Sequence[str], title: str | None, theme: Theme
) -> Figure:
    labels = list(next(iter(rows.values())))
    are_apart = len(labels) > 1
    figure, total_height = panels(
        [ROW * len(rows)] * len(labels), gap=40, shared_xaxes=True, subplot_titles=labels if are_apart else None
    )
    # one trace per model and site, since models may differ in their number of layers
    deepest = max(len(values) for counts in rows.values() for values in counts.values())
    largest = 1e-9
    for place, (name, by_label) in enumerate(rows.items()):
        counts = np.stack(list(by_label.values()))  # [site, layer]
        fractions = counts / max(int(counts.sum()), 1)
        largest = max(largest, float(fractions.max()))
        n_layers = counts.shape[1]
        for panel, label in enumerate(labels):
            cells = zip(counts[panel].tolist(), fractions[panel].tolist(), strict=True)
            figure.add_cells(
                deepest,
                z=fractions[[panel]].tolist(),
                x=_edges(n_layers, across),
                y=[place - 0.5, place + 0.5],
                customdata=[
                    [[n, layer, n_layers, name_of(name), label, 100 * part] for layer, (n, part) in enumerate(cells)]
                ],
                coloraxis="coloraxis",
                name=name_of(name),
                hovertemplate="%{customdata[3]}, %{customdata[4]}, layer %{customdata[1]} of %{customdata[2]}, counted from 0"
                "<br>%{customdata[0]} neurons, %{customdata[5]:.1f} % of those found<extra></extra>",
                row=panel + 1,
                col=1,
            )
    names = [name_of(name) for name in rows]
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=names, range=[len(rows) - 0.5, -0.5], **QUIET)
    figure.share_axis(_axis(deepest, across), len(labels))
    colours = {"colorscale": look_of(theme).scale, "cmin": 0, "cmax": largest, "colorbar": colour_bar("fraction")}
    figure.update_layout(coloraxis=colours)
    return finish(figure, sentences, title, theme, height=total_height, top=24 if are_apart else 0)


def shares_of_thirds(counts: Int[np.ndarray, " layer"]) -> Float[np.ndarray, " third"]:
    """The fraction of the neurons in each third of the depth; a layer on a border counts for both in proportion."""
    n_layers = len(counts)
    # [layer + 1]: the fraction below each border of a layer; between borders it grows linearly
    cumulative = np.concatenate([[0], np.cumsum(counts / max(counts.sum(), 1))])
    return np.diff(np.interp([0, 1 / 3, 2 / 3, 1], np.linspace(0, 1, n_layers + 1), cumulative))


def fullest_place(counts: Sequence[Int[np.ndarray, " _"]]) -> FullestPlace | None:
    """The third of the layers, or the layer of shallow models, in which most models have the largest fraction of neurons.

    None if a model has too few layers for thirds and the models differ in their number of layers.
    """
    n_layers = {len(by_layer) for by_layer in counts}
    has_thirds = min(n_layers) >= LEAST_LAYERS
    if not has_thirds and len(n_layers) > 1:
        return None
    fullest = [int((shares_of_thirds(by_layer) if has_thirds else by_layer).argmax()) for by_layer in counts]
    # the first of equally frequent places
    index = max(range(len(THIRDS) if has_thirds else min(n_layers)), key=fullest.count)
    return FullestPlace(index, has_thirds, min(n_layers), fullest.count(index))


def _title(counts: Counts, noun: str) -> list[str]:
    """The default title, from the neurons in each layer over all sites, by model."""
    if len(counts) == 1:
        ((name, by_layer),) = counts.items()
        total, n_layers, fullest = int(by_layer.sum()), len(by_layer), int(by_layer.argmax())
        thirds = shares_of_thirds(by_layer).tolist() if n_layers >= LEAST_LAYERS else None
        fraction = float(by_layer.max() / max(total, 1))
        return say_each("figures.layers_of_one", plain(name), total, n_layers, fullest, fraction, thirds)
    # models without truth neurons have no fullest place
    not_empty = [by_layer for by_layer in counts.values() if by_layer.any()]
    place = fullest_place(not_empty) if not_empty else None
    return say_each("figures.layers_of_several", len(counts), len(not_empty), place, noun)
