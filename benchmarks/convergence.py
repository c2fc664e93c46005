"""Compare methods of integrated gradients with a converged reference on a trained model, and count the rows that they run.

The reference is a Gauss-Legendre rule of 20 nodes where it agrees with one of 12 nodes, and otherwise a composite rule of
equal panels with 8 nodes each, whose number is doubled until two results agree. Errors are the largest error of a score at a
site and layer, relative to the largest score of the prompt and site.

Prompts are TruthfulQA questions in the form of figure 9, and completions ("The city of Cali is in the country of").
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparing import city_questions, composite, counted_rows, from_zero, jaccard, salient, summed
from measuring import machine
from torch import Tensor

import tn_lens as tn
from tn_lens.attribution.methods.method import Place
from tn_lens.attribution.quadrature import quadrature_rule
from tn_lens.models import Model
from tn_lens.neurons import NEURON_SITES

RESULTS = Path(__file__).parent / "convergence.json"
AGREEMENT = {"single": 1e-5, "composite": 1e-4}
"""Largest difference, relative to the largest score, of two rules that are taken to have converged."""
MOST_PANELS = 512
SHARES = (0.2, 0.05, 0.01)
"""Thresholds t, as fractions of the largest score, at which sets of salient neurons are compared."""
METHODS: Mapping[str, dict[str, Any]] = {
    "adaptive, 1e-3": {"method": "adaptive"},
    "riemann_right, 20": {"n_steps": 20},
    "riemann_right, 20, tolerance 1e-3": {"n_steps": 20, "tolerance": 1e-3},
    "gausslegendre, 5": {"n_steps": 5, "method": "gausslegendre"},
}


def reference(model: Model, prompt: tn.Prompt) -> tuple[dict[Place, Tensor], dict[Place, float], dict[Place, int]]:
    """Converged scores of one prompt, how far the last two rules differ, and the number of nodes, by place."""
    paths = from_zero(model, prompt)
    rules = [quadrature_rule("gausslegendre", n) for n in (12, 20)]
    coarse, fine = (summed(paths, paths.places, rule.nodes, rule.weights) for rule in rules)
    rough, n_panels, kind = paths.places, 8, "single"
    differences, n_nodes = {}, dict.fromkeys(paths.places, 20)
    while True:
        scale = {s: max(float(v.abs().max()) for (site, _), v in fine.items() if site == s) for s in NEURON_SITES}
        for place in rough:
            differences[place] = float((fine[place] - coarse[place]).abs().max()) / scale[place[0]]
        rough = [place for place in rough if differences[place] > AGREEMENT[kind]]
        n_panels *= 2
        if not rough or n_panels > MOST_PANELS:
            return fine, differences, n_nodes
        if kind == "single":
            coarse |= summed(paths, rough, *composite(n_panels // 2))
        else:
            coarse |= {place: fine[place] for place in rough}
        kind = "composite"
        fine |= summed(paths, rough, *composite(n_panels))
        n_nodes |= dict.fromkeys(rough, 8 * n_panels)


def compare(model: Model, prompts: tn.PromptSet) -> list[dict[str, Any]]:
    """One record for each method: errors, estimates, rows and sets, over all prompts and places."""
    n_layers = model.cfg.n_layers
    known = []
    for index, prompt in enumerate(prompts):
        started = time.perf_counter()
        known.append(reference(model, prompt))
        rough = {f"{site} {layer}": n for (site, layer), n in known[-1][2].items() if n > 20}
        print(f"  reference {index}: {time.perf_counter() - started:.0f} s, composite at {rough}", flush=True)
    true = {
        s: torch.stack([torch.stack([f[s, layer] for layer in range(n_layers)]) for f, _, _ in known])
        for s in NEURON_SITES
    }
    scale = {site: values.abs().amax((1, 2)) for site, values in true.items()}
    unconverged = sum(d > AGREEMENT["composite"] for _, differences, _ in known for d in differences.values())
    records = []
    for name, options in METHODS.items():
        with counted_rows() as rows:
            started = time.perf_counter()
            found = tn.attribute(model, prompts, engine="shared_prefix", **options)
            seconds = time.perf_counter() - started
        errors = {s: (found.difference[s] - true[s]).abs().amax(2) / scale[s][:, None] for s in NEURON_SITES}
        flat = torch.cat([errors[s].flatten() for s in NEURON_SITES]).numpy()
        assert found.n_nodes is not None
        nodes = torch.stack([found.n_nodes[s] for s in NEURON_SITES])  # [site, prompt, layer]
        record: dict[str, Any] = {
            "method": name,
            "rows_per_prompt": round(sum(rows) / len(prompts), 1),
            "nodes_per_place": round(float(nodes.float().mean()), 2),
            "seconds_per_prompt": round(seconds / len(prompts), 3),
            "within_1e-3": round(float((flat <= 1e-3).mean()), 4),
            "error_quantiles": {str(q): float(f"{np.quantile(flat, q):.2g}") for q in (0.5, 0.9, 0.99, 1)},
        }
        for share in SHARES:
            sets = [
                jaccard(
                    *(salient(scores[i].flatten().numpy(), share) for scores in (found.difference[site], true[site]))
                )
                for site in NEURON_SITES
                for i in range(len(prompts))
            ]
            record[f"jaccard_{share:g}"] = {"mean": round(float(np.mean(sets)), 3), "least": round(min(sets), 3)}
        if found.error is not None and options.get("method") == "adaptive":
            estimates = torch.cat([(found.error[s] / scale[s][:, None]).flatten() for s in NEURON_SITES]).numpy()
            named = estimates > 1e-3 * 1.01
            record |= {
                "least_estimate_to_error": round(float((estimates / np.maximum(flat, 1e-12)).min()), 3),
                "named_as_not_converged": int(named.sum()),
                "wrong_and_not_named": int(((flat > 1e-3) & ~named).sum()),
            }
            own = (nodes - 1).sum((0, 2)) + 1  # all places share the last node
            record["rows_by_prompt"] = own.tolist()
            record["rough_places_by_prompt"] = (nodes > 16).sum((0, 2)).tolist()
        print(f"  {record}", flush=True)
        records.append(record)
    n_places = len(prompts) * n_layers * len(NEURON_SITES)
    return [{"n_prompts": len(prompts), "n_places": n_places, "reference_not_converged": unconverged}, *records]


def main() -> None:
    """Measure both kinds of prompts and write convergence.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--truthfulqa", help="TruthfulQA.csv")
    parser.add_argument("--cities", type=Path, help="a file with the columns city and correct_country")
    parser.add_argument("-n", type=int, default=20, help="number of prompts of each kind")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model = tn.load_model(arguments.model)
    sets = {}
    if arguments.cities:
        sets["completions"] = city_questions(arguments.cities, arguments.n)
    if arguments.truthfulqa:
        asked = tn.load_questions("truthfulqa", source=arguments.truthfulqa)
        sets["truthfulqa"] = asked.sample(arguments.n, np.random.default_rng(0))
    results: dict[str, Any] = {"model": Path(arguments.model).name, "machine": machine(), "torch": torch.__version__}
    for name, questions in sets.items():
        print(name, flush=True)
        results[name] = compare(model, tn.build_prompts(model, questions, order="random"))
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
