"""Truth neurons of a trained model on several question sets: where they are found, what they do elsewhere, and what they damage.

`python benchmarks/real_model.py --model smollm2 cities=PATH country_language=PATH ...` finds neurons on `common_facts` and on every
given set, each in its own run folder (a stopped run is continued), ablates the neurons of every run on every set, and repeats the
run on `common_facts` with the mean as the baseline and as the ablation. Writes real_model.json and docs/real_model.md; `--page`
only writes the page, and `--figures` also writes the figures of the README, which requires Chrome.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from measuring import machine

import tn_lens as tn
from tn_lens.evaluation.result import Evaluation
from tn_lens.inference.interventions import intervention_called
from tn_lens.models import Model
from tn_lens.pipeline.retest import load_sets, retest

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "real_model.md"
SETTINGS = tn.Settings(
    method="adaptive", limit=120, n_repetitions=3, controls=("random", "random_matched", "top_activation")
)
"""Settings of the run on `common_facts`, those of `make demo-real`; the baseline is zero, as in the paper."""
ELSEWHERE = {"limit": 100}
"""What is different in the runs on other sets."""
ON = {"n_repetitions": 2, "conditions": ("unablated", "random_matched", "top_activation", "ablated")}
"""Keyword arguments of `evaluate` on other sets."""
N_ON = 60
"""Maximum number of questions of each set on which the neurons of the runs are ablated."""


def find(model: Model, questions: tn.QuestionSet, out: Path, **changes: Any) -> tn.TruthNeurons:
    """Find the neurons of one set, or continue the run."""
    print(f"finding on {questions.name} in {out}", flush=True)
    return tn.find_truth_neurons(model, questions, replace(SETTINGS, **changes), out=out)


def numbers(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Accuracy and answer mass by condition."""
    conditions = evaluation.conditions.items()
    return {
        "accuracy": {name: round(result.accuracy, 6) for name, result in conditions},
        "answer_mass": {name: round(result.answer_mass, 6) for name, result in conditions},
    }


def mean_nodes(found: tn.TruthNeurons) -> float:
    """Mean number of nodes per site and layer, with which the scores of a run have converged."""
    assert found.convergence is not None
    return round(fmean(chain.from_iterable(found.convergence.n_nodes.values())), 2)


def run_row(name: str, found: tn.TruthNeurons) -> dict[str, Any]:
    """The neurons of a run, the effect of ablating them and the damage."""
    row: dict[str, Any] = {
        "found_on": name,
        "baseline": found.settings.baseline,
        "n_asked": found.check.n_asked,
        "n_kept": found.check.n_kept,
        "n_reported": found.evaluation.n_questions,
        "mean_nodes": mean_nodes(found),
        "n_found": len(found.neurons),
        "by_layer": found.neurons.by_layer(found.selection.space.n_layers),
        "verdicts": found.diagnosis.n_by_verdict,
        **numbers(found.evaluation),
        "welch_p": found.evaluation.welch_p,
        "neurons": list(map(str, found.neurons)),
    }
    if found.damage is not None:
        row["damage"] = found.damage.to_dict()
        others = found.damage.others
        if others is not None:
            row["accuracy_others"] = round(others.conditions["ablated"].accuracy, 6)
    return row


def transfer(
    model: Model, runs: Mapping[str, tn.TruthNeurons], sets: Sequence[tn.QuestionSet], out: Path
) -> list[dict[str, Any]]:
    """The neurons of every run ablated on every set."""
    rows = []
    for found_on, found in runs.items():
        if not found.neurons:
            continue
        for evaluation in retest(model, found.neurons, sets, out=out / f"{found_on}_elsewhere", **ON):
            rows.append(
                {
                    "found_on": found_on,
                    "ablated_on": evaluation.name,
                    "n_questions": evaluation.n_questions,
                    **numbers(evaluation),
                }
            )
            print(rows[-1], flush=True)
    return rows


