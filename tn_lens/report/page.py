"""A run as one self-contained HTML page, structured like a short paper; the same run gives the same bytes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from itertools import combinations
from typing import Any

import numpy as np
from markupsafe import Markup

from tn_lens.attribution.quadrature import RULES
from tn_lens.attribution.result import worst_gap
from tn_lens.core.options import Theme
from tn_lens.core.sentences import environment, say, say_each
from tn_lens.core.settings import Settings, default_memory
from tn_lens.evaluation.condition import condition_label
from tn_lens.evaluation.diagnosis import CASES, VERDICTS
from tn_lens.evaluation.reference import PAPER
from tn_lens.evaluation.tables import table2
from tn_lens.figures import (
    Figure,
    get_plotlyjs,
    plot_accuracies,
    plot_candidates,
    plot_categories,
    plot_completeness,
    plot_convergence,
    plot_damage,
    plot_layers,
    plot_probability_change,
)
from tn_lens.figures.layout import write_in_cells
from tn_lens.figures.look import LOOKS
from tn_lens.neurons import SITES
from tn_lens.results.comparison import RunComparison
from tn_lens.results.found import TruthNeurons, settings_of
from tn_lens.selection.significance import LEVEL

N_ROWS = 1000
"""Maximum number of neurons in the page's table."""


def write_report(found: TruthNeurons) -> str:
    """Return the page of a run as a string; it works offline, and all text from users is escaped.

    Args:
        found: result of `find_truth_neurons` or `load_run`; each of its cards is shown below its neuron's row.
    """
    evaluation, settings, worst = found.evaluation, found.provenance.settings, worst_gap(found.completeness)
    others = found.elsewhere
    names = [str(neuron) for neuron in found.selection.by_strength]
    return page(
        "report.html.j2",
        figures_of(found),
        title=f"Truth neurons of {found.model_name}",
        found=found,
        abstract=say_each("run.abstract", found),
        cautions=say_each("run.cautions", found, worst, SITES[worst.site].label),
        asked=say("run.order", found),
        method=say("run.method", found, RULES),
        unseen=None if found.unseen is None else say("run.unseen", found.unseen),
        seeds=say_each("run.seeds", settings),
        command=command(found),
        python_call=python_call(found),
        label=lambda name: condition_label(name, evaluation.intervention),
        paper=PAPER.get(evaluation.model_name) if evaluation.name == "truthfulqa" else None,
        bias=say("evaluation.bias", found.evaluation) if found.evaluation.prompts.labels else "",
        welch=say("evaluation.welch_legend", evaluation.welch_p, LEVEL) if found.neurons else "",
        level=LEVEL,
        table2=table2([evaluation, *others]) if others and found.neurons else None,
        others=others,
        rows=dict(list(zip(names, found.records(), strict=True))[:N_ROWS]),
        cards={str(card.neuron): Markup(card.to_html()) for card in found.cards},
        n_hidden=max(0, len(names) - N_ROWS),
        verdicts=VERDICTS,
        cases=CASES,
        settings=settings,
        manifest=json.dumps(
            {key: value for key, value in settings.items() if key != "rendered_prompt"}, indent=1, ensure_ascii=False
        ),
    )


def write_comparison(comparison: RunComparison) -> str:
    """Return the page that compares several runs as a string; see `write_report`."""
    figures = {
        "layers": comparison.plot_layers(),
        "overlap": comparison.plot_overlap(),
        "accuracies": comparison.plot_accuracies(),
        "change": plot_probability_change(comparison.evaluations),
    }
    if len(comparison.sets) == 1:
        figures["categories"] = plot_categories(comparison.evaluations)
    pairs = zip(combinations(comparison.runs.items(), 2), comparison.pairs(comparison.jaccard), strict=True)
    shared = [
        {
            "names": f"{name} and {other_name}",
            "both": len(run.neurons & other.neurons),
            "either": len(run.neurons | other.neurons),
            "jaccard": jaccard,
        }
        for ((name, run), (other_name, other)), jaccard in pairs
        # NaN for runs of different models, which have no neurons in common
        if not np.isnan(jaccard)
    ]
    frame = comparison.to_frame()
    return page(
        "compare.html.j2",
        figures,
        title=f"Truth neurons of {comparison.what}",
        comparison=comparison,
        rows=frame.to_dict("records"),
        has_thirds="first_third" in frame,
        shared=shared,
        tables1=comparison.tables1(),
        table2=comparison.table2(),
        means=comparison.means().to_dict("records"),
        commands={name: command(run) or python_call(run) for name, run in comparison.runs.items()},
    )


def page(template: str, figures: Mapping[str, Figure], **context: Any) -> str:
    """Render a template with its figures, for light and dark backgrounds."""
    templates = environment("templates", is_html=True)
    templates.filters |= {"hundred": _hundred, "number": _number, "power": _power}
    drawn = {
        name: {"light": (bare := figure.bare()), "dark": in_dark(bare, figure)} for name, figure in figures.items()
    }
    return templates.get_template(template).render(
        plotly_js=Markup(get_plotlyjs()), figures=figures, figures_json=Markup(_in_script(drawn)), **context
    )


