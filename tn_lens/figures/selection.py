"""How the neurons were chosen: thresholds, candidates, and one neuron on right and wrong answers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from tn_lens.core.errors import BadInput
from tn_lens.core.wording import plural
from tn_lens.figures.look import SITE_NAMES, Figure, Theme, finish, look_of, say_nothing_to_show, write_in_cells
from tn_lens.neurons.neuron import Neuron
from tn_lens.selection.select import ScoreSource, Selection
from tn_lens.selection.significance import Correction

CORRECTIONS: Mapping[Correction, str] = {
    "bonferroni": "Bonferroni's correction",
    "holm": "Holm's correction",
    "benjamini-hochberg": "Benjamini and Hochberg's correction",
    "none": "without a correction",
}
MOST_CANDIDATES = 4000
"""Points of a volcano: every found neuron, then the strongest others."""
SMALLEST_P = 1e-300
"""Where -log10 p ends."""


def plot_sweep(
    frame: pd.DataFrame,
    *,
    chosen: tuple[float, float] | None = None,
    title: str | None = None,
    theme: Theme = "light",
) -> Figure:
    """How many neurons each pair of thresholds finds (see `sweep`).

    Args:
        frame: columns t, p, n_candidates, n_found.
        chosen: the pair (t, p) that was taken, to be framed.
        title: of the figure; by default it gives the range.
        theme: "light" or "dark".

    Returns:
        A heatmap, t by p, with the count in every cell.

    Raises:
        BadInput: a column is missing.
    """
    if missing := {"t", "p", "n_candidates", "n_found"} - set(frame.columns):
        raise BadInput(f"plot_sweep needs what sweep(...) returns; the column {sorted(missing)[0]!r} is missing")
    look = look_of(theme)
    found, candidates = (frame.pivot(index="t", columns="p", values=name) for name in ("n_found", "n_candidates"))
    figure = Figure()
    figure.add_heatmap(
        z=np.log10(1 + found.to_numpy()),
        x=[f"{p:.3g} %" for p in 100 * found.columns],
        y=[f"{t:.3g} %" for t in 100 * found.index],
        text=found.to_numpy(),
        customdata=candidates.to_numpy(),
        colorscale=look.scale,
        showscale=False,
        xgap=2,
        ygap=2,
        hovertemplate="t = %{y}, p = %{x}<br>%{text:,} found of %{customdata:,} candidates<extra></extra>",
    )
    write_in_cells(figure, [[f"{n:,}" for n in row] for row in found.to_numpy().tolist()], theme)
    ts, ps = found.index.tolist(), found.columns.tolist()
    if chosen is not None and chosen[0] in ts and chosen[1] in ps:
        row, column = ts.index(chosen[0]), ps.index(chosen[1])
        figure.add_shape(
            type="rect",
            x0=column - 0.5,
            x1=column + 0.5,
            y0=row - 0.5,
            y1=row + 0.5,
            line={"color": look.arms["suppressed"], "width": 3},
        )
    low, high = int(found.to_numpy().min()), int(found.to_numpy().max())
    return finish(
        figure,
        title or f"Between {low:,} and {high:,} neurons are found, by the thresholds",
        subtitle="Neurons that pass the test; framed: the thresholds of this run." if chosen else "",
        theme=theme,
        height=36 * len(found.index),
        xaxis={"title": {"text": "share threshold p"}, "type": "category", "showgrid": False},
        yaxis={"title": {"text": "adaptive threshold t"}, "type": "category", "showgrid": False},
    )


def plot_candidates(selection: Selection, *, title: str | None = None, theme: Theme = "light") -> Figure:
    """The candidates of half 1 and their test on half 2: mean D against -log10 p, uncorrected (a volcano plot).

    Args:
        selection: what was found.
        title: of the figure; by default it counts who passed.
        theme: "light" or "dark".

    Returns:
        One point a candidate: filled where it was found; above the dashed line p is small enough after the correction.
    """
    look = look_of(theme)
    figure = Figure()
    heights = -np.log10(np.clip(selection.p_value, SMALLEST_P, 1))
    shown = np.argsort(np.where(selection.found, -np.inf, selection.p_value), kind="stable")[:MOST_CANDIDATES]
    n_hidden = len(selection.candidates) - len(shown)
    for found in (False, True):
        for site in ("mlp", "attn"):
            at = [
                i
                for i in sorted(shown.tolist())
                if selection.found[i] == found and selection.candidates[i].site == site
            ]
            if not at:
                continue
            colour = look.sites[site]
            marker = {
                "symbol": {"mlp": "circle", "attn": "diamond"}[site],
                "size": 8,
                "color": colour if found else look.paper,
                "line": {"color": look.ink if found else colour, "width": 0.8 if found else 1.2},
                "opacity": 0.85 if found else 0.7,
            }
            figure.add_scatter(
                x=selection.mean_difference[at],
                y=heights[at],
                mode="markers",
                name=f"{SITE_NAMES[site].split()[0]}, {'found' if found else 'not found'}",
                marker=marker,
                customdata=[
                    [str(selection.candidates[i]), 100 * float(selection.share[i]), float(selection.p_adjusted[i])]
                    for i in at
                ],
                hovertemplate="%{customdata[0]}<br>mean D %{x:.5f}, corrected p %{customdata[2]:.1e}<br>salient in "
                "%{customdata[1]:.0f} % of half 1<extra></extra>",
            )
    n_found, n = int(selection.found.sum()), len(selection.candidates)
    border = _border(selection)
    if border is not None and n:
        figure.add_hline(y=-np.log10(max(border, SMALLEST_P)), line={"color": look.soft, "dash": "dash", "width": 1.5})
    if not n:
        say_nothing_to_show(figure, "No neuron was salient often enough to be a candidate.")
    else:
        figure.add_vline(x=0, line={"color": look.line, "width": 1.5})
    hidden = f" {n_hidden:,} weaker candidates that were not found are not drawn." if n_hidden else ""
    return finish(
        figure,
        title
        or (
            f"{n_found:,} of {n:,} {plural('candidate', n)} support{'s' if n_found == 1 else ''} the right answer on "
            "questions that did not choose them"
            if n
            else "There are no candidates to test"
        ),
        subtitle=f"Test on {len(selection.half_2):,} {plural('question', len(selection.half_2))}, {CORRECTIONS[selection.correction]}; dashed: what it asks for.{hidden}"
        if selection.alpha is not None
        else f"Without a test every candidate is found; p from {len(selection.half_2):,} questions.{hidden}",
        theme=theme,
        height=360 if n else 80,
        legend=n > 0,
        xaxis={"title": {"text": "mean D on half 2 (probability)"}, "zeroline": False, "visible": n > 0},
        yaxis={"title": {"text": "−log<sub>10</sub> p"}, "zeroline": False, "rangemode": "tozero", "visible": n > 0},
    )


def plot_difference(
    scores: ScoreSource,
    neuron: Neuron,
    *,
    mistaken: ScoreSource | None = None,
    title: str | None = None,
    theme: Theme = "light",
) -> Figure:
    """How one neuron's D is distributed over questions, where the model is right and where it is wrong.

    Args:
        scores: of the questions that the model answers right.
        neuron: which.
        mistaken: scores of questions that it answers wrong.
        title: of the figure; by default it gives the means.
        theme: "light" or "dark".

    Returns:
        A violin with a point a question; above 0 the neuron supports the right answer.

    Raises:
        BadInput: the model has no such neuron, or there are no scores.
    """
    look = look_of(theme)
    named = {"answered right": (scores, look.sites["mlp"])}
    if mistaken is not None:
        named["answered wrong"] = (mistaken, look.arms["suppressed"])
    figure, means = Figure(), {}
    for name, (source, colour) in named.items():
        found = difference_of(source, neuron)
        questions, values = list(found), np.array(list(found.values()))
        means[name] = float(values.mean())
        figure.add_violin(
            x=values,
            y0=f"{name} ({len(values)})",
            name=f"{name} ({len(values)})",
            orientation="h",
            side="positive",
            width=1.3,
            points="all",
            pointpos=-0.28,
            jitter=0.3,
            spanmode="hard",
            line={"color": colour, "width": 1.5},
            marker={"color": colour, "size": 5, "opacity": 0.7},
            meanline={"visible": True, "color": look.ink, "width": 2},
            customdata=questions,
            hoveron="points",
            hovertemplate="question %{customdata}: D = %{x:.5f}<extra></extra>",
        )
    figure.add_vline(x=0, line={"color": look.soft, "dash": "dash", "width": 1.5})
    said = [f"{means['answered right']:+.2g} where the model is right"]
    said += [f"{means['answered wrong']:+.2g} where it is wrong"] if mistaken is not None else []
    return finish(
        figure,
        title or f"Mean D of {neuron} is {' and '.join(said)}".replace("-", "−"),
        subtitle="One point a question, the line its mean. Above 0 the neuron supports the right answer.",
        theme=theme,
        height=130 * len(named),
        xaxis={"title": {"text": "D (probability)"}, "zeroline": False},
        yaxis={"showgrid": False, "zeroline": False, "autorange": "reversed"},
    )


def difference_of(scores: ScoreSource, neuron: Neuron) -> dict[int, float]:
    """D of one neuron in every question.

    Raises:
        BadInput: the model has no such neuron, or there are no scores.
    """
    space = scores.space
    flat = space.flat(neuron)
    if neuron.layer >= space.n_layers or flat >= space.width(neuron.site):
        raise BadInput(f"there is no neuron {neuron} among these scores: the model has {space.n_layers} layers")
    found = {
        question: float(difference[neuron.site][neuron.layer, flat]) for question, difference in scores.per_question()
    }
    if not found:
        raise BadInput("there are no scores to draw: no question was attributed")
    return found


def _border(selection: Selection) -> float | None:
    """The uncorrected p between the last that passed and the first that did not; None without a test or without both."""
    if selection.alpha is None or not len(selection.candidates):
        return None
    passed, failed = selection.p_value[selection.found], selection.p_value[~selection.found]
    tested = len(selection.candidates) if selection.family == "candidates" else selection.space.n_neurons
    if selection.correction in ("bonferroni", "none"):
        return selection.alpha / (tested if selection.correction == "bonferroni" else 1)
    if len(passed) and len(failed):
        return float(np.sqrt(max(passed.max(), SMALLEST_P) * max(failed.min(), SMALLEST_P)))
    return None