def two_by_two(model: Model, runs: Mapping[str, tn.TruthNeurons], questions: tn.QuestionSet) -> list[dict[str, Any]]:
    """The neurons found with every baseline, zero-ablated and mean-ablated."""
    rows = []
    prompts = tn.build_prompts(model, questions)
    for baseline, found in runs.items():
        for name in ("zero", "mean"):
            intervention = intervention_called(name, 0)
            if isinstance(intervention, tn.Mean):
                intervention = replace(intervention, values=tn.mean_activations(model, prompts, positions="all"))
            row: dict[str, Any] = {"baseline": baseline, "ablation": name, "n_found": len(found.neurons)}
            row["mean_nodes"] = mean_nodes(found)
            if found.neurons:
                evaluation = tn.evaluate(model, questions, found.neurons, intervention=intervention, **ON)
                # a run measures the damage of zero-ablation
                measured = found.damage if name == "zero" else None
                damage = measured or tn.measure_damage(model, found.neurons, prompts, intervention=intervention)
                row |= {**numbers(evaluation), "damage": damage.to_dict()}
            rows.append(row)
            print(row, flush=True)
    return rows


def draw(found: tn.TruthNeurons) -> None:
    """Write the figures of a run."""
    folder = PAGE.parent / "figures"
    assert found.damage is not None
    for name, figure in {
        "real_accuracies": tn.figures.plot_accuracies(found.evaluation),
        "real_damage": tn.figures.plot_damage(found.damage),
        "real_layers": tn.figures.plot_layers(found.selection),
    }.items():
        tn.figures.save_figure(figure, folder / f"{name}.png")


INTRODUCTION = """# A trained model

`benchmarks/real_model.py` writes this page. {model} is asked completions ("The capital of France is").
Neurons are found with the paper's thresholds (t = 20 %, p = 40 %, t-test on held-out questions) and converged scores
(`method="adaptive"`), from the zero baseline unless stated otherwise, and are zero-ablated. Accuracies are in percent. The loss on
plain text is the change by ablation, in nats per token.
"""
ELSEWHERE_TEXT = """
## Found on one set, ablated on another

Accuracy with the found neurons ablated, with as many matched random neurons ablated, and with as many of the most active neurons
ablated, on at most 60 questions of each set. Questions of common\\_facts are none of those on which neurons were found; the other
sets are not divided into parts.

"""
TWO_BY_TWO_TEXT = """
## Baseline and ablation

Neurons found on common\\_facts from each baseline, and both ablations of them, on 60 other questions. Nodes: evaluations per prompt,
site and layer until the scores converge (tolerance 1e-3).

"""
ADVICE = """
Neurons in both sets: {overlap}.

**Check a fall in accuracy with mean-ablation before you interpret it** (`tn-lens evaluate RUN --mode mean`). With the {n} neurons from the
zero baseline zero-ablated, accuracy goes from {unablated} to {zero} % and the loss on plain text rises by {zero_rise:.3f}; with the
same neurons set to their mean activation, accuracy is {mean} %, and the loss rises by {mean_rise:.3f}. Zero-ablation
thus acts by removing what these neurons contribute to every text, not what they contribute to one answer. Scores from the
mean baseline (`Settings.preset("recommended")`) measure only the latter, and converge faster ([baselines](baselines.md)).
"""


