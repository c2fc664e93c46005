"""Compare attribution methods with a converged integral and with the effect of ablating neurons.

`python benchmarks/methods.py` attributes questions of the embedded model. `--model` and `--cities` measure another model on
completions of "The city of X is in the country of". Every set of prompts has rows in methods.json, and docs/methods.md has a
table of all rows.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from comparing import city_questions, counted_rows, jaccard, salient
from measuring import machine, timed
from scipy import stats

import tn_lens as tn
from tn_lens.attribution.methods import METHODS
from tn_lens.inference.counterparts import counterparts
from tn_lens.models import Model

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
THRESHOLDS = (0.2, 0.05)
"""Thresholds t, as fractions of the largest score of a prompt and site, above which neurons are salient (paper 2.3)."""
N_STRONGEST = 30
"""Neurons of each method that are ablated, per prompt and site."""
N_RANDOM = 100
"""Random neurons that are ablated as well, per prompt and site."""
N_TOP = 10
SEED = 0


class Candidate(NamedTuple):
    """A method to compare, with the keyword arguments of `attribute`."""

    label: str
    options: dict[str, Any]


CANDIDATES = (
    Candidate("riemann_right, m = 20", {"method": "riemann_right", "n_steps": 20}),
    Candidate("riemann_right, m = 20, tolerance 1e-3", {"method": "riemann_right", "n_steps": 20, "tolerance": 1e-3}),
    Candidate("riemann_right, m = 5", {"method": "riemann_right", "n_steps": 5}),
    Candidate("gausslegendre, m = 5", {"method": "gausslegendre", "n_steps": 5}),
    Candidate("gradient_x_activation", {"method": "gradient_x_activation"}),
    Candidate("attribution_patching", {"method": "attribution_patching"}),
)
"""The methods to compare. Times are relative to the first one, which is the paper's."""


REFERENCE = Candidate("adaptive", {"method": "adaptive"})
"""The converged integral with which the methods are compared."""


def has_counterparts(prompts: tn.PromptSet) -> bool:
    """Whether every prompt can be attributed with attribution patching."""
    try:
        counterparts(prompts)
    except tn.BadInput:
        return False
    return True


def flat(attribution: tn.Attribution, site: str) -> np.ndarray:
    """The scores of a site as an array [prompt, neuron], in which the neurons of all layers are side by side."""
    return attribution.difference[site].flatten(1).double().numpy()


def strongest(scores: np.ndarray, n: int) -> list[int]:
    """The indices of the `n` highest scores; of equal ones, those of the lowest indices."""
    return np.argsort(-scores, kind="stable")[:n].tolist()


def completeness_error(attribution: tn.Attribution, site: str) -> float:
    """The mean |gap| of all prompts and layers of a site, relative to the mean |change|."""
    return float(attribution.gap[site].abs().mean() / attribution.change[site].abs().mean())


class Judged(NamedTuple):
    """The effects of ablating a sample of neurons, one prompt at a time."""

    sample: list[int]
    effects: np.ndarray


def judge(model: Model, prompts: tn.PromptSet, scores: Sequence[np.ndarray], space: Any, site: str) -> list[Judged]:
    """Ablate the strongest neurons of every method and random ones, in every prompt."""
    rng = np.random.default_rng(SEED)
    judged = []
    for row, prompt in enumerate(prompts):
        n_neurons = scores[0].shape[1]
        sample = {index for method in scores for index in strongest(method[row], N_STRONGEST)}
        sample |= set(rng.choice(n_neurons, min(N_RANDOM, n_neurons), replace=False).tolist())
        ordered = sorted(sample)
        neurons = [space.neuron(site, *divmod(index, space.width(site))) for index in ordered]
        judged.append(Judged(ordered, tn.ablation_effects(model, prompt, neurons)[0].double().numpy()))
    return judged


