"""Does the selection find what is there, and nothing else? `python benchmarks/calibration.py`.

Three experiments on the embedded model's own scores, for its 230 questions, each asked in both orders:

- null: after the check, the sign of D is flipped per question at random, which is what exchanging the labels does. Nothing
  supports truth then; runs that find a neuron are false alarms.
- exchange before the check: the labels are exchanged at random first, and the check keeps what the model then answers
  "right". Still nothing supports truth, but every kept question is one in which the label is the model's choice.
- power: on the null, five random MLP neurons get an effect, a fraction of each question's largest D.

Writes calibration.json and docs/calibration.png.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from tn_lens import Attribution, NeuronSet, attribute, build_prompts, load_model, load_questions, manipulation_check
from tn_lens import select_neurons as select
from tn_lens.attribution.result import Scores
from tn_lens.core.seeds import generator
from tn_lens.inference.manipulation import is_right
from tn_lens.neurons.neuron import NeuronSpace, Site
from tn_lens.prompts import by_question

RESULTS = Path(__file__).with_suffix(".json")
FIGURE = Path(__file__).parents[1] / "docs" / "calibration.png"
N_RUNS = 250
N_POWER_RUNS = 25
ALPHA = 0.05
SETTINGS = ((0.01, 0.4), (0.01, 0.2), (0.05, 0.2), (0.2, 0.1))
"""Thresholds (t, p) of the null: lower ones let more candidates through to the test."""
EFFECTS = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
N_PLANTED = 5


@dataclass
class Signed:
    """Scores whose signs are flipped per question, with effects added."""

    base: list[tuple[int, Scores]]
    space: NeuronSpace
    signs: Mapping[int, float]
    effects: Mapping[Site, Tensor] = field(default_factory=dict)
    """Added to every question, in units of its largest D at that site."""

    @property
    def categories(self) -> dict[int, str]:
        return dict.fromkeys(self.signs, "")

    def per_question(self, questions: Set[int] | None = None) -> Iterator[tuple[int, Scores]]:
        for question, scores in self.base:
            if question in self.signs and (questions is None or question in questions):
                signed: dict[Site, Tensor] = {site: self.signs[question] * values for site, values in scores.items()}
                for site, effect in self.effects.items():
                    signed[site] = signed[site] + effect * scores[site].max()
                yield question, signed


def toy_scores() -> tuple[Attribution, set[int], set[int]]:
    """D of every question, and the questions answered right, and wrong, in both orders."""
    model = load_model("toy")
    check = manipulation_check(model, build_prompts(model, load_questions("toy").part("find"), order="both"))
    answered = is_right(check.probabilities, check.asked).tolist()
    verdicts: dict[int, list[bool]] = {}
    start = 0
    for question, group in by_question(check.asked):
        verdicts[question] = answered[start : start + len(group)]
        start += len(group)
    right = {q for q, v in verdicts.items() if all(v)}
    wrong = {q for q, v in verdicts.items() if not any(v)}
    return attribute(model, check.asked), right, wrong


def null(scores: list[tuple[int, Scores]], space: NeuronSpace, right: set[int]) -> list[dict[str, Any]]:
    """False alarms with the labels exchanged after the check."""
    rows = []
    for t, p in SETTINGS:
        sizes, candidates, single = [], [], []
        for run in range(N_RUNS):
            coins = generator(run, 10)
            signs = {q: float(coins.choice((-1.0, 1.0))) for q in sorted(right)}
            selection = select(Signed(scores, space, signs), t=t, p=p, alpha=ALPHA, seed=run)
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


def exchange(scores: list[tuple[int, Scores]], space: NeuronSpace, right: set[int], wrong: set[int]) -> dict[str, Any]:
    """What the check alone makes significant: labels exchanged before it."""
    sizes, questions = [], []
    for run in range(100):
        coins = generator(run, 11)
        flips = {q: float(coins.choice((-1.0, 1.0))) for q in sorted(right | wrong)}
        signs = {q: sign for q, sign in flips.items() if (sign > 0) == (q in right)}
        sizes.append(len(select(Signed(scores, space, signs), t=0.01, p=0.4, alpha=ALPHA, seed=run).neurons))
        questions.append(len(signs))
    row = {
        "t": 0.01,
        "p": 0.4,
        "n_runs": len(sizes),
        "mean_questions_kept": round(float(np.mean(questions)), 1),
        "share_of_runs_that_find_a_neuron": float(np.mean([size > 0 for size in sizes])),
        "mean_found": round(float(np.mean(sizes)), 1),
    }
    print(row, flush=True)
    return row


def power(scores: list[tuple[int, Scores]], space: NeuronSpace, right: set[int]) -> list[dict[str, Any]]:
    """How many of five planted neurons are found, by the size of their effect."""
    rows = []
    for t in (0.01, 0.05, 0.2):
        for effect in EFFECTS:
            hits = []
            for run in range(N_POWER_RUNS):
                coins = generator(run, 12)
                signs = {q: float(coins.choice((-1.0, 1.0))) for q in sorted(right)}
                flat = coins.choice(space.n_layers * space.d_mlp, N_PLANTED, replace=False).tolist()
                added = torch.zeros(space.n_layers, space.d_mlp)
                added.view(-1)[flat] = effect
                planted = NeuronSet(space.neuron("mlp", *divmod(i, space.d_mlp)) for i in flat)
                found = select(Signed(scores, space, signs, {"mlp": added}), t=t, p=0.4, alpha=ALPHA, seed=run).neurons
                hits.append(len(found & planted) / N_PLANTED)
            rows.append({"t": t, "p": 0.4, "effect": effect, "power": round(float(np.mean(hits)), 3)})
            print(rows[-1], flush=True)
    return rows


def figure(results: dict[str, Any]) -> go.Figure:
    """All three, side by side."""
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
        of_t = [r for r in results["power"] if r["t"] == t]
        shown.add_scatter(
            x=[r["effect"] for r in of_t],
            y=[r["power"] for r in of_t],
            name=f"t = {t:.0%}",
            line={"color": colour, "dash": dash, "width": 3},
            row=1,
            col=3,
        )
    shown.update_xaxes(type="log", title="effect, share of the largest D", tickformat=".1%", row=1, col=3)
    for column, title, top in (
        (1, "runs that find a neuron", 0.12),
        (2, "runs that find a neuron", 1.05),
        (3, "share found", 1.05),
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
    """Run all three, write the numbers and the figure."""
    torch.set_num_threads(1)
    attribution, right, wrong = toy_scores()
    scores = list(attribution.per_question())
    results = {
        "n_right": len(right),
        "n_wrong": len(wrong),
        "alpha": ALPHA,
        "null": null(scores, attribution.space, right),
        "exchange_before_check": exchange(scores, attribution.space, right, wrong),
        "power": power(scores, attribution.space, right),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    FIGURE.parent.mkdir(exist_ok=True)
    figure(results).write_image(FIGURE, scale=2)


if __name__ == "__main__":
    sys.exit(main())