def percent(value: float | None) -> str:
    """A fraction in percent; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}"


def escaped(name: str) -> str:
    """A name as plain text in Markdown."""
    return name.replace("_", r"\_")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


def markdown(results: Mapping[str, Any]) -> str:
    """The page."""
    page = INTRODUCTION.format(model=results["model"])
    page += "\n## What is found, and what ablating it does\n\n"
    names = ("unablated", "random", "random_matched", "top_activation", "ablated")
    rows = []
    for row in results["runs"]:
        name = escaped(row["found_on"]) + ("" if row["baseline"] == "zero" else f", {row['baseline']} baseline")
        cells = [name, f"{row['n_kept']} of {row['n_asked']}", str(row["n_found"])]
        cells.append(", ".join(f"{n} {verdict}" for verdict, n in row["verdicts"].items() if n))
        cells += [percent(row["accuracy"].get(condition)) for condition in names]
        cells += [f"{row['damage']['rise']['ablated']:+.3f}", percent(row.get("accuracy_others"))]
        rows.append(cells)
    header = ["found on", "kept", "neurons", "verdicts", "unablated", "random", "matched", "most active", "ablated"]
    page += table([*header, "loss on plain text", "ablated without damage neurons"], rows)
    page += ELSEWHERE_TEXT
    accuracy = {(row["found_on"], row["ablated_on"]): row["accuracy"] for row in results["transfer"]}
    found_on, sets = (list(dict.fromkeys(names)) for names in zip(*accuracy, strict=True))
    rows = []
    for found in found_on:
        cells = [
            [percent(accuracy[found, name][c]) for c in ("ablated", "random_matched", "top_activation")]
            for name in sets
        ]
        name = escaped(found).replace(r"\_mean", ", mean baseline")
        rows.append([name, *(f"**{ours}** / {' / '.join(others)}" for ours, *others in cells)])
    rows.append(["unablated", *(percent(accuracy[found_on[0], name]["unablated"]) for name in sets)])
    page += table(["found on", *map(escaped, sets)], rows)
    page += TWO_BY_TWO_TEXT
    rows = []
    for row in results["two_by_two"]:
        cells = [row["baseline"], row["ablation"], f"{row['mean_nodes']:.1f}", str(row["n_found"])]
        if row["n_found"]:
            cells += [percent(row["accuracy"][c]) for c in ("unablated", "random_matched", "ablated")]
            cells += [f"{row['answer_mass']['ablated']:.3f}", f"{row['damage']['rise']['ablated']:+.3f}"]
            cells.append(str(len(row["damage"]["neurons"])))
        rows.append(cells + ["–"] * (10 - len(cells)))
    header = [
        "baseline",
        "ablation",
        "nodes",
        "neurons",
        "unablated",
        "matched",
        "ablated",
        "answer mass",
        "loss on plain text",
    ]
    page += table([*header, "damage neurons"], rows)
    by_zero, by_mean = (row for row in results["two_by_two"] if row["baseline"] == "zero")
    return page + ADVICE.format(
        overlap=results["overlap"],
        n=by_zero["n_found"],
        unablated=percent(by_zero["accuracy"]["unablated"]),
        zero=percent(by_zero["accuracy"]["ablated"]),
        mean=percent(by_mean["accuracy"]["ablated"]),
        zero_rise=by_zero["damage"]["rise"]["ablated"],
        mean_rise=by_mean["damage"]["rise"]["ablated"],
    )


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", help="question sets besides common_facts, NAME or NAME=PATH")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--runs", type=Path, default=Path("runs/real_model"), help="folder of the run folders")
    parser.add_argument("--page", action="store_true", help="write the page from the stored results")
    parser.add_argument("--figures", action="store_true", help="write the figures of the run on common_facts")
    arguments = parser.parse_args()
    if arguments.figures:
        draw(tn.load_run(arguments.runs / "common_facts"))
        return
    if arguments.page:
        PAGE.write_text(markdown(json.loads(RESULTS.read_text())), encoding="utf-8")
        return
    model = tn.load_model(arguments.model, dtype="float32")
    common = tn.load_questions("common_facts")
    others = load_sets(arguments.sets) if arguments.sets else []
    elsewhere = {
        questions.name: find(model, questions, arguments.runs / questions.name, **ELSEWHERE) for questions in others
    }
    mean = find(model, common, arguments.runs / "common_facts_mean", baseline="mean")
    runs = {"common_facts": find(model, common, arguments.runs / "common_facts"), **elsewhere}
    asked = load_sets(["common_facts", *arguments.sets], limit=N_ON)
    overlap = runs["common_facts"].neurons & mean.neurons
    results: dict[str, Any] = {"model": runs["common_facts"].model_name, "machine": machine()}
    results["runs"] = [run_row(name, found) for name, found in runs.items()] + [run_row("common_facts", mean)]
    results["transfer"] = transfer(model, {**runs, "common_facts_mean": mean}, asked, arguments.runs)
    results["two_by_two"] = two_by_two(model, {"zero": runs["common_facts"], "mean": mean}, asked[0])
    results["overlap"] = len(overlap)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