def effect_together(model: Model, prompts: tn.PromptSet, scores: np.ndarray, space: Any, site: str) -> float:
    """The mean fall of the target if the strongest neurons of a method are zero-ablated together at the last position."""
    falls = []
    for row, prompt in enumerate(prompts):
        chosen = strongest(scores[row], N_TOP)
        neurons = tn.NeuronSet(space.neuron(site, *divmod(index, space.width(site))) for index in chosen)
        before, after = (
            float(2 * answers[0, prompt.right] - answers[0].sum())  # right minus wrong
            for answers in (
                tn.ask(model, [prompt]),
                tn.ask(model, [prompt], neurons=neurons, intervention=tn.Zero(positions="last")),
            )
        )
        falls.append(before - after)
    return round(float(np.mean(falls)), 4)


def agreement(scores: np.ndarray, reference: np.ndarray, judged: Sequence[Judged]) -> dict[str, float]:
    """The agreement of a method with the reference and with the effects, averaged over prompts."""
    rows: list[dict[str, float]] = []
    for own, exact, (sample, effects) in zip(scores, reference, judged, strict=True):
        by_score = set(strongest(own[sample], N_TOP))
        row = {"correlation": np.corrcoef(own, exact)[0, 1]}
        row |= {f"jaccard_{t:.0%}": jaccard(salient(own, t), salient(exact, t)) for t in THRESHOLDS}
        row["effect_rank_correlation"] = stats.spearmanr(own[sample], effects)[0]
        row["effect_top"] = len(by_score & set(strongest(effects, N_TOP))) / N_TOP
        rows.append(row)
    return {name: round(float(np.nanmean([row[name] for row in rows])), 4) for name in rows[0]}


