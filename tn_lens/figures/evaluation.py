"""What suppression does: figures 3 and 4 of the paper, and dose and response."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tn_lens.core.errors import BadInput
from tn_lens.core.wording import plural
from tn_lens.figures.accuracies import Several, labels_of, listed
from tn_lens.figures.look import ROW, SYMBOLS, TEXT_SIZE, Figure, Theme, finish, look_of, name_of, say_nothing_to_show

BESIDE, BELOW = 0.12, 0.27
"""Figure 3: how far above its row a bar stands, and how far below the marks that its label must not be read with."""


def plot_probability_change(evaluations: Several, *, title: str | None = None, theme: Theme = "light") -> Figure:
    """How much of the right answer's probability suppression takes away, by model (paper eq. 11, figure 3).

    Args:
        evaluations: one, or several of different models or question sets.
        title: of the figure; by default it says how much.
        theme: "light" or "dark".

    Returns:
        A bar with its number for the paper's mean; below it a diamond for the mean with at least 0.01 under the fraction
        line, and a circle for the median.

    Raises:
        BadInput: no evaluation.
    """
    shown = listed(evaluations, "plot_probability_change")
    look = look_of(theme)
    labels = labels_of(shown)
    rows = list(range(len(shown)))
    values = {
        "mean (equation 11)": [100 * e.probability_change for e in shown],
        "floored mean": [100 * e.probability_change_floored for e in shown],
        "median": [100 * e.probability_change_median for e in shown],
    }
    means, *others = values.values()
    figure = Figure()
    figure.add_bar(
        orientation="h",
        y=[row - BESIDE for row in rows],
        x=means,
        name="mean (equation 11)",
        width=0.42,
        marker={"color": look.arms["suppressed"]},
        text=[f"{mean:.1f} %" if np.isfinite(mean) else "not known" for mean in means],
        textposition="outside",
        textfont={"size": TEXT_SIZE - 1, "color": look.ink},
        cliponaxis=False,
        customdata=labels,
        hovertemplate="%{customdata}<br>mean: %{x:.1f} %<extra></extra>",
    )
    for (name, of), symbol in zip(list(values.items())[1:], ("diamond", "circle"), strict=True):
        figure.add_scatter(
            x=of,
            y=[row + BELOW for row in rows],
            mode="markers",
            name=name,
            customdata=labels,
            marker={"size": 11, "symbol": symbol, "color": look.paper, "line": {"color": look.ink, "width": 2}},
            hovertemplate=f"%{{customdata}}<br>{name}: %{{x:.1f}} %<extra></extra>",
        )
    everything = [value for of in (means, *others) for value in of if np.isfinite(value)]
    low, high = min([0.0, *everything]), max([0.0, *everything])
    span = max(high - low, 1.0)
    lost = [f"{mean:.0f}".replace("-", "−") for mean in (min(means), max(means))]
    return finish(
        figure,
        title
        or (
            f"{labels[0]}: suppression {_takes(means[0])} of the right answer's probability"
            if len(shown) == 1
            else f"Suppression takes {lost[0]} % of the right answer's probability"
            if len(set(lost)) == 1
            else f"Suppression takes between {lost[0]} and {lost[1]} % of the right answer's probability"
        ),
        subtitle="Mean of (before − after) / before over questions and repetitions; above zero: the right answer loses.",
        theme=theme,
        height=(ROW + 20) * len(rows) + 16,
        legend=True,
        xaxis={
            "title": {"text": "probability lost (%)"},
            "range": [low - (0.14 if min(means) < 0 else 0.02) * span, high + 0.14 * span],
            "zeroline": True,
        },
        yaxis={
            "tickvals": rows,
            "ticktext": labels,
            "range": [len(rows) - 0.4, -0.6],
            "showgrid": False,
            "zeroline": False,
        },
    )


def plot_categories(
    evaluations: Several, *, least: int = 15, title: str | None = None, theme: Theme = "light"
) -> Figure:
    """In which categories questions are hurt: the share whose right answer loses probability (paper figure 4).

    Args:
        evaluations: one, or several of different models on the same questions.
        least: categories with fewer questions are not shown, and counted below the title (the paper: 15).
        title: of the figure; by default it says in how many categories most questions are hurt.
        theme: "light" or "dark".

    Returns:
        One row a category, the most hurt at the top: a bar for one model, a marker a model for several.

    Raises:
        BadInput: no evaluation.
    """
    shown = listed(evaluations, "plot_categories")
    look = look_of(theme)
    labels = labels_of(shown)
    frames = [e.by_category(least) for e in shown]
    shares: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for frame in frames:
        for row in frame.to_dict("records"):
            shares.setdefault(row["category"], []).append(row["share_hurt"])
            sizes[row["category"]] = row["n_questions"]
    mean = {c: float(np.mean(shares[c])) for c in sorted(shares, key=lambda c: (-float(np.mean(shares[c])), c))}
    place = {category: row for row, category in enumerate(mean)}
    figure = Figure()
    for series, (label, frame) in enumerate(zip(labels, frames, strict=True)):
        common = {
            "x": 100 * frame["share_hurt"].to_numpy(),
            "y": [place[category] for category in frame["category"]],
            "name": label,
            "customdata": [
                [name_of(str(c)), n, *_accuracies_of(row)]
                for c, n, row in zip(frame["category"], frame["n_questions"], frame.to_dict("records"), strict=True)
            ],
            "hovertemplate": ("" if len(shown) == 1 else f"{label}<br>")
            + "%{customdata[0]}: %{x:.1f} % of %{customdata[1]} questions hurt<br>"
            "accuracy %{customdata[2]:.1f} % untouched, %{customdata[3]:.1f} % suppressed<extra></extra>",
        }
        if len(shown) == 1:
            figure.add_bar(orientation="h", width=0.72, marker={"color": look.arms["suppressed"]}, **common)
        else:
            figure.add_scatter(
                mode="markers",
                marker={
                    "size": 10,
                    "color": look.series[series % len(look.series)],
                    "symbol": SYMBOLS[(series + series // len(look.series)) % len(SYMBOLS)],
                    "line": {"width": 1, "color": look.ink},
                },
                **common,
            )
    if len(mean):
        figure.add_vline(x=50, line={"color": look.soft, "dash": "dash", "width": 1.5})
    most = sum(share > 0.5 for share in mean.values())
    hidden = max(int(frame.attrs["hidden"]) for frame in frames)
    questions = max(int(frame.attrs["hidden_questions"]) for frame in frames)
    if not len(mean):
        say_nothing_to_show(figure, f"Every category has fewer than {least} questions.")
    return finish(
        figure,
        title
        or (
            f"Suppression hurts most questions in {most} of {len(mean)} categories"
            if len(mean)
            else f"No category has {least} questions or more"
        ),
        subtitle="Share of questions whose right answer loses probability, number of questions in brackets; dashed: one half."
        + (
            f" {hidden} {'category' if hidden == 1 else 'categories'} with fewer than {least} questions ({questions} "
            f"{plural('question', questions)} together) not shown."
            if hidden
            else ""
        ),
        theme=theme,
        height=max(ROW * len(mean), 80),
        legend=len(shown) > 1,
        xaxis={"title": {"text": "questions hurt (%)"}, "range": [0, 101], "zeroline": False, "visible": len(mean) > 0},
        yaxis={
            "tickvals": list(place.values()),
            "ticktext": [f"{name_of(str(c))} ({sizes[c]})" for c in place],
            "range": [max(len(mean), 1) - 0.4, -0.6],
            "visible": len(mean) > 0,
            "showgrid": False,
            "zeroline": False,
        },
    )


def plot_dose_response(frame: pd.DataFrame, *, title: str | None = None, theme: Theme = "light") -> Figure:
    """What happens between suppressing the neurons and doubling them (see `dose_response`).

    Args:
        frame: columns factor, arm, accuracy, order_averaged_accuracy, answer_mass and share_a.
        title: of the figure; by default it names both ends.
        theme: "light" or "dark".

    Returns:
        Accuracy over the factor, the found neurons beside matched random ones: thick lines order-averaged where every order
        was asked, thin dotted ones plain.

    Raises:
        BadInput: a column is missing, or there is no row of the found neurons.
    """
    needed = ("factor", "arm", "accuracy", "order_averaged_accuracy", "answer_mass", "share_a")
    if missing := [name for name in needed if name not in frame]:
        raise BadInput(
            f"plot_dose_response needs what dose_response(...) returns; the column {missing[0]!r} is missing"
        )
    if "suppressed" not in frame["arm"].tolist():
        raise BadInput("plot_dose_response needs rows of the arm 'suppressed', the found neurons; got none")
    look = look_of(theme)
    rows = sorted(frame.to_dict("records"), key=lambda row: row["factor"])
    averaged = all(row["order_averaged_accuracy"] == row["order_averaged_accuracy"] for row in rows)
    names = {"suppressed": "truth neurons", "random_matched": "random, matched by layer"}
    kinds = {"order_averaged_accuracy": (", order-averaged", "solid", 3, 9), "accuracy": (", plain", "dot", 2, 6)}
    if not averaged:
        kinds = {"accuracy": ("", "solid", 3, 9)}
    figure = Figure()
    for arm, symbol in (("suppressed", "circle"), ("random_matched", "square")):
        of = [row for row in rows if row["arm"] == arm]
        for column, (suffix, dash, width, size) in kinds.items() if of else ():
            figure.add_scatter(
                x=[row["factor"] for row in of],
                y=[row[column] for row in of],
                name=names[arm] + suffix,
                mode="lines+markers",
                line={
                    "color": look.arms["suppressed" if arm == "suppressed" else "baseline"],
                    "dash": dash,
                    "width": width,
                },
                marker={"symbol": symbol, "size": size},
                customdata=[[row["answer_mass"], row["share_a"]] for row in of],
                hovertemplate=f"{names[arm]}{suffix}<br>times %{{x:g}}: %{{y:.1f}} %<br>answer mass "
                "%{customdata[0]:.3f}, share of “A” %{customdata[1]:.2f}<extra></extra>",
            )
    figure.add_vline(x=1, line={"color": look.soft, "dash": "dash", "width": 1.5})
    column = next(iter(kinds))
    found = [row for row in rows if row["arm"] == "suppressed"]
    first, last = found[0], found[-1]
    kind = "Order-averaged accuracy" if averaged else "Accuracy"
    values = [row[name] for row in rows for name in kinds]
    low, high = min(values), max(values)
    return finish(
        figure,
        title
        or f"{kind} is {first[column]:.1f} % with the truth neurons times {first['factor']:g}, and {last[column]:.1f} % times "
        f"{last['factor']:g}",
        subtitle="Activations of the truth neurons, and of as many random ones in the same layers, times a factor; dashed: untouched.",
        theme=theme,
        height=320,
        legend=True,
        top=22 if averaged else 0,
        xaxis={"title": {"text": "factor on the neurons' activations"}, "zeroline": False},
        yaxis={
            "title": {"text": "accuracy (%)"},
            "range": [max(0.0, low - 5), min(101.0, high + 5)],
            "zeroline": False,
        },
    )


def _accuracies_of(row: dict) -> list[float]:
    return [float(row["baseline"]), float(row["suppressed"])]


def _takes(percent: float) -> str:
    return (
        f"takes {percent:.0f} %" if percent >= 0.5 else "takes nothing" if percent > -0.5 else f"adds {-percent:.0f} %"
    )
