"""Measure the error rate and the power of the selection: `python benchmarks/calibration.py`.

Three experiments use the scores of the embedded model for its 230 questions, each asked in both orders:

- null: after the check, the sign of D is flipped at random for each question, which is equivalent to exchanging the labels. In
  this experiment no neuron supports truth, so a run that finds a neuron is a false positive.
- exchange before the check: the labels are exchanged at random first, and the check keeps the questions that the model then
  answers "right". Again no neuron supports truth, but in every question that is kept, the label is the model's choice.
- power: on the null, an effect is added to five random MLP neurons, as a fraction of the largest D of each question.

Writes calibration.json and docs/calibration.png.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from tn_lens import (
    Attribution,
    NeuronSet,
    PromptSet,
    Selection,
    attribute,
    build_prompts,
    load_model,
    load_questions,
    manipulation_check,
    select_neurons,
)
from tn_lens.core.seeds import generator

RESULTS = Path(__file__).with_suffix(".json")
FIGURE = Path(__file__).parents[1] / "docs" / "calibration.png"
N_RUNS = 250
N_POWER_RUNS = 25
ALPHA = 0.05
SETTINGS = ((0.01, 0.4), (0.01, 0.2), (0.05, 0.2), (0.2, 0.1))
"""Thresholds (t, p) of the null experiment; lower thresholds give more candidates to test."""
EFFECTS = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
N_PLANTED = 5


@dataclass(frozen=True, kw_only=True)
class ToyScores:
    """The scores of the embedded model, and the questions that it answers correctly or incorrectly in both orders."""

    scores: Attribution
    """D with one row per question, the mean over its orders; without categories."""
    right: tuple[str, ...]
    wrong: tuple[str, ...]


def toy_scores() -> ToyScores:
    """Ask the embedded model the questions of its part "find", and attribute its answers."""
    model = load_model("toy")
    check = manipulation_check(model, build_prompts(model, load_questions("toy").part("find"), order="both"))
    by_prompt = attribute(model, check.asked)
    means = [scores for _, scores in by_prompt.per_question()]
    starts = [rows.start for rows in check.asked.groups.values()]
    scores = replace(
        by_prompt,
        prompts=PromptSet(tuple(replace(check.asked[row], category="") for row in starts)),
        difference={site: torch.stack([mean[site] for mean in means]) for site in by_prompt.difference},
        change={site: change[starts] for site, change in by_prompt.change.items()},
        n_nodes=None,
    )
    wrong = [question for question, rows in check.asked.groups.items() if not check.right[list(rows)].any()]
    return ToyScores(scores=scores, right=tuple(check.questions), wrong=tuple(wrong))


def signed(scores: Attribution, signs: Mapping[str, float], effects: Mapping[str, Tensor] | None = None) -> Attribution:
    """The scores of some questions with their signs flipped, and with effects added.

    Args:
        scores: D with one row per question.
        signs: question id -> 1 or -1.
        effects: for each site [layer, neuron]; added to every question, in units of its largest D at that site.
    """
    rows = [row for row, prompt in enumerate(scores.prompts) if prompt.question in signs]
    prompts = PromptSet(tuple(scores.prompts[row] for row in rows))
    sign = torch.tensor([signs[prompt.question] for prompt in prompts])[:, None, None]
    difference: dict[str, Tensor] = {}
    for site, values in scores.difference.items():
        difference[site] = sign * values[rows]  # [question, layer, neuron]
        if effects and site in effects:
            difference[site] += effects[site] * values[rows].amax((1, 2), keepdim=True)
    change = {site: values[rows] for site, values in scores.change.items()}
    return replace(scores, prompts=prompts, difference=difference, change=change)


def select(scores: Attribution, t: float, p: float, run: int) -> Selection:
    """Select with the significance level of this benchmark and the split of a run."""
    return select_neurons(scores, adaptive_threshold=t, share_threshold=p, alpha=ALPHA, seed=run)


def flips(questions: tuple[str, ...], coins: np.random.Generator) -> dict[str, float]:
    """A random sign for every question."""
    return {question: float(coins.choice((-1.0, 1.0))) for question in questions}


def null(toy: ToyScores) -> list[dict[str, Any]]:
    """False positives if the labels are exchanged after the check."""
    rows = []
    for t, p in SETTINGS:
        sizes, candidates, single = [], [], []
        for run in range(N_RUNS):
            signs = flips(toy.right, generator(run, 10))
            selection = select(signed(toy.scores, signs), t, p, run)
            sizes.append(len(selection.neurons))
            candidates.append(len(selection.candidates))
            single.append(float((selection.p_value < ALPHA).mean()) if len(selection.candidates) else 0.0)
        rate = float(np.mean([size > 0 for size in sizes]))
        rows.append(
            {
                "t": t,
                "p": p,
                "n_runs": N_RUNS,
                "mean_candidates": round(float(np.mean(candidates)), 1),
                "uncorrected_rate": round(float(np.mean(single)), 4),
                "family_wise_error": round(rate, 4),
                "bound": round(ALPHA + 2 * float(np.sqrt(ALPHA * (1 - ALPHA) / N_RUNS)), 4),
            }
        )
        print(rows[-1], flush=True)
    return rows


def exchange(toy: ToyScores) -> dict[str, Any]:
    """Neurons that are significant only because of the check: the labels are exchanged before it."""
    sizes, n_questions = [], []
    answered = tuple(q for q in toy.scores.prompts.groups if q in {*toy.right, *toy.wrong})
    for run in range(100):
        drawn = flips(answered, generator(run, 11))
        signs = {question: sign for question, sign in drawn.items() if (sign > 0) == (question in toy.right)}
        sizes.append(len(select(signed(toy.scores, signs), 0.01, 0.4, run).neurons))
        n_questions.append(len(signs))
    row = {
        "t": 0.01,
        "p": 0.4,
        "n_runs": len(sizes),
        "mean_questions_kept": round(float(np.mean(n_questions)), 1),
        "share_of_runs_that_find_a_neuron": float(np.mean([size > 0 for size in sizes])),
        "mean_found": round(float(np.mean(sizes)), 1),
    }
    print(row, flush=True)
    return row


def power(toy: ToyScores) -> list[dict[str, Any]]:
    """The fraction of five planted neurons that is found, by the size of their effect."""
    space = toy.scores.space
    rows = []
    for t in (0.01, 0.05, 0.2):
        for effect in EFFECTS:
            hits = []
            for run in range(N_POWER_RUNS):
                coins = generator(run, 12)
                signs = flips(toy.right, coins)
                flat = coins.choice(space.n_layers * space.d_mlp, N_PLANTED, replace=False).tolist()
                added = torch.zeros(space.n_layers, space.d_mlp)
                added.view(-1)[flat] = effect
                planted = NeuronSet(space.neuron("mlp", *divmod(place, space.d_mlp)) for place in flat)
                selection = select(signed(toy.scores, signs, {"mlp": added}), t, 0.4, run)
                hits.append(len(selection.neurons & planted) / N_PLANTED)
            rows.append({"t": t, "p": 0.4, "effect": effect, "power": round(float(np.mean(hits)), 3)})
            print(rows[-1], flush=True)
    return rows


def figure(results: dict[str, Any]) -> go.Figure:
    """Plot the three experiments side by side."""
    blue, orange, grey = "#0b5394", "#c55a11", "#5b6b7a"
    shown = make_subplots(
        cols=3,
        subplot_titles=("labels exchanged<br>after the check", "exchanged<br>before the check", "power"),
        horizontal_spacing=0.1,
        column_widths=[0.36, 0.2, 0.44],
    )
    rows = results["null"]
    shown.add_bar(
        x=[f"t {r['t']:.0%}<br>p {r['p']:.0%}" for r in rows],
        y=[r["family_wise_error"] for r in rows],
        marker_color=blue,
        row=1,
        col=1,
    )
    shown.add_hline(y=ALPHA, line={"color": grey, "dash": "dash"}, row=1, col=1)  # pyright: ignore[reportArgumentType]
    shown.add_bar(
        x=["t 1%<br>p 40%"],
        y=[results["exchange_before_check"]["share_of_runs_that_find_a_neuron"]],
        marker_color=orange,
        row=1,
        col=2,
    )
    for t, colour, dash in ((0.01, blue, "solid"), (0.05, orange, "dash"), (0.2, grey, "dot")):
        points = [r for r in results["power"] if r["t"] == t]
        shown.add_scatter(
            x=[r["effect"] for r in points],
            y=[r["power"] for r in points],
            name=f"t = {t:.0%}",
            line={"color": colour, "dash": dash, "width": 3},
            row=1,
            col=3,
        )
    shown.update_xaxes(type="log", title="effect, fraction of the largest D", tickformat=".1%", row=1, col=3)
    for column, title, top in (
        (1, "runs that find a neuron", 0.12),
        (2, "runs that find a neuron", 1.05),
        (3, "fraction found", 1.05),
    ):
        shown.update_yaxes(title=title, range=[0, top], tickformat=".0%", row=1, col=column)
    shown.update_traces(showlegend=False, selector={"type": "bar"})
    return shown.update_layout(
        template="plotly_white",
        font={"family": "Inter, Helvetica, Arial, sans-serif", "size": 15, "color": "#1c2733"},
        width=1200,
        height=430,
        margin={"l": 70, "r": 20, "t": 70, "b": 70},
        legend={"x": 0.655, "y": 0.86, "bgcolor": "rgba(255,255,255,0)"},
    )


def main() -> None:
    """Run the three experiments, and write the numbers and the figure."""
    torch.set_num_threads(1)
    toy = toy_scores()
    results = {
        "n_right": len(toy.right),
        "n_wrong": len(toy.wrong),
        "alpha": ALPHA,
        "null": null(toy),
        "exchange_before_check": exchange(toy),
        "power": power(toy),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    FIGURE.parent.mkdir(exist_ok=True)
    figure(results).write_image(FIGURE, scale=2)


if __name__ == "__main__":
    sys.exit(main())
