"""Compare the baselines of integrated gradients on a trained model: convergence, cost, the neurons found, and their ablation.

`python benchmarks/baselines.py CITIES` attributes completions of "The city of X is in the country of" from every baseline with
the method "adaptive", selects neurons, and ablates them. It writes baselines.json and docs/baselines.md.

The baselines are zero activation, the activation on an input of padding tokens, and mean activations over the kept prompts,
over the other half of them, and over positions of unrelated text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparing import city_questions, counted_rows
from measuring import machine, timed
from torch import Tensor

import tn_lens as tn
from tn_lens.attribution.baseline import Baseline
from tn_lens.evaluation.text import plain_texts, text_loss
from tn_lens.models import Model

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "baselines.md"
THRESHOLDS = (0.2, 0.05)
"""Thresholds t; the share threshold p and the test have their default values."""
N_SAMPLE = 4
"""Questions on which the paper's rule is compared with converged scores."""
N_POSITIONS = 64
"""Positions of unrelated text over which activations are averaged."""


def text_prompts(model: Model, texts: Sequence[str]) -> list[tn.Prompt]:
    """Beginnings of texts as prompts, so that their last positions are positions within the texts."""
    tokenizer: Any = model.tokenizer
    tokens = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    ends = [(ids, end) for ids in tokens for end in range(8, len(ids))]
    rng = np.random.default_rng(0)
    chosen = sorted(rng.choice(len(ends), min(N_POSITIONS, len(ends)), replace=False).tolist())
    return [
        tn.Prompt(token_ids=ids[:end], label_ids=((0,), (1,)), right=0, question=str(index))
        for index, (ids, end) in enumerate(ends[i] for i in chosen)
    ]


def mean_of_other_half(model: Model, prompts: tn.PromptSet) -> dict[str, Tensor]:
    """For each prompt, the mean activations over the half of the prompts that does not contain it."""
    halves = [tn.PromptSet(tuple(prompts)[first::2]) for first in (0, 1)]
    means = [tn.mean_activations(model, half) for half in halves]
    return {site: torch.stack([means[1 - row % 2][site] for row in range(len(prompts))]) for site in means[0]}


def baselines(model: Model, prompts: tn.PromptSet, texts: Sequence[str]) -> dict[str, tuple[Baseline, dict[str, Any]]]:
    """The baselines by name, with further keyword arguments of `attribute`."""
    return {
        "zero": ("zero", {}),
        "input: end_of_text": ("input", {"baseline_input": "end_of_text"}),
        "mean: kept prompts": (tn.mean_activations(model, prompts), {}),
        "mean: other half": (mean_of_other_half(model, prompts), {}),
        "mean: unrelated text": (tn.mean_activations(model, text_prompts(model, texts)), {}),
    }


def measure(model: Model, questions: tn.QuestionSet) -> list[dict[str, Any]]:
    """One record for each baseline and threshold."""
    prompts = tn.manipulation_check(model, tn.build_prompts(model, questions)).prompts
    texts = [text for text in plain_texts(model) if isinstance(text, str)]
    of_baseline, unrelated = texts[0::2], texts[1::2]
    records, zero_sets = [], {}
    # without biases, zero embeddings give zero activations
    blank = tn.attribute(model, prompts[:1], baseline="input", baseline_input="zero_embeddings", n_steps=5)
    zero = tn.attribute(model, prompts[:1], baseline="zero", n_steps=5)
    is_same = all(torch.equal(blank.difference[site], zero.difference[site]) for site in zero.difference)
    for name, (baseline, options) in baselines(model, prompts, of_baseline).items():
        with counted_rows() as rows:
            scores, seconds = timed(
                lambda b=baseline, o=options: tn.attribute(model, prompts, baseline=b, method="adaptive", **o)
            )
        found = scores.convergence()
        assert found is not None
        assert scores.n_nodes is not None
        sample = prompts[:N_SAMPLE]
        first = (
            {s: v[:N_SAMPLE] if v.ndim == 3 else v for s, v in baseline.items()}
            if isinstance(baseline, Mapping)
            else baseline
        )
        rule = tn.convergence_check(model, sample, n_steps=20, baseline=first, **options)
        site, layer, worst = rule.worst()
        about = {
            "baseline": name,
            "n_prompts": len(prompts),
            "rows_per_prompt": round(sum(rows) / len(prompts), 1),
            "seconds_per_prompt": round(seconds / len(prompts), 2),
            "rough_places_per_prompt": round(
                float(sum((n > 16).sum() for n in scores.n_nodes.values()) / len(prompts)), 2
            ),
            "unconverged_places": sum(place.n_prompts for place in found.unconverged()),
            "riemann_20_worst_error": round(worst, 4),
            "riemann_20_worst_place": f"{site} {layer}",
            "riemann_20_median_error": float(f"{rule.median():.2g}"),
            "riemann_20_jaccard": round(float(rule.jaccard.mean()), 3),
            "same_as_zero_embeddings": is_same if name == "zero" else None,
        }
        print(about, flush=True)
        for t in THRESHOLDS:
            neurons = tn.select_neurons(scores, adaptive_threshold=t).neurons
            zero_sets.setdefault(t, neurons)
            record = {
                **about,
                "t": t,
                "n_found": len(neurons),
                "jaccard_with_zero": round(neurons.jaccard(zero_sets[t]), 3),
            }
            record |= effect(model, questions, neurons, unrelated)
            print(record, flush=True)
            records.append(record)
    return records


