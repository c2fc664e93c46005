"""Attribution of one prompt, and the errors of the scores: completeness and convergence."""

from __future__ import annotations

import numpy as np

from tn_lens.attribution.result import Attribution, Gaps, worst_gap
from tn_lens.core.errors import BadInput
from tn_lens.core.options import Theme
from tn_lens.core.sentences import count, percent, say_each
from tn_lens.figures.layout import QUIET, ROW, Figure, colour_bar, finish, layer_axis, panels
from tn_lens.figures.look import Look, look_of, name_of, short_site_name, site_name
from tn_lens.selection.convergence import ConvergenceCheck

SITE_ROW = 46
"""Height of a row of cells."""


def plot_attribution(
    scores: Attribution, prompt: int = 0, *, top: int = 10, title: str | None = None, theme: Theme = "light"
) -> Figure:
    """Scores of one prompt: the sum of D for each site and layer, and the neurons with the largest |D|.

    Args:
        scores: an attribution of one or several prompts.
        prompt: index of the prompt.
        top: number of neurons to show.
        title: title of the figure; by default it names the site and layer with the largest sum.
        theme: "light" or "dark".

    Returns:
        A heatmap of layers by sites, in which blue supports the right answer and orange the wrong one, and a bar per neuron
        below it.

    Raises:
        BadInput: there is no such prompt, or no neuron to show.
    """
    if not -len(scores) <= prompt < len(scores):
        raise BadInput(f"prompt must be the index of one of {count(len(scores), 'attributed prompt')}; got {prompt}")
    if top < 1:
        raise BadInput(f"top must be at least 1; got {top}")
    look = look_of(theme)
    shown = scores[prompt]
    # D of a site is [prompt, layer, neuron], and only one prompt is left
    sites = list(shown.difference)
    sums = np.stack([shown.difference[site][0].double().sum(-1).numpy() for site in sites])  # [site, layer]
    changes = np.stack([shown.change[site][0].double().numpy() for site in sites])  # [site, layer]
    strongest = _strongest(shown, top)
    figure, total = panels([SITE_ROW * len(sites), ROW * len(strongest)], gap=88)
    _add_sums(figure, sites, sums, changes)
    _add_strongest(figure, strongest, look)
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    place, layer = map(int, np.unravel_index(np.abs(sums).argmax(), sums.shape))
    text = name_of(shown.prompts[0].text, most=300)
    value, largest = float(sums[place, layer]), max(float(np.abs(sums).max()), 1e-12)  # plotly needs a range
    # the colour bar belongs to the upper panel only
    part = SITE_ROW * len(sites) / total
    bar = {**colour_bar("", ".2g"), "len": part, "y": 1 - part / 2, "nticks": 3}
    figure.update_layout(coloraxis={"colorscale": look.diverging, "cmin": -largest, "cmax": largest, "colorbar": bar})
    sentences = say_each("figures.attribution", short_site_name(sites[place]), layer, value, text)
    return finish(figure, sentences, title, theme, height=total)


def plot_completeness(completeness: Attribution | Gaps, *, title: str | None = None, theme: Theme = "light") -> Figure:
    """The completeness error: how far the scores of a site and layer are from summing to f(activation) - f(baseline).

    Args:
        completeness: an attribution, or a run's mean |gap| and mean |change| per site and layer.
        title: title of the figure; by default it gives the largest error, absolute and relative to the change at that layer.
        theme: "light" or "dark".

    Returns:
        Per site and layer a light bar for the mean |change| and a dark one for the mean |gap|, in probability.

    Raises:
        BadInput: there is nothing to draw.
    """
    means = completeness.mean_gaps() if isinstance(completeness, Attribution) else completeness
    if not any(by_name["change"] for by_name in means.values()):
        raise BadInput("plot_completeness needs a site and a layer; got none")
    look = look_of(theme)
    titles = [site_name(site) for site in means]
    figure, total = panels([130] * len(means), gap=56, shared_xaxes=True, subplot_titles=titles)
    for panel, (label, by_name) in enumerate(zip(titles, means.values(), strict=True)):
        _add_gaps(figure, by_name["gap"], by_name["change"], label, panel, look)
    n_layers = max(len(by_name["gap"]) for by_name in means.values())
    largest = max(max(by_name["change"]) for by_name in means.values())
    figure.share_axis(layer_axis(n_layers) | {"range": [-0.6, n_layers - 0.4]}, len(means))
    # one range for all sites, so that their bars are comparable
    figure.update_yaxes(title_text="mean, absolute", range=[0, 1.08 * (largest or 1)], nticks=4)
    figure.update_layout(barmode="overlay")
    worst = worst_gap(means)
    sentences = say_each("figures.completeness", short_site_name(worst.site), worst)
    return finish(figure, sentences, title, theme, height=total, top=26, legend=True)


