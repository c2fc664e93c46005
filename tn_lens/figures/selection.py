"""Selection of the neurons: thresholds, candidates, and one neuron on right and wrong answers."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tn_lens.attribution.result import ScoreSource
from tn_lens.core.errors import BadInput
from tn_lens.core.options import Theme
from tn_lens.core.sentences import say, say_each
from tn_lens.figures.layout import QUIET, Figure, finish, say_nothing_to_show, write_in_cells
from tn_lens.figures.look import Look, look_of, name_of, short_site_name
from tn_lens.neurons import SITES, Neuron, NeuronSet
from tn_lens.selection.result import Selection

MOST_CANDIDATES = 4000
"""Maximum number of points in a volcano plot: found neurons first, then the other candidates with the smallest p."""
SMALLEST_P = 1e-300
"""Lower limit of p in plots of -log10 p."""
SITE_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
"""Markers by the order of `SITES`."""


def plot_sweep(
    frame: pd.DataFrame, *, chosen: tuple[float, float] | None = None, title: str | None = None, theme: Theme = "light"
) -> Figure:
    """The number of neurons found with each pair of thresholds (see `sweep`).

    Args:
        frame: columns t, p, n_candidates, n_found.
        chosen: the pair (t, p) that a run used, which is marked with a frame.
        title: title of the figure; by default it gives the range.
        theme: "light" or "dark".

    Returns:
        A heatmap, t by p, with the number in every cell.

    Raises:
        BadInput: a column is missing.
    """
    if missing := {"t", "p", "n_candidates", "n_found"} - set(frame.columns):
        raise BadInput(f"plot_sweep needs the frame that sweep(...) returns; column {sorted(missing)[0]!r} is missing")
    look = look_of(theme)
    found, candidates = (frame.pivot(index="t", columns="p", values=name) for name in ("n_found", "n_candidates"))
    counts = found.to_numpy()  # [t, p]
    figure = Figure()
    figure.add_cells(
        z=np.log10(1 + counts),  # counts span orders of magnitude
        x=[f"{p:.3g} %" for p in 100 * found.columns],
        y=[f"{t:.3g} %" for t in 100 * found.index],
        text=counts,
        customdata=candidates.to_numpy(),
        colorscale=look.scale,
        showscale=False,
        hovertemplate="t = %{y}, p = %{x}<br>%{text:,} found of %{customdata:,} candidates<extra></extra>",
    )
    write_in_cells(figure, [[f"{n:,}" for n in row] for row in counts.tolist()], theme)
    ts, ps = found.index.tolist(), found.columns.tolist()
    t, p = chosen or (None, None)
    is_framed = t in ts and p in ps
    if is_framed:
        row, column = ts.index(t), ps.index(p)
        corners = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
        figure.add_shape(type="rect", **corners, line={"color": look.conditions["ablated"], "width": 3})
    figure.update_xaxes(title_text="share threshold p", type="category", showgrid=False)
    figure.update_yaxes(title_text="adaptive threshold t", type="category", showgrid=False)
    sentences = say_each("figures.sweep", int(counts.min()), int(counts.max()), is_framed)
    return finish(figure, sentences, title, theme, height=36 * len(ts))


def plot_candidates(selection: Selection, *, title: str | None = None, theme: Theme = "light") -> Figure:
    """The candidates of half 1 and their test on half 2: mean D against -log10 p, uncorrected (a volcano plot).

    Args:
        selection: the selection.
        title: title of the figure; by default it gives the number of candidates that passed.
        theme: "light" or "dark".

    Returns:
        One point per candidate, filled if it was found; candidates above the dashed line pass the test.
    """
    look = look_of(theme)
    figure = Figure()
    n = len(selection.candidates)
    # found neurons first, then by p; if there are too many points, the last ones are not drawn
    order = np.argsort(np.where(selection.found, -np.inf, selection.p_value), kind="stable")
    shown = sorted(order[:MOST_CANDIDATES].tolist())
    for found in (False, True):  # found neurons are drawn last, on top of the others
        for site in NeuronSet(selection.candidates).sites:
            at = [i for i in shown if selection.found[i] == found and selection.candidates[i].site == site]
            if at:
                _add_candidates(figure, selection, at, look)
    threshold = _largest_passing_p(selection)
    if threshold is not None:
        figure.add_hline(y=-np.log10(max(threshold, SMALLEST_P)), line=look.dashed)
    if n:
        # to its right, a neuron supports the right answer
        figure.add_vline(x=0, line={"color": look.line, "width": 1.5})
    else:
        say_nothing_to_show(figure, say("figures.no_candidates"))
    figure.update_xaxes(title_text="mean D on half 2 (probability)", zeroline=False, visible=n > 0)
    figure.update_yaxes(title_text="−log<sub>10</sub> p", zeroline=False, rangemode="tozero", visible=n > 0)
    sentences = say_each(
        "figures.candidates", selection, int(selection.found.sum()), n - len(shown), threshold is not None
    )
    return finish(figure, sentences, title, theme, height=360 if n else 80, legend=n > 0)


def plot_difference(
    scores: ScoreSource,
    neuron: Neuron,
    *,
    mistaken: ScoreSource | None = None,
    title: str | None = None,
    theme: Theme = "light",
) -> Figure:
    """The distribution of one neuron's D over questions that the model answers correctly, and over those it answers incorrectly.

    Args:
        scores: scores of the questions that the model answers correctly.
        neuron: the neuron.
        mistaken: scores of questions that it answers incorrectly.
        title: title of the figure; by default it gives the means.
        theme: "light" or "dark".

    Returns:
        A violin with a point per question; above 0 the neuron supports the right answer.

    Raises:
        BadInput: the model has no such neuron, or there are no scores.
    """
    look = look_of(theme)
    groups = [("answered right", scores, look.sites["mlp"])]
    if mistaken is not None:
        groups.append(("answered wrong", mistaken, look.conditions["ablated"]))
    figure, means = Figure(), []
    for group, source, colour in groups:
        by_question = difference_of(source, neuron)
        values = np.array(list(by_question.values()))
        means.append(float(values.mean()))
        name = f"{group} ({len(values)})"
        figure.add_violin(
            x=values,
            y0=name,
            name=name,
            orientation="h",
            side="positive",
            width=1.3,
            points="all",
            pointpos=-0.28,  # below the violin, which is drawn upwards
            jitter=0.3,
            spanmode="hard",  # no density beyond the smallest and the largest value
            line={"color": colour, "width": 1.5},
            marker={"color": colour, "size": 5, "opacity": 0.7},
            meanline={"visible": True, "color": look.ink, "width": 2},
            customdata=[name_of(question) for question in by_question],
            hoveron="points",
            hovertemplate="question %{customdata}: D = %{x:.5f}<extra></extra>",
        )
    figure.add_vline(x=0, line=look.dashed)
    figure.update_xaxes(title_text="D (probability)", zeroline=False)
    figure.update_yaxes(autorange="reversed", **QUIET)
    sentences = say_each("figures.difference", neuron, means[0], means[1] if mistaken is not None else None)
    return finish(figure, sentences, title, theme, height=130 * len(groups))


def difference_of(scores: ScoreSource, neuron: Neuron) -> dict[str, float]:
    """D of one neuron by the id of the question.

    Raises:
        BadInput: the model has no such neuron, or there are no scores.
    """
    if not len(scores.prompts):
        raise BadInput("there are no scores to draw: no question was attributed")
    values = scores.at_questions([neuron])[:, 0]  # [question, neuron] -> [question]
    return dict(zip(scores.prompts.groups, values.tolist(), strict=True))


def _add_candidates(figure: Figure, selection: Selection, at: list[int], look: Look) -> None:
    """Draw candidates of one site that were all found, or all not found."""
    site, is_found = selection.candidates[at[0]].site, bool(selection.found[at[0]])
    colour = look.site(site)
    figure.add_points(
        x=selection.mean_difference[at],
        y=-np.log10(np.clip(selection.p_value[at], SMALLEST_P, 1)),
        name=f"{short_site_name(site)}, {'found' if is_found else 'not found'}",
        marker={
            "symbol": SITE_SYMBOLS[list(SITES).index(site) % len(SITE_SYMBOLS)],
            "size": 8,
            "color": colour if is_found else look.paper,
            "line": {"color": look.ink if is_found else colour, "width": 0.8 if is_found else 1.2},
            "opacity": 0.85 if is_found else 0.7,
        },
        customdata=[
            [str(selection.candidates[i]), 100 * float(selection.share[i]), float(selection.p_adjusted[i])] for i in at
        ],
        hovertemplate="%{customdata[0]}<br>mean D %{x:.5f}, corrected p %{customdata[2]:.1e}<br>salient in "
        "%{customdata[1]:.0f} % of half 1<extra></extra>",
    )


def _largest_passing_p(selection: Selection) -> float | None:
    """The uncorrected p that separates found from not found candidates; None without a test, or if it is unknown."""
    if selection.alpha is None or not len(selection.candidates):
        return None
    # the correction counts either the candidates or every neuron as tested
    n_tested = len(selection.candidates) if selection.family == "candidates" else selection.space.n_neurons
    if selection.correction in ("bonferroni", "none"):
        return selection.alpha / (n_tested if selection.correction == "bonferroni" else 1)
    passed, failed = selection.p_value[selection.found], selection.p_value[~selection.found]
    if len(passed) and len(failed):
        # these corrections have no fixed threshold: any p between the two groups separates them
        return float(np.sqrt(max(passed.max(), SMALLEST_P) * max(failed.min(), SMALLEST_P)))
    return None
