"""Accuracy under every condition: table 1 of the paper as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from tn_lens.core.errors import BadInput
from tn_lens.core.options import Theme
from tn_lens.core.sentences import percent, say_each
from tn_lens.evaluation.condition import ConditionResult, condition_label
from tn_lens.evaluation.result import Evaluation
from tn_lens.figures.layout import QUIET, ROW, TEXT_SIZE, Figure, finish
from tn_lens.figures.look import Look, look_of, name_of, plain
from tn_lens.selection.significance import LEVEL

Several: TypeAlias = Evaluation | Sequence[Evaluation]


class Bar(NamedTuple):
    """One condition of one evaluation, and the row in which it is drawn."""

    row: int
    condition: str
    label: str
    whose: str
    """The model or question set, which distinguishes several evaluations."""
    evaluation: Evaluation

    @property
    def result(self) -> ConditionResult:
        """Accuracies under this condition."""
        return self.evaluation.conditions[self.condition]


def plot_accuracies(
    evaluations: Several, *, noun: str | None = None, title: str | None = None, theme: Theme = "light"
) -> Figure:
    """Accuracy under every condition, with single repetitions as points (the paper's table 1 as a figure).

    Args:
        evaluations: one evaluation, or several of different models or question sets.
        noun: what several evaluations are called in the default title, for example "runs".
        title: title of the figure; by default it gives the effect of the ablation.
        theme: "light" or "dark".

    Returns:
        A bar per condition with the standard deviation over repetitions, a point per repetition, a diamond for the
        order-averaged accuracy if every order was asked, and a dashed line at chance if it is equal for all sets.

    Raises:
        BadInput: there is no evaluation.
    """
    shown = listed(evaluations, "plot_accuracies")
    look = look_of(theme)
    groups = _groups(shown)
    bars = [bar for group in groups for bar in group]
    is_single = len(shown) == 1
    figure = Figure()
    for place, condition in enumerate(dict.fromkeys(bar.condition for bar in bars)):
        _add_bars(figure, [bar for bar in bars if bar.condition == condition], look.condition(condition, place), look)
    _add_repetitions(figure, bars, look)
    averaged = [bar for bar in bars if bar.result.is_complete and bar.evaluation.n_orders > 1]
    _add_order_averages(figure, averaged, look)
    # chance is drawn only if all sets have the same number of choices
    n_choices = {len(e.conditions["unablated"].shares) for e in shown}
    if len(n_choices) == 1:
        figure.add_vline(x=100 / min(n_choices), line=look.dashed)  # chance
    if is_single:
        axis = {"tickvals": [bar.row for bar in bars], "ticktext": [bar.label for bar in bars]}
    else:
        # the name of an evaluation is next to the middle of its bars
        middles = [float(np.mean([bar.row for bar in group])) for group in groups]
        axis = {"tickvals": middles, "ticktext": labels_of(shown)}
    # a single evaluation has the names of its conditions at the axis
    figure.update_traces(showlegend=not is_single, selector={"type": "bar"})
    has_repetitions = any(e.n_repetitions > 1 for e in shown)
    last = bars[-1].row + 0.6
    figure.update_layout(barmode="overlay")
    # with room for the numbers at the right
    figure.update_xaxes(title_text="accuracy (%)", range=[0, 118], tickvals=[0, 25, 50, 75, 100], zeroline=False)
    figure.update_yaxes(axis, range=[last, -0.6], **QUIET)
    legend = say_each("figures.accuracies_legend", has_repetitions, averaged, len(n_choices) == 1)
    height = round((ROW + 8 if is_single else 20) * (last + 0.6))
    return finish(figure, [*_title(shown, noun), *legend], title, theme, height=height, legend=not is_single)


def listed(evaluations: Several, name: str) -> list[Evaluation]:
    """One evaluation or several as a list, for the figure function of this name.

    Raises:
        BadInput: there is no evaluation.
    """
    shown = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
    if not shown:
        raise BadInput(f"{name} needs an evaluation; got none")
    return shown


def labels_of(shown: Sequence[Evaluation]) -> list[str]:
    """What distinguishes the evaluations: the model, the question set, or both."""
    models, sets = {e.model_name for e in shown}, {e.name for e in shown}
    if len(sets) == 1 or len(models) == len(shown):
        return [name_of(e.model_name or "model") for e in shown]
    if len(models) == 1:
        return [name_of(e.name) for e in shown]
    return [f"{name_of(e.model_name or 'model')}, {name_of(e.name)}" for e in shown]


def _groups(shown: Sequence[Evaluation]) -> list[list[Bar]]:
    """The bars of each evaluation."""
    # evaluations with different interventions share labels, which are therefore neutral
    interventions = {e.intervention for e in shown}
    intervention = min(interventions) if len(interventions) == 1 else "changed"
    groups, first = [], 0
    for evaluation, whose in zip(shown, labels_of(shown), strict=True):
        labels = {name: plain(condition_label(name, intervention)) for name in evaluation.conditions}
        groups.append([Bar(row, *names, whose, evaluation) for row, names in enumerate(labels.items(), first)])
        first += len(labels) + 1  # an empty row between evaluations
    return groups


def _add_bars(figure: Figure, bars: Sequence[Bar], colour: str, look: Look) -> None:
    """The bars of one condition, and the numbers to their right."""
    rows, label = [bar.row for bar in bars], bars[0].label
    results = [bar.result for bar in bars]
    means, stds = [100 * result.accuracy for result in results], [100 * result.accuracy_std for result in results]
    figure.add_bar(
        orientation="h",
        y=rows,
        x=means,
        name=label,
        width=0.82,
        marker={"color": colour},
        error_x={"type": "data", "array": stds, "color": look.ink, "thickness": 1.4, "width": 4},
        customdata=[
            [bar.whose, std, _hover_labels(bar), result.answer_mass]
            for bar, result, std in zip(bars, results, stds, strict=True)
        ],
        hovertemplate=f"%{{customdata[0]}}<br>{label}: %{{x:.2f}} ± %{{customdata[1]:.2f}} %<br>"
        "%{customdata[2]}answer mass %{customdata[3]:.3f}<extra></extra>",
    )
    figure.add_text(
        x=[104] * len(bars),  # right of the longest possible bar
        y=rows,
        text=[
            f"{mean:.1f} ± {std:.1f}" if bar.evaluation.n_repetitions > 1 else f"{mean:.1f}"
            for bar, mean, std in zip(bars, means, stds, strict=True)
        ],
        textposition="middle right",
        size=TEXT_SIZE - 2,
        color=look.ink if bars[0].condition == "ablated" else look.soft,
    )


def _hover_labels(bar: Bar) -> str:
    """The part of a bar's hover text about labels and orders; empty for answers without labels."""
    if not bar.evaluation.prompts.labels:
        return ""
    average, first = percent(bar.result.order_averaged_accuracy, 2), plain(bar.evaluation.prompts.first_label)
    return f"order-averaged {average}<br>fraction of “{first}” {bar.result.share_a:.2f}, "


def _add_repetitions(figure: Figure, bars: Sequence[Bar], look: Look) -> None:
    """A point for each repetition, side by side within the height of the bar."""
    points = []
    for bar in bars:
        accuracies = 100 * bar.result.accuracies  # [repetition]
        # [repetition]: points are spread within the bar, since equal accuracies would overlap
        offsets = np.linspace(-0.24, 0.24, len(accuracies)) if len(accuracies) > 1 else np.zeros(1)
        for repetition, (accuracy, offset) in enumerate(zip(accuracies.tolist(), offsets.tolist(), strict=True)):
            points.append((accuracy, bar.row + offset, [repetition, bar.label]))
    x, y, customdata = map(list, zip(*points, strict=True))
    figure.add_points(
        x=x,
        y=y,
        customdata=customdata,
        name="one repetition",
        marker=look.hollow(5, width=1),
        hovertemplate="%{customdata[1]}, repetition %{customdata[0]}: %{x:.2f} %<extra></extra>",
    )


def _add_order_averages(figure: Figure, bars: Sequence[Bar], look: Look) -> None:
    if bars:
        figure.add_points(
            x=[100 * bar.result.order_averaged_accuracy for bar in bars],
            y=[bar.row for bar in bars],
            customdata=[bar.label for bar in bars],
            name="order-averaged",
            marker=look.hollow(11, "diamond"),
            hovertemplate="%{customdata}, order-averaged: %{x:.2f} %<extra></extra>",
        )


def _title(shown: Sequence[Evaluation], noun: str | None) -> list[str]:
    if len(shown) == 1:
        (e,) = shown
        names = (name_of(e.model_name or "The model"), plain(e.name), plain(e.intervention))
        return say_each("figures.accuracies_of_one", e, *names)
    n_models, n_sets = len({e.model_name for e in shown}), len({e.name for e in shown})
    return say_each("figures.accuracies_of_several", shown, n_models, n_sets, LEVEL, noun)