def figures_of(found: TruthNeurons) -> dict[str, Figure]:
    """The figures of the page by name; if no neurons were found, only those that have something to show."""
    evaluation = found.evaluation
    several = [evaluation, *found.elsewhere]
    figures: dict[str, Figure] = {}
    if found.selection.candidates:
        figures["candidates"] = plot_candidates(found.selection)
    if found.neurons:
        figures["accuracies"] = plot_accuracies(evaluation)
        figures["change"] = plot_probability_change(several)
        figures["layers"] = plot_layers({found.model_name: found.selection})
        if len(evaluation.by_category()):
            figures["categories"] = plot_categories(evaluation)
        if len(several) > 1:
            figures["elsewhere"] = plot_accuracies(several)
    if found.damage is not None:
        figures["damage"] = plot_damage(found.damage)
    if any(gaps["change"] for gaps in found.completeness.values()):
        figures["completeness"] = plot_completeness(found.completeness)
    if found.convergence_check is not None:
        figures["convergence"] = plot_convergence(found.convergence_check)
    return figures


def command(found: TruthNeurons) -> str:
    """The command line that started the run, with its number of threads; empty if it was started from Python."""
    words, n_threads = found.provenance.command, found.provenance.settings["n_threads"]
    return f"OMP_NUM_THREADS={n_threads} {shlex.join(words)}" if words else ""


def python_call(found: TruthNeurons) -> str:
    """The call in Python that repeats the run, with every setting that differs from its default."""
    stored, source = found.provenance.settings, found.provenance.model_source
    loading = [repr(source.get("model") or found.model_name)]
    loading += [f"{name}={source[name]!r}" for name in ("dtype", "revision", "backend") if source.get(name)]
    # the defaults of these settings depend on the device and on the model
    default = {f.name: f.default for f in fields(Settings)} | {"max_memory": default_memory(stored["device"])}
    default["engine"] = "shared_prefix"
    values = vars(settings_of(stored))
    given = ", ".join(f"{name}={value!r}" for name, value in values.items() if value != default[name])
    return (
        "import tn_lens as tn\n\n"
        f"model = tn.load_model({', '.join(loading)})\n"
        f"questions = tn.load_questions({found.provenance.questions_source or found.questions_name!r})\n"
        f"settings = tn.Settings({given})\n"
        f'found = tn.find_truth_neurons(model, questions, settings, out="runs/again", threads={stored["n_threads"]})\n'
    )


def in_dark(bare: Mapping[str, Any], figure: Figure) -> dict[str, Any]:
    """Data and layout of a figure in the colours of the dark theme, so that it is drawn only once.

    Args:
        bare: data and layout in the colours of the light theme, from `figure.bare()`.
        figure: the same figure.
    """
    dark = _recoloured(bare)
    heatmap, *others = figure.traces
    if heatmap.type == "heatmap" and others and others[0].type == "scatter":
        # whether a cell needs light or dark text depends on its colour, so the colours of the text are computed again
        cells = Figure(data=[heatmap])
        write_in_cells(cells, np.reshape(others[0].text, np.shape(heatmap.z)).tolist(), "dark")
        dark["data"][1]["textfont"]["color"] = list(cells.traces[1].textfont.color)
    return dark


def _recoloured(value: Any, key: str = "") -> Any:
    """Replace the colours of the light theme by those of the dark theme, in all options whose name ends with "color"."""
    match value:
        case Mapping():
            return {name: _recoloured(inner, name) for name, inner in value.items()}
        case list() if key == "colorscale":
            return [list(stop) for stop in DARK_SCALES[tuple((stop, colour) for stop, colour in value)]]
        case list():
            return [_recoloured(inner, key) for inner in value]
        case str() if key.endswith("color"):
            return DARK.get(value, value)
        case _:
            return value


def _colours(theme: Theme) -> list[str]:
    look = LOOKS[theme]
    return [look.paper, look.ink, look.soft, look.line, *look.sites.values(), *look.conditions.values(), *look.series]


DARK: Mapping[str, str] = dict(zip(_colours("light"), _colours("dark"), strict=True))
"""Colour of the light theme -> the corresponding colour of the dark theme."""
DARK_SCALES = {LOOKS["light"].scale: LOOKS["dark"].scale, LOOKS["light"].diverging: LOOKS["dark"].diverging}
"""Colour scale of the light theme -> the corresponding colour scale of the dark theme."""


def _in_script(payload: Any) -> str:
    """JSON that is safe inside a script element."""
    # "</script>" inside a string would end the element
    text = json.dumps(payload, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hundred(value: float | None, digits: int = 1) -> str:
    """A fraction in percent, without the sign; a dash for NaN."""
    return _number(None if value is None else 100 * value, digits)


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def _power(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}e}"