def measure(
    model: Model, prompts: tn.PromptSet, candidates: Sequence[Candidate], reference: Candidate, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row for each method and site."""
    candidates = [
        c for c in candidates if not METHODS[c.options["method"]].uses_counterparts or has_counterparts(prompts)
    ]
    tn.attribute(model, prompts, **candidates[0].options)  # warm-up, which is not measured
    attributions, costs = {}, {}
    for candidate in (*candidates, reference):
        with counted_rows() as rows:
            attributions[candidate.label], seconds = timed(partial(tn.attribute, model, prompts, **candidate.options))
        costs[candidate.label] = (sum(rows) / len(prompts), seconds)
        print(f"{candidate.label}: {seconds:.1f} s", flush=True)
    space, paper = attributions[reference.label].space, costs[candidates[0].label][1]
    results = []
    for site in space.sites:
        scores = [flat(attributions[candidate.label], site) for candidate in (*candidates, reference)]
        judged = judge(model, prompts, scores, space, site)
        for candidate, own in zip((*candidates, reference), scores, strict=True):
            n_rows, seconds = costs[candidate.label]
            row = {**about, "n_prompts": len(prompts), "reference": reference.label, "site": site}
            row |= {"method": candidate.label, **agreement(own, scores[-1], judged)}
            row["effect_together"] = effect_together(model, prompts, own, space, site)
            row["completeness_error"] = round(completeness_error(attributions[candidate.label], site), 4)
            row |= {"rows_per_prompt": round(n_rows, 1), "relative_seconds": round(seconds / paper, 3)}
            results.append(row)
            print(row, flush=True)
    return results


INTRODUCTION = """# Comparison of the attribution methods

`benchmarks/methods.py` writes this page. Every method attributes the same prompts. The columns are means over the prompts,
separately for each site; the last row of each table is the converged integral, to which the others are compared:

- `r`: Pearson correlation of the scores of all neurons with the converged integral.
- `J`: Jaccard index of the salient neurons (score above t times the largest score of the prompt and site) with those of the
  converged integral, for t = 20 % and t = 5 %.
- `effect`: Spearman correlation of the scores with the effect of zero-ablating each neuron alone at the last position
  (`ablation_effects`), over a sample of neurons: the 30 strongest of each method, and 100 random ones.
- `top 10`: fraction of the ten strongest neurons of the sample, by score, that are among the ten with the largest effect.
- `together`: fall of P(right) - P(wrong) if the ten strongest neurons of the site are zero-ablated together at the last position.
- `error`: completeness error, mean |gap| relative to mean |change| over prompts and layers.
- `rows`: rows that the engine runs per prompt. `time`: duration relative to riemann_right with 20 steps.

Integrated gradients share out the change that all neurons of a layer cause together, but the effect is that of one neuron in the
otherwise unchanged model. A gradient at the activation is the first-order estimate of the second quantity, so the two
comparisons answer different questions. Attribution patching measures the difference to the same question in another order, not
to zero.

Which method to trust depends on the quantity of interest:

- For the paper's scores, use `adaptive`. On SmolLM2 it converges at about the cost of 20 Riemann steps, and a fifth of the
  neurons that are salient by those steps or by the converged scores differ; on the toy, where half of the places are rough, it
  costs four times as much.
- For the effect of ablating one neuron, use `gradient_x_activation`, or measure it with `ablation_effects`: the order of the
  effects is nearly that of the gradients, at a tenth of the cost on SmolLM2, but the salient neurons differ from those of
  integrated gradients.
- Few steps of a rule are no substitute for either.
"""


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The page with one table for each model and set of prompts."""
    page = INTRODUCTION
    groups = dict.fromkeys((row["model"], row["questions"], row["n_prompts"], row["machine"]) for row in rows)
    for group in groups:
        name, questions, n_prompts, place = group
        page += f"\n## {name}, {questions}\n\n{n_prompts} prompts, on {place}.\n\n"
        page += "| site | method | r | J 20 % | J 5 % | effect | top 10 | together | error | rows | time |\n"
        page += "|---|---|---|---|---|---|---|---|---|---|---|\n"
        for row in rows:
            if (row["model"], row["questions"], row["n_prompts"], row["machine"]) == group:
                numbers = [row[key] for key in ("correlation", "jaccard_20%", "jaccard_5%")]
                numbers += [row["effect_rank_correlation"], row["effect_top"]]
                cells = [f"{number:.2f}" if abs(number) < 0.995 else f"{number:.3f}" for number in numbers]
                cells += [f"{row['effect_together']:.3f}", f"{100 * row['completeness_error']:.1f} %"]
                cells += [f"{row['rows_per_prompt']:.0f}", f"{row['relative_seconds']:.2f}"]
                method = re.sub("_", r"\\_", row["method"])
                page += f"| {row['site']} | {method} | {' | '.join(cells)} |\n"
    return page


def write(rows: Sequence[dict[str, Any]]) -> None:
    """Replace the rows of the same model and questions in methods.json, and write the page."""
    measured = {(row["model"], row["questions"]) for row in rows}
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = [row for row in stored if (row["model"], row["questions"]) not in measured]
    RESULTS.write_text(json.dumps([*kept, *rows], indent=1) + "\n")
    PAGE.write_text(markdown([*kept, *rows]), encoding="utf-8")


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "cities", nargs="?", type=Path, help="CSV file with cities and countries; default: the toy's questions"
    )
    parser.add_argument("--model", default="toy", help="name or folder of a model")
    parser.add_argument("--prompts", type=int, default=40, help="maximum number of prompts")
    parser.add_argument("--dry-run", action="store_true", help="print the results without writing them")
    arguments = parser.parse_args()
    model = tn.load_model(arguments.model, dtype="float32")
    if arguments.cities is None:
        questions = tn.load_questions("toy").part("find")
        # every question in both orders
        prompts = tn.build_prompts(
            model, questions.sample(arguments.prompts, np.random.default_rng(SEED)), order="both"
        )
    else:
        questions = city_questions(arguments.cities, arguments.prompts, SEED)
        prompts = tn.build_prompts(model, questions)
    # like a run, attribute only what the model answers correctly
    prompts = tn.manipulation_check(model, prompts).prompts.chunks(arguments.prompts)[0]
    about = {"model": Path(arguments.model).name, "questions": questions.name, "machine": machine()}
    rows = measure(model, prompts, CANDIDATES, REFERENCE, about)
    if not arguments.dry_run:
        write(rows)


if __name__ == "__main__":
    main()