def plot_convergence(check: ConvergenceCheck, *, title: str | None = None, theme: Theme = "light") -> Figure:
    """The error of a quadrature rule's scores by site, layer and number of steps, next to that of converged scores.

    Args:
        check: result of `convergence_check`.
        title: title of the figure; by default it names the site and layer with the largest error.
        theme: "light" or "dark".

    Returns:
        A heatmap of layers by numbers of steps for every site; the last row is the estimated error of the converged scores.
    """
    # [row, layer] by site: the largest error of any prompt
    errors = {
        site: np.concatenate([error.max(1), check.reference_error[site].max(0)[None]])
        for site, error in check.error.items()
    }
    n_layers = next(iter(errors.values())).shape[1]
    low, high = -6, max(0, int(np.ceil(np.log10(max(float(error.max()) for error in errors.values())))))
    rows = [*(f"m = {m}" for m in check.n_steps), "adaptive"]
    titles = [site_name(site) for site in errors]
    figure, total = panels([ROW * len(rows)] * len(errors), gap=48, shared_xaxes=True, subplot_titles=titles)
    for panel, (label, error) in enumerate(zip(titles, errors.values(), strict=True)):
        figure.add_cells(
            n_layers,
            z=np.log10(np.clip(error, 10.0**low, None)),
            x=list(range(n_layers)),
            y=rows,
            customdata=error,
            coloraxis="coloraxis",
            hovertemplate=f"{label}, layer %{{x}}, %{{y}}<br>%{{customdata:.1e}} of the largest score<extra></extra>",
            row=panel + 1,
            col=1,
        )
    figure.update_yaxes(autorange="reversed", type="category", **QUIET)
    figure.share_axis(layer_axis(n_layers), len(errors))
    powers = list(range(low, high + 1, 2))
    names = [("≤ " if power == low else "") + f"10<sup>{power}</sup>".replace("-", "−") for power in powers]
    bar = colour_bar("error / largest score") | {"tickvals": powers, "ticktext": names}
    figure.update_layout(coloraxis={"colorscale": look_of(theme).scale, "cmin": low, "cmax": high, "colorbar": bar})
    site, layer, worst = check.worst()
    sentences = say_each("figures.convergence", check, short_site_name(site), layer, worst)
    return finish(figure, sentences, title, theme, height=total, top=24)


def _add_sums(figure: Figure, sites: list[str], sums: np.ndarray, changes: np.ndarray) -> None:
    """The heatmap of the upper panel."""
    n_layers = sums.shape[1]
    figure.add_cells(
        n_layers,
        z=sums,
        x=list(range(n_layers)),
        y=[site_name(site) for site in sites],
        customdata=changes,
        coloraxis="coloraxis",
        hovertemplate="%{y}, layer %{x}<br>sum of D %{z:.4f}, f(activation) − f(baseline) %{customdata:.4f}<extra></extra>",
        row=1,
        col=1,
    )
    figure.update_xaxes(layer_axis(n_layers), **QUIET, row=1, col=1)


def _add_strongest(figure: Figure, strongest: list[tuple[str, float]], look: Look) -> None:
    """The bars of the lower panel."""
    figure.add_bar(
        orientation="h",
        x=[value for _, value in strongest],
        y=[name for name, _ in strongest],
        width=0.7,
        marker={"color": [look.diverging[3 if value > 0 else 1][1] for _, value in strongest]},
        hovertemplate="%{y}: D = %{x:.5f}<extra></extra>",
        row=2,
        col=1,
    )
    figure.update_xaxes(title_text="D (probability)", zeroline=True, row=2, col=1)


def _strongest(scores: Attribution, top: int) -> list[tuple[str, float]]:
    """The neurons with the largest |D| of a single prompt, the most supporting first."""
    pairs = []
    for site, by_layer in scores.difference.items():
        flat = by_layer[0].flatten()  # [layer * neuron]
        places = flat.abs().topk(min(top, flat.numel())).indices
        pairs += zip(map(str, scores.space.at({site: places})), flat[places].tolist(), strict=True)
    # the largest of all sites are among the largest of each site
    largest = sorted(pairs, key=lambda pair: -abs(pair[1]))[:top]
    return sorted(largest, key=lambda pair: -pair[1])


def _add_gaps(figure: Figure, gaps: list[float], changes: list[float], label: str, panel: int, look: Look) -> None:
    """The bars of one site."""
    # the relative error is undefined without a change
    fractions = [percent(gap / change) if change else "–" for gap, change in zip(gaps, changes, strict=True)]
    for name, values, condition, width, remark in (
        ("change", changes, "random", 0.8, ""),
        ("completeness error", gaps, "ablated", 0.5, ", %{customdata} of the change there"),
    ):
        figure.add_bar(
            x=list(range(len(values))),
            y=values,
            name=name,
            legendgroup=name,
            showlegend=panel == 0,
            width=width,  # the error is drawn within the bar of the change
            marker={"color": look.conditions[condition]},
            customdata=fractions,
            hovertemplate=f"{label}, layer %{{x}}<br>{name} %{{y:.4f}}{remark}<extra></extra>",
            row=panel + 1,
            col=1,
        )
