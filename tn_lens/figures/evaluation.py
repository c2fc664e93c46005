"""Effects of the ablation: figures 3 and 4 of the paper, and the response to scaled activations."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from tn_lens.core.errors import BadInput
from tn_lens.core.options import Theme
from tn_lens.core.sentences import percent, say, say_each
from tn_lens.figures.accuracies import Several, labels_of, listed
from tn_lens.figures.layout import QUIET, ROW, TEXT_SIZE, Figure, finish, say_nothing_to_show
from tn_lens.figures.look import SYMBOLS, Look, look_of, name_of

DOSE_COLUMNS = ("factor", "condition", "accuracy", "order_averaged_accuracy", "answer_mass", "share_a")
DOSE_LINES = {
    "ablated": ("truth neurons", "ablated", "circle"),
    "random_matched": ("matched random neurons", "unablated", "square"),
}
"""Name, colour and marker of each condition."""


def plot_probability_change(evaluations: Several, *, title: str | None = None, theme: Theme = "light") -> Figure:
    """Relative loss of the right answer's probability through ablation, by model (paper eq. 11, figure 3).

    Args:
        evaluations: one evaluation, or several of different models or question sets.
        title: title of the figure; by default it gives the loss, or its range.
        theme: "light" or "dark".

    Returns:
        A bar with its number for the paper's mean; below it a diamond for the mean with a denominator of at least 0.01, and
        a circle for the median.

    Raises:
        BadInput: there is no evaluation.
    """
    shown = listed(evaluations, "plot_probability_change")
    look, labels = look_of(theme), labels_of(shown)
    rows = list(range(len(shown)))
    means = [100 * e.probability_change for e in shown]
    figure = Figure()
    # bars are above the middle of their row, and markers below it, so that the label belongs to the bar only
    figure.add_bar(
        orientation="h",
        y=[row - 0.12 for row in rows],
        x=means,
        name="mean (equation 11)",
        width=0.42,
        marker={"color": look.conditions["ablated"]},
        text=[percent(e.probability_change) for e in shown],
        textposition="outside",
        textfont={"size": TEXT_SIZE - 1, "color": look.ink},
        cliponaxis=False,
        customdata=labels,
        hovertemplate="%{customdata}<br>mean: %{x:.1f} %<extra></extra>",
    )
    floored = [100 * e.probability_change_floored for e in shown]
    medians = [100 * e.probability_change_median for e in shown]
    for name, values, symbol in (("floored mean", floored, "diamond"), ("median", medians, "circle")):
        figure.add_points(
            x=values,
            y=[row + 0.27 for row in rows],
            name=name,
            customdata=labels,
            marker=look.hollow(11, symbol),
            hovertemplate=f"%{{customdata}}<br>{name}: %{{x:.1f}} %<extra></extra>",
        )
    # a mean is not finite where a probability before the ablation was 0
    finite = [value for value in (*means, *floored, *medians) if np.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    span = max(high - low, 1.0)  # the range must not be empty if all values are 0
    known = [mean for mean in means if np.isfinite(mean)]
    # room for the numbers; at the left only if a bar extends there
    limits = [low - (0.14 if min(means) < 0 else 0.02) * span, high + 0.14 * span]
    figure.update_xaxes(title_text="probability lost (%)", range=limits, zeroline=True)
    figure.update_yaxes(tickvals=rows, ticktext=labels, range=[len(rows) - 0.4, -0.6], **QUIET)
    sentences = say_each("figures.probability_change", known, labels[0] if len(shown) == 1 else None)
    return finish(figure, sentences, title, theme, height=(ROW + 20) * len(rows) + 16, legend=True)


def plot_categories(
    evaluations: Several, *, least: int = 15, title: str | None = None, theme: Theme = "light"
) -> Figure:
    """The fraction of questions whose right answer loses probability, by category (paper figure 4).

    Args:
        evaluations: one evaluation, or several of different models on the same questions.
        least: categories with fewer questions are omitted, and counted in the subtitle (the paper: 15).
        title: title of the figure; by default it gives the number of categories in which most questions lose probability.
        theme: "light" or "dark".

    Returns:
        One row per category, the highest fraction at the top: a bar for one model, a marker per model for several.

    Raises:
        BadInput: there is no evaluation.
    """
    shown = listed(evaluations, "plot_categories")
    look = look_of(theme)
    # each frame has columns for the number of questions, the fraction hurt and both accuracies
    frames = [e.by_category(least) for e in shown]
    # a category may be large enough in some evaluations only
    every = pd.concat(frames)
    sizes = dict(zip(every["category"], every["n_questions"], strict=True))
    means = {name: float(every.loc[every["category"] == name, "share_hurt"].mean()) for name in sizes}
    rows = {category: row for row, category in enumerate(sorted(means, key=lambda name: (-means[name], name)))}
    figure = Figure()
    for place, (label, frame) in enumerate(zip(labels_of(shown), frames, strict=True)):
        _add_categories(figure, frame, rows, label, None if len(shown) == 1 else place, look)
    n = len(rows)
    if n:
        figure.add_vline(x=50, line=look.dashed)  # to its right, the right answer loses probability on most questions
    else:
        say_nothing_to_show(figure, say("figures.no_categories", least))
    most = sum(share > 0.5 for share in means.values())
    hidden, questions = (max(int(frame.attrs[key]) for frame in frames) for key in ("hidden", "hidden_questions"))
    x_title = "questions whose right answer loses probability (%)"
    figure.update_xaxes(title_text=x_title, range=[0, 101], zeroline=False, visible=n > 0)
    names = [f"{name_of(category)} ({sizes[category]})" for category in rows]
    limits = [max(n, 1) - 0.4, -0.6]
    figure.update_yaxes(tickvals=list(range(n)), ticktext=names, range=limits, visible=n > 0, **QUIET)
    sentences = say_each("figures.categories", most, n, least, hidden, questions)
    return finish(figure, sentences, title, theme, height=max(ROW * n, 80), legend=len(shown) > 1)


def _add_categories(
    figure: Figure, frame: pd.DataFrame, rows: Mapping[str, int], label: str, place: int | None, look: Look
) -> None:
    """The categories of one evaluation: bars if it is the only one, otherwise markers whose style depends on its place."""
    columns = [frame[name].tolist() for name in ("category", "n_questions", "unablated", "ablated")]
    common = {
        "x": 100 * frame["share_hurt"].to_numpy(),
        "y": [rows[category] for category in frame["category"]],
        "name": label,
        "customdata": [[name_of(category), *numbers] for category, *numbers in zip(*columns, strict=True)],
        "hovertemplate": ("" if place is None else f"{label}<br>")
        + "%{customdata[0]}: right answer loses probability in %{x:.1f} % of %{customdata[1]} questions<br>"
        "accuracy %{customdata[2]:.1f} % unablated, %{customdata[3]:.1f} % ablated<extra></extra>",
    }
    if place is None:
        figure.add_bar(orientation="h", width=0.72, marker={"color": look.conditions["ablated"]}, **common)
        return
    n_colours = len(look.series)
    marker = {
        "size": 10,
        "color": look.series[place % n_colours],
        # after all colours have been used they repeat with other symbols
        "symbol": SYMBOLS[(place + place // n_colours) % len(SYMBOLS)],
        "line": {"width": 1, "color": look.ink},
    }
    figure.add_points(marker=marker, **common)


def plot_dose_response(frame: pd.DataFrame, *, title: str | None = None, theme: Theme = "light") -> Figure:
    """Accuracy while the neurons' activations are scaled, from zero-ablation to doubling (see `dose_response`).

    Args:
        frame: columns factor, condition, accuracy, order_averaged_accuracy, answer_mass and share_a.
        title: title of the figure; by default it gives the accuracy at the smallest and the largest factor.
        theme: "light" or "dark".

    Returns:
        Accuracy against the factor, for the found neurons and for matched random ones: thick lines order-averaged where
        every order was asked, thin dotted lines not averaged.

    Raises:
        BadInput: a column is missing, or there is no row of the found neurons.
    """
    if missing := [name for name in DOSE_COLUMNS if name not in frame]:
        raise BadInput(
            f"plot_dose_response needs the frame that dose_response(...) returns; column {missing[0]!r} is missing"
        )
    look = look_of(theme)
    records = frame.sort_values("factor", kind="stable").to_dict("records")
    ablated = [record for record in records if record["condition"] == "ablated"]
    if not ablated:
        raise BadInput("plot_dose_response needs rows with the condition 'ablated' (the found neurons); got none")
    is_averaged = bool(frame["order_averaged_accuracy"].notna().all())
    # column -> suffix of the name, dash, line width and marker size
    lines = {"order_averaged_accuracy": (", order-averaged", "solid", 3, 9), "accuracy": (", plain", "dot", 2, 6)}
    if not is_averaged:
        lines = {"accuracy": ("", "solid", 3, 9)}
    figure = Figure()
    for condition, (name, colour, symbol) in DOSE_LINES.items():
        drawn = [record for record in records if record["condition"] == condition]
        for column, (suffix, dash, width, size) in lines.items() if drawn else ():
            figure.add_scatter(
                x=[record["factor"] for record in drawn],
                y=[record[column] for record in drawn],
                name=name + suffix,
                mode="lines+markers",
                line={"color": look.conditions[colour], "dash": dash, "width": width},
                marker={"symbol": symbol, "size": size},
                customdata=[[record["answer_mass"], _first_label(record["share_a"])] for record in drawn],
                hovertemplate=f"{name}{suffix}<br>scaled by %{{x:g}}: %{{y:.1f}} %<br>answer mass "
                "%{customdata[0]:.3f}%{customdata[1]}<extra></extra>",
            )
    figure.add_vline(x=1, line=look.dashed)  # the unchanged model
    values = frame[list(lines)].to_numpy()  # [row, column]
    column = next(iter(lines))
    ends = [(record["factor"], record[column]) for record in (ablated[0], ablated[-1])]
    limits = [max(0.0, float(values.min()) - 5), min(101.0, float(values.max()) + 5)]
    figure.update_xaxes(title_text="factor on the neurons' activations", zeroline=False)
    figure.update_yaxes(title_text="accuracy (%)", range=limits, zeroline=False)
    sentences = say_each("figures.dose_response", is_averaged, *ends)
    return finish(figure, sentences, title, theme, height=320, legend=True, top=22 if is_averaged else 0)


def _first_label(share: float) -> str:
    """The fraction of the first label in hover texts; empty for answers without labels."""
    return "" if share != share else f", fraction of the first label {share:.2f}"
