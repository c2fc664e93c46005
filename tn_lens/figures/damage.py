"""The loss on plain text with found neurons ablated."""

from __future__ import annotations

from tn_lens.core.errors import BadInput
from tn_lens.core.options import Theme
from tn_lens.core.sentences import say_each
from tn_lens.evaluation.condition import HEADINGS
from tn_lens.evaluation.damage import WHOLE, Damage
from tn_lens.figures.layout import QUIET, ROW, Figure, finish
from tn_lens.figures.look import look_of

MOST_PLACES = 12
"""Maximum number of sites and layers, those with the largest rise."""
MARKERS = {"random_matched": "square", "top_activation": "diamond"}


def plot_damage(damage: Damage, *, title: str | None = None, theme: Theme = "light") -> Figure:
    """The rise of the loss on plain text with the found neurons ablated, all and by site and layer (see `measure_damage`).

    Args:
        damage: the measurements.
        title: title of the figure; by default it compares the found neurons with the controls.
        theme: "light" or "dark".

    Returns:
        A bar for the found neurons of every row, a marker for each control, and a dashed line at the bound. The second row has
        the found neurons without the damage neurons.

    Raises:
        BadInput: no neurons were ablated.
    """
    if not damage.rows:
        raise BadInput("plot_damage needs measurements with neurons ablated; got none")
    look = look_of(theme)
    n_of = {row.part: row.n_neurons for row in damage.rows if row.condition == "ablated"}
    parts = [WHOLE, *(row.part for row in damage.places[:MOST_PLACES])]
    names = [f"all {n_of[WHOLE]}", *(f"{part} ({n_of[part]})" for part in parts[1:])]
    rises = [damage.rise(part) for part in parts]
    if damage.neurons:
        names.insert(1, f"without damage neurons ({damage.n_others})")
        parts.insert(1, "")
        rises.insert(1, damage.rest_loss - damage.text_loss)
    rows = list(range(len(parts)))
    figure = Figure()
    figure.add_bar(
        orientation="h",
        y=rows,
        x=rises,
        name="found neurons",
        width=0.6,
        marker={"color": look.conditions["ablated"]},
        customdata=names,
        hovertemplate="%{customdata}<br>found neurons: %{x:.4f} nats per token<extra></extra>",
    )
    for control in damage.controls:
        name = f"{HEADINGS[control]} neurons"
        figure.add_points(
            x=[damage.rise(part, control) for part in parts],
            y=rows,
            name=name,
            customdata=names,
            marker={**look.hollow(9, MARKERS[control]), "color": look.conditions[control]},
            hovertemplate=f"%{{customdata}}<br>{name}: %{{x:.4f}} nats per token<extra></extra>",
        )
    figure.add_vline(x=damage.bound, line=look.dashed)
    figure.update_xaxes(title_text="rise of the loss (nats per token)", zeroline=True)
    figure.update_yaxes(tickvals=rows, ticktext=names, range=[len(rows) - 0.4, -0.6], **QUIET)
    sentences = say_each("figures.damage", damage, len(damage.places) > MOST_PLACES)
    return finish(figure, sentences, title, theme, height=ROW * len(rows) + 16, legend=True)
