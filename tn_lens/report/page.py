"""A run -> one self-contained HTML page that reads like a short paper; the same bytes for the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tn_lens.core.wording import plural
from tn_lens.evaluation import ARM_NAMES, ARMS, StoredEvaluation, table2
from tn_lens.evaluation.diagnosis import CASES, VERDICTS
from tn_lens.evaluation.reference import PAPER
from tn_lens.figures import (
    Figure,
    Theme,
    plot_accuracies,
    plot_candidates,
    plot_categories,
    plot_completeness,
    plot_layers,
    plot_probability_change,
    plotly_js,
)
from tn_lens.neurons.neuron import Neuron
from tn_lens.report import prose
from tn_lens.results import Card
from tn_lens.results.comparison import RunComparison
from tn_lens.results.run import Run
from tn_lens.selection.significance import LEVEL, welch_legend

N_ROWS = 1000
"""Neurons in the page's table."""
THEMES: tuple[Theme, ...] = ("light", "dark")


def write_report(run: Run, cards: Sequence[Card] = ()) -> str:
    """The page as text. Works offline; whatever questions or models are called is escaped.

    Args:
        run: from `load_run`.
        cards: of some of its neurons; each stands below its neuron's row.
    """
    shown = {str(card.neuron): Markup(card.to_html()) for card in cards}
    rows = [{**record, "name": str(Neuron.from_dict(record))} for record in run.records[:N_ROWS]]
    settings = {key: value for key, value in run.settings.items() if key != "rendered_prompt"}
    return page(
        "report.html.j2",
        figures_of(run),
        title=f"Truth neurons of {run.model_name}",
        run=run,
        check=run.checks["manipulation"],
        abstract=prose.abstract(run),
        cautions=prose.cautions(run),
        command=prose.command(run),
        python_call=prose.python_call(run),
        seeds=prose.seeds(run),
        conditions=conditions(run.evaluation),
        welch=f"{welch_legend(run.evaluation.welch_p)}." if run.neurons else "",
        level=LEVEL,
        table2=table2([run.evaluation, *others_of(run)]) if others_of(run) and run.neurons else None,
        others=others_of(run),
        rows=rows,
        cards=shown,
        n_hidden=max(0, len(run.records) - N_ROWS),
        verdicts=VERDICTS,
        cases=CASES,
        manifest=json.dumps(settings, indent=1, ensure_ascii=False),
        prompt=run.settings["rendered_prompt"],
    )


def write_comparison(comparison: RunComparison) -> str:
    """The page about several runs as text; see `write_report`."""
    runs = list(comparison.runs.values())
    names = list(comparison.runs)
    figures: dict[str, dict[Theme, Figure]] = {}
    for theme in THEMES:
        drawn = {"layers": comparison.plot_layers(theme), "overlap": comparison.plot_overlap(theme)}
        evaluations = comparison.evaluations
        drawn["accuracies"] = comparison.plot_accuracies(theme)
        drawn["change"] = plot_probability_change(evaluations, theme=theme)
        if len(comparison.sets) == 1:
            drawn["categories"] = plot_categories(evaluations, theme=theme)
        for name, figure in drawn.items():
            figures.setdefault(name, {})[theme] = figure
    shared = [
        {
            "names": f"{names[i]} and {names[j]}",
            "both": len(runs[i].neurons & runs[j].neurons),
            "either": len(runs[i].neurons | runs[j].neurons),
            "jaccard": comparison.jaccard[i, j],
        }
        for i in range(len(runs))
        for j in range(i + 1, len(runs))
        if comparison.jaccard[i, j] == comparison.jaccard[i, j]
    ]
    return page(
        "compare.html.j2",
        figures,
        title=f"Truth neurons of {comparison.what}",
        comparison=comparison,
        rows=[
            row | {"t": run.selection.t}
            for row, run in zip(comparison.to_frame().to_dict("records"), runs, strict=True)
        ],
        has_thirds="first_third" in comparison.to_frame(),
        shared=shared,
        tables1=comparison.tables1(),
        sets=comparison.sets,
        table2=comparison.table2(),
        means=comparison.means().to_dict("records"),
        commands=[prose.command(run) for run in runs],
    )