def effect(model: Model, questions: tn.QuestionSet, neurons: tn.NeuronSet, texts: Sequence[str]) -> dict[str, Any]:
    """Accuracy, answer mass and loss on unrelated text, unablated and with neurons zero-ablated."""
    conditions = ("unablated", "random_matched", "ablated")
    evaluation = tn.evaluate(model, questions, neurons, n_repetitions=2, conditions=conditions)
    results: dict[str, Any] = {"neurons": list(map(str, neurons))}
    for name, condition in evaluation.conditions.items():
        results[f"accuracy_{name}"] = round(float(condition.accuracy), 4)
        results[f"answer_mass_{name}"] = round(float(condition.answer_mass), 4)
    results["text_loss_unablated"] = round(text_loss(model, texts), 3)
    results["text_loss_ablated"] = round(text_loss(model, texts, neurons=neurons), 3)
    early = tn.NeuronSet(n for n in neurons if n.layer <= 1)
    results["n_in_layers_0_and_1"] = len(early)
    return results


INTRODUCTION = """# Comparison of the baselines

`benchmarks/baselines.py` writes this page. Integrated gradients need a baseline, the point at which the path of every neuron
begins. The paper names the activation "when the baseline input is applied" (2.1) and leaves the input open. All scores were
computed with the method "adaptive" and a tolerance of 1e-3; neurons were selected with the default rules and zero-ablated.

- `rows`: rows that the engine runs per prompt; riemann_right with m = 20 runs {riemann:,}. `rough`: number of places (site and
  layer) per prompt that take more than 16 nodes. `not converged`: number of places over all prompts.
- `Riemann, m = 20`: the largest and the median error of the paper's rule from the same baseline, as a fraction of the largest
  score of the prompt and site, and the overlap (Jaccard, t = 20 %) of its salient neurons with the converged ones, on
  {n_sample} prompts.
- `found`: number of neurons, in brackets those in layers 0 and 1. `J`: overlap (Jaccard) with those of the zero baseline.
- `accuracy`, `mass`: accuracy and answer mass with the neurons zero-ablated, and, after the slash, with as many random neurons
  of the same sites and layers. `loss`: loss on unrelated text in nats per token.

With `baseline_input="zero_embeddings"` the scores are {same} as with the zero baseline, since this model has no biases.
`"blanked"` needs a template around the question, which a completion does not have.
"""


def markdown(results: Mapping[str, Any]) -> str:
    """The page."""
    records = results["records"]
    one = records[0]
    same = "the same" if one["same_as_zero_embeddings"] else "not the same"
    page = INTRODUCTION.format(riemann=results["riemann_rows"], n_sample=N_SAMPLE, same=same)
    page += f"\n## {results['model']}, {results['questions']}\n\n{one['n_prompts']} of {results['n_questions']} questions, which the model answers correctly.\n\n"
    page += "| baseline | rows | rough | not converged | Riemann, m = 20: largest, median error | J |\n|---|---|---|---|---|---|\n"
    for row in records[:: len(THRESHOLDS)]:
        cells = [
            row["baseline"].replace("_", r"\_"),
            f"{row['rows_per_prompt']:.0f}",
            f"{row['rough_places_per_prompt']:.1f}",
        ]
        cells += [
            str(row["unconverged_places"]),
            f"{row['riemann_20_worst_error']:.2g} ({row['riemann_20_worst_place']})",
        ]
        cells[-1] += f", {row['riemann_20_median_error']:.1g}"
        page += f"| {' | '.join([*cells, format(row['riemann_20_jaccard'], '.2f')])} |\n"
    page += (
        f"\nUnablated: accuracy {100 * one['accuracy_unablated']:.1f} %, answer mass {one['answer_mass_unablated']:.2f}, loss "
        f"{one['text_loss_unablated']:.2f}.\n\n"
    )
    page += "| baseline | t | found | J | accuracy (%) | mass | loss |\n|---|---|---|---|---|---|---|\n"
    for row in records:
        cells = [row["baseline"].replace("_", r"\_"), f"{100 * row['t']:.0f} %"]
        cells += [f"{row['n_found']} ({row['n_in_layers_0_and_1']})", _number(row["jaccard_with_zero"])]
        if row["n_found"]:
            cells.append(f"{100 * row['accuracy_ablated']:.1f} / {100 * row['accuracy_random_matched']:.1f}")
            cells.append(f"{row['answer_mass_ablated']:.3f} / {row['answer_mass_random_matched']:.3f}")
            cells.append(f"{row['text_loss_ablated']:.2f}")
        else:
            cells += ["–", "–", "–"]
        page += f"| {' | '.join(cells)} |\n"
    return page


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cities", type=Path, help="CSV file with the columns city and correct_country")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("-n", type=int, default=160, help="number of questions")
    parser.add_argument("--page", action="store_true", help="write the page from the stored results")
    arguments = parser.parse_args()
    if arguments.page:
        PAGE.write_text(markdown(json.loads(RESULTS.read_text())), encoding="utf-8")
        return
    model = tn.load_model(arguments.model)
    questions = city_questions(arguments.cities, arguments.n)
    results = {"model": Path(arguments.model).name, "questions": questions.name, "machine": machine()}
    results |= {
        "n_questions": len(questions),
        "riemann_rows": 20 * 2 * model.cfg.n_layers + 1,
        "records": measure(model, questions),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
