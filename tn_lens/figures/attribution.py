"""One question under the lens, and how well the integral was met."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tn_lens.attribution import Attribution
from tn_lens.attribution.result import WorstGap, worst_gap
from tn_lens.core.errors import BadInput
from tn_lens.figures.look import ROW, SITE_NAMES, Figure, Theme, colour_bar, finish, look_of, panels, plain, tick_step

LONGEST_PROMPT = 300


def plot_attribution(
    scores: Attribution, prompt: int = 0, *, top: int = 10, title: str | None = None, theme: Theme = "light"
) -> Figure:
    """What moves one prompt's answer: the sum of D in every layer and site, and the neurons with the largest D by name.

    Args:
        scores: of some prompts.
        prompt: which of them, by its place.
        top: how many neurons to name.
        title: of the figure; by default it names the strongest layer.
        theme: "light" or "dark".

    Returns:
        Above a heatmap, layers by sites: blue supports the right answer, orange the wrong one. Below a bar a neuron.

    Raises:
        BadInput: there is no such prompt, or no neuron to name.
    """
    if not -len(scores) <= prompt < len(scores):
        raise BadInput(f"there is no prompt {prompt}: {len(scores)} were attributed")
    if top < 1:
        raise BadInput(f"top must be at least 1; got {top}")
    look = look_of(theme)
    one = scores[prompt]
    sites = list(one.difference)
    sums = np.stack([one.difference[site][0].double().sum(-1).numpy() for site in sites])
    changes = np.stack([one.change[site][0].double().numpy() for site in sites])
    n_layers = sums.shape[1]
    named = _strongest(one, top)
    figure, total = panels([46 * len(sites), ROW * len(named)], gap=88)
    largest = max(float(np.abs(sums).max()), 1e-12)
    figure.add_heatmap(
        z=sums,
        x=list(range(n_layers)),
        y=[SITE_NAMES.get(site, site) for site in sites],
        customdata=changes,
        coloraxis="coloraxis",
        xgap=2 if n_layers <= 32 else 1,
        ygap=2,
        hovertemplate="%{y}, layer %{x}<br>sum of D %{z:.4f}, change to account for %{customdata:.4f}<extra></extra>",
        row=1,
        col=1,
    )
    values = [value for _, value in named]
    figure.add_bar(
        orientation="h",
        x=values,
        y=[name for name, _ in named],
        width=0.7,
        marker={"color": [look.diverging[3 if value > 0 else 1][1] for value in values]},
        hovertemplate="%{y}: D = %{x:.5f}<extra></extra>",
        row=2,
        col=1,
    )
    figure.update_xaxes(
        {"title": {"text": "layer"}, "tickmode": "linear", "tick0": 0, "dtick": tick_step(n_layers), "showgrid": False},
        zeroline=False,
        row=1,
        col=1,
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category", row=1, col=1)
    figure.update_xaxes(title={"text": "D (probability)"}, zeroline=True, row=2, col=1)
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category", row=2, col=1)
    site, layer = np.unravel_index(np.abs(sums).argmax(), sums.shape)
    side = "right" if sums[site, layer] > 0 else "wrong"
    text = one.prompts[0].text
    text = text if len(text) <= LONGEST_PROMPT else text[: LONGEST_PROMPT - 1] + "…"
    spacing = 46 * len(sites) / total
    return finish(
        figure,
        title
        or f"{SITE_NAMES.get(sites[site], sites[site]).split()[0]} of layer {layer} pushes most, to the {side} answer "
        f"({sums[site, layer]:+.3f})".replace("-", "−"),
        subtitle=plain(text),
        theme=theme,
        height=total,
        coloraxis={
            "colorscale": look.diverging,
            "cmin": -largest,
            "cmax": largest,
            "colorbar": {**colour_bar("", ".2g"), "len": spacing, "y": 1 - spacing / 2, "nticks": 3},
        },
    )


def plot_completeness(
    completeness: Attribution | Mapping[str, Mapping[str, list[float]]],
    *,
    title: str | None = None,
    theme: Theme = "light",
) -> Figure:
    """How well the scores of a site and layer sum to what they should: f(activation) - f(baseline).

    Args:
        completeness: an attribution, or a run's mean |gap| and mean |change| per site and layer.
        title: of the figure; by default it gives the largest gap, and the share of that layer's own change that it is.
        theme: "light" or "dark".

    Returns:
        Per site and layer a light bar for the mean |change| and a dark one for the mean |gap|, in probability.

    Raises:
        BadInput: there is nothing to draw.
    """
    held = completeness.mean_gaps() if isinstance(completeness, Attribution) else completeness
    if not any(of["change"] for of in held.values()):
        raise BadInput("plot_completeness needs a site and a layer; got none")
    look = look_of(theme)
    sites = list(held)
    figure, total = panels(
        [130] * len(sites), gap=56, shared_xaxes=True, subplot_titles=[SITE_NAMES.get(site, site) for site in sites]
    )
    largest = max(max(of["change"]) for of in held.values())
    for panel, (site, of) in enumerate(held.items()):
        layers = list(range(len(of["gap"])))
        shares = [
            f"{100 * gap / change:.1f} %" if change else "–"
            for gap, change in zip(of["gap"], of["change"], strict=True)
        ]
        for name, values, colour in (
            ("change to account for", of["change"], look.arms["random"]),
            ("gap", of["gap"], look.arms["suppressed"]),
        ):
            figure.add_bar(
                x=layers,
                y=values,
                name=name,
                legendgroup=name,
                showlegend=panel == 0,
                width=0.8 if name != "gap" else 0.5,
                marker={"color": colour},
                customdata=shares,
                hovertemplate=f"{SITE_NAMES.get(site, site)}, layer %{{x}}<br>{name} %{{y:.4f}}"
                + (", %{customdata} of the change there" if name == "gap" else "")
                + "<extra></extra>",
                row=panel + 1,
                col=1,
            )
    n_layers = max(len(of["gap"]) for of in held.values())
    figure.update_xaxes(
        tickmode="linear",
        tick0=0,
        dtick=tick_step(n_layers),
        range=[-0.6, n_layers - 0.4],
        showgrid=False,
        zeroline=False,
    )
    figure.update_xaxes(title={"text": "layer"}, row=len(sites), col=1)
    figure.update_yaxes(title={"text": "mean, absolute"}, range=[0, 1.08 * (largest or 1)], nticks=4)
    figure.update_annotations(x=0, xanchor="left")
    worst = worst_gap(held)
    return finish(
        figure,
        title or f"The scores miss their sum most in {say_worst(worst)}",
        subtitle="Completeness: the scores of a site and layer should sum to f(activation) − f(baseline); means over prompts.",
        theme=theme,
        height=total,
        top=26,
        legend=True,
        barmode="overlay",
    )


def _strongest(one: Attribution, top: int) -> list[tuple[str, float]]:
    """The neurons with the largest |D| of a single prompt, the most supporting first."""
    found = []
    for site, scores in one.difference.items():
        flat = scores[0].flatten()
        width = one.space.width(site)
        for place in flat.abs().topk(min(top, flat.numel())).indices.tolist():
            found.append((str(one.space.neuron(site, *divmod(place, width))), float(flat[place])))
    largest = sorted(found, key=lambda pair: -abs(pair[1]))[:top]
    return sorted(largest, key=lambda pair: -pair[1])


def say_worst(worst: WorstGap) -> str:
    """Where the scores miss their sum most, and by how much."""
    return f"{SITE_NAMES.get(worst.site, worst.site).split()[0]}, layer {worst.layer}: {worst.summary()}"