def page(template: str, figures: Mapping[str, Mapping[Theme, Figure]], **context: Any) -> str:
    """Render a template with its figures, drawn for light and dark backgrounds."""
    environment = Environment(
        loader=PackageLoader("tn_lens.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "fixed": _fixed, "power": _power, "plural": plural}
    held = {name: {theme: figure.bare() for theme, figure in of.items()} for name, of in figures.items()}
    return environment.get_template(template).render(
        plotly_js=Markup(plotly_js()),
        figures={name: of["light"] for name, of in figures.items()},
        figures_json=Markup(_in_script(held)),
        **context,
    )


def figures_of(run: Run) -> dict[str, dict[Theme, Figure]]:
    """The page's figures by name; where nothing was found, only those that have something to show."""
    several = [run.evaluation, *others_of(run)]
    found: dict[str, dict[Theme, Figure]] = {}
    for theme in THEMES:
        drawn: dict[str, Figure] = {}
        if run.selection.candidates:
            drawn["candidates"] = plot_candidates(run.selection, theme=theme)
        if run.neurons:
            drawn["accuracies"] = plot_accuracies(run.evaluation, theme=theme)
            drawn["change"] = plot_probability_change(several, theme=theme)
            drawn["layers"] = plot_layers({run.model_name: run.selection}, theme=theme)
        if run.neurons and len(run.evaluation.by_category()):
            drawn["categories"] = plot_categories(run.evaluation, theme=theme)
        if any(of["change"] for of in run.checks["completeness"].values()):
            drawn["completeness"] = plot_completeness(run.checks["completeness"], theme=theme)
        if len(several) > 1 and run.neurons:
            drawn["elsewhere"] = plot_accuracies(several, theme=theme)
        for name, figure in drawn.items():
            found.setdefault(name, {})[theme] = figure
    return found


def others_of(run: Run) -> list[StoredEvaluation]:
    """The evaluations on other question sets than the run's own."""
    return [one for one in run.others if one.name != run.evaluation.name]


def conditions(evaluation: StoredEvaluation) -> list[dict[str, Any]]:
    """The rows of table 1: every condition, and the paper's own where it has the model.

    Without neurons nothing was touched, and every condition would repeat the first.
    """
    rows: list[dict[str, Any]] = [
        {
            "name": ARM_NAMES[arm].replace("at zero", evaluation.intervention),
            "accuracy": 100 * evaluation.arms[arm].accuracy,
            "std": 100 * evaluation.arms[arm].accuracy_std,
            "averaged": evaluation.arms[arm].order_averaged_accuracy,
            "auc": evaluation.arms[arm].auc,
            "mass": evaluation.arms[arm].answer_mass,
            "share_a": evaluation.arms[arm].share_a,
            "is_found": arm == "suppressed",
        }
        for arm in ARMS
        if arm in evaluation.arms and (evaluation.n_neurons or arm == "baseline")
    ]
    paper = PAPER.get(evaluation.model_name) if evaluation.name == "truthfulqa" else None
    for arm, name in (("baseline", "untouched"), ("random", "random"), ("suppressed", "suppressed")):
        if paper:
            mean, std = getattr(paper, arm)
            rows.append({"name": f"in the paper: {name}", "accuracy": mean, "std": std, "is_found": False})
    return rows


def _in_script(payload: Any) -> str:
    """JSON that may stand in a script element, whatever it holds."""
    text = json.dumps(payload, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _percent(value: float | int | None, digits: int = 1) -> str:
    return "–" if value is None or value != value else f"{100 * value:.{digits}f}"


def _fixed(value: float | int | None, digits: int = 2) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def _power(value: float | int | None, digits: int = 1) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}e}"
