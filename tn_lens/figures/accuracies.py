"""Accuracy in every condition: table 1 of the paper as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tn_lens.core.errors import BadInput
from tn_lens.evaluation import ARM_NAMES, ARMS, Evaluation, StoredEvaluation
from tn_lens.figures.look import ROW, TEXT_SIZE, Figure, Theme, finish, look_of, name_of, plain
from tn_lens.selection.significance import LEVEL

Evaluated = Evaluation | StoredEvaluation
Several = Evaluated | Sequence[Evaluated]

PERCENT_AXIS = {"range": [0, 118], "tickvals": [0, 25, 50, 75, 100], "zeroline": False}
"""Room at the right for the numbers."""
SPREAD = 0.24
"""Half of the height of a bar over which single repetitions are spread."""


def plot_accuracies(evaluations: Several, *, title: str | None = None, theme: Theme = "light") -> Figure:
    """Accuracy in every condition, single repetitions as points (the paper's table 1 as a picture).

    Args:
        evaluations: one, or several of different models or question sets.
        title: of the figure; by default it says what suppressing does.
        theme: "light" or "dark".

    Returns:
        A bar per condition with the standard deviation over repetitions, a point per repetition, a diamond for the
        order-averaged accuracy where every order was asked, and a dashed line at chance where all sets have the same.

    Raises:
        BadInput: no evaluation.
    """
    shown = listed(evaluations, "plot_accuracies")
    look = look_of(theme)
    labels = labels_of(shown)
    alone = len(shown) == 1
    arms = [arm for arm in ARMS if any(arm in e.arms for e in shown)]
    starts, place_of = [0], []
    for e in shown:
        own = [arm for arm in arms if arm in e.arms]
        place_of.append({arm: starts[-1] + place for place, arm in enumerate(own)})
        starts.append(starts[-1] + len(own) + 1)
    figure = Figure()
    for arm in arms:
        held = [(row, e) for row, e in enumerate(shown) if arm in e.arms]
        at = [place_of[row][arm] for row, _ in held]
        means = [100 * e.arms[arm].accuracy for _, e in held]
        stds = [100 * e.arms[arm].accuracy_std for _, e in held]
        name = _arm_name(arm, shown)
        figure.add_bar(
            orientation="h",
            y=at,
            x=means,
            name=name,
            width=0.82,
            marker={"color": look.arms[arm]},
            error_x={"type": "data", "array": stds, "color": look.ink, "thickness": 1.4, "width": 4},
            customdata=[
                [
                    labels[row],
                    std,
                    _percent(e.arms[arm].order_averaged_accuracy),
                    e.arms[arm].share_a,
                    e.arms[arm].answer_mass,
                ]
                for (row, e), std in zip(held, stds, strict=True)
            ],
            hovertemplate=f"%{{customdata[0]}}<br>{name}: %{{x:.2f}} ± %{{customdata[1]:.2f}} %<br>"
            "order-averaged %{customdata[2]}<br>share of “A” %{customdata[3]:.2f}, answer mass "
            "%{customdata[4]:.3f}<extra></extra>",
        )
        figure.add_scatter(
            x=[104] * len(at),
            y=at,
            mode="text",
            text=[
                f"{mean:.1f} ± {std:.1f}" if e.n_repetitions > 1 else f"{mean:.1f}"
                for (_, e), mean, std in zip(held, means, stds, strict=True)
            ],
            textposition="middle right",
            textfont={"size": TEXT_SIZE - 2, "color": look.ink if arm == "suppressed" else look.soft},
            hoverinfo="skip",
            showlegend=False,
        )
    points = [
        (
            place_of[row][arm] + _jitter(len(e.arms[arm].accuracies))[draw],
            100 * float(value),
            draw,
            _arm_name(arm, shown),
        )
        for row, e in enumerate(shown)
        for arm in arms
        if arm in e.arms
        for draw, value in enumerate(e.arms[arm].accuracies)
    ]
    figure.add_scatter(
        x=[point[1] for point in points],
        y=[point[0] for point in points],
        customdata=[[point[2], point[3]] for point in points],
        mode="markers",
        name="one repetition",
        marker={"size": 5, "color": look.paper, "line": {"color": look.ink, "width": 1}},
        hovertemplate="%{customdata[1]}, repetition %{customdata[0]}: %{x:.2f} %<extra></extra>",
    )
    averaged = [
        (place_of[row][arm], 100 * e.arms[arm].order_averaged_accuracy, _arm_name(arm, shown))
        for row, e in enumerate(shown)
        for arm in arms
        if arm in e.arms and e.arms[arm].is_complete and e.n_orders > 1
    ]
    if averaged:
        figure.add_scatter(
            x=[point[1] for point in averaged],
            y=[point[0] for point in averaged],
            customdata=[point[2] for point in averaged],
            mode="markers",
            name="order-averaged",
            marker={"size": 11, "symbol": "diamond", "color": look.paper, "line": {"color": look.ink, "width": 2}},
            hovertemplate="%{customdata}, order-averaged: %{x:.2f} %<extra></extra>",
        )
    chances = {len(e.arms["baseline"].shares) for e in shown}
    if len(chances) == 1:
        figure.add_vline(x=100 / chances.pop(), line={"color": look.soft, "dash": "dash", "width": 1.5})
    if alone:
        axis = {"tickvals": list(range(len(arms))), "ticktext": [_arm_name(arm, shown) for arm in arms]}
    else:
        axis = {"tickvals": [float(np.mean(list(of.values()))) for of in place_of], "ticktext": labels}
    last = starts[-1] - 1.4
    figure.update_traces(showlegend=not alone, selector={"type": "bar"})
    return finish(
        figure,
        title or finding(shown),
        subtitle=(
            "Bars: mean over repetitions ± standard deviation; circles: single repetitions"
            if any(e.n_repetitions > 1 for e in shown)
            else "Bars: a single repetition"
        )
        + ("; diamonds: answers averaged over their orders, so that letter bias cancels." if averaged else ".")
        + (" Dashed: chance." if len({len(e.arms["baseline"].shares) for e in shown}) == 1 else ""),
        theme=theme,
        height=round((ROW + 8 if alone else 20) * (last + 0.6)),
        legend=not alone,
        barmode="overlay",
        xaxis={**PERCENT_AXIS, "title": {"text": "accuracy (%)"}},
        yaxis={**axis, "range": [last, -0.6], "showgrid": False, "zeroline": False},
    )


def listed(evaluations: Several, name: str) -> list[Evaluated]:
    shown = [evaluations] if isinstance(evaluations, Evaluated) else list(evaluations)
    if not shown:
        raise BadInput(f"{name} needs an evaluation; got none")
    return shown


def labels_of(shown: Sequence[Evaluated]) -> list[str]:
    """What tells the evaluations apart: the model, the question set, or both."""
    models, sets = ({getattr(e, of) for e in shown} for of in ("model_name", "name"))
    if len(sets) == 1 or len(models) == len(shown):
        return [name_of(e.model_name or "model") for e in shown]
    if len(models) == 1:
        return [name_of(e.name) for e in shown]
    return [f"{name_of(e.model_name or 'model')}, {name_of(e.name)}" for e in shown]


def _arm_name(arm: str, shown: Sequence[Evaluated]) -> str:
    """What a condition is called, with what was really done to the neurons."""
    done = {e.intervention for e in shown}
    return ARM_NAMES[arm].replace("at zero", done.pop() if len(done) == 1 else "touched")


def _jitter(n: int) -> list[float]:
    return np.linspace(-SPREAD, SPREAD, n).tolist() if n > 1 else [0.0]


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %" if value == value else "not asked"


def finding(shown: Sequence[Evaluated], noun: str | None = None) -> str:
    """What suppressing does, in words; `noun` is what several evaluations are called."""
    if len(shown) == 1:
        (e,) = shown
        before, after = 100 * e.arms["baseline"].accuracy, 100 * e.arms["suppressed"].accuracy
        others = f", and {100 * e.arms['random'].accuracy:.1f} % with random ones" if "random" in e.arms else ""
        return (
            f"{name_of(e.model_name or 'The model')} on {plain(e.name)}: {after:.1f} % right with {e.n_neurons:,} neurons "
            f"{e.intervention}, {before:.1f} % untouched{others}"
        )
    lower = sum(e.welch_p < LEVEL for e in shown)
    models, sets = len({e.model_name for e in shown}), len({e.name for e in shown})
    unit = noun or ("models" if sets == 1 else "question sets" if models == 1 else "evaluations")
    return f"Suppressing the found neurons lowers accuracy in {lower} of {len(shown)} {unit} (one-sided Welch test, p < {LEVEL})"
