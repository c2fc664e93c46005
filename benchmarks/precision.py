"""Compare scores, found neurons and speed in bfloat16 and float16 with those in float32: `python benchmarks/precision.py`.

All dtypes use the same questions: those of the toy world for the embedded model, and `common_facts` for other models
(`--model smollm2 --prompts 24`). Writes the rows of the model to precision.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from measuring import machine, timed

from tn_lens import attribute, build_prompts, load_model, load_questions, manipulation_check, select_neurons
from tn_lens.neurons import NEURON_SITES

RESULTS = Path(__file__).with_suffix(".json")


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--prompts", type=int, help="maximum number of questions; by default all")
    parser.add_argument("--method", default="riemann_right")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    given = parser.parse_args()
    exact = load_model(given.model, dtype="float32")
    questions = load_questions("toy" if given.model == "toy" else "common_facts").part("find")
    if given.prompts:
        questions = questions[:: max(1, len(questions) // given.prompts)][: given.prompts]
    prompts = manipulation_check(exact, build_prompts(exact, questions, order="both")).prompts
    reference, seconds = timed(lambda: attribute(exact, prompts, method=given.method))
    rows = []
    for dtype in given.dtypes:
        model = load_model(given.model, dtype=dtype)
        scores, rounded_seconds = timed(lambda model=model: attribute(model, prompts, method=given.method))
        row: dict[str, object] = {
            "model": given.model,
            "method": given.method,
            "dtype": dtype,
            "n_prompts": len(prompts),
            "seconds_relative_to_float32": round(rounded_seconds / seconds, 2),
            "machine": machine(),
        }
        for site in NEURON_SITES:
            a, b = reference.difference[site], scores.difference[site]
            correlations = [
                torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1] for x, y in zip(a, b, strict=True)
            ]
            largest = (a - b).abs().amax((1, 2)) / a.abs().amax((1, 2))
            row[f"median_correlation_{site}"] = round(float(torch.stack(correlations).median()), 5)
            row[f"median_largest_difference_{site}"] = round(float(largest.median()), 4)
        for t in (0.01, 0.05, 0.1, 0.2):
            exact_set, rounded_set = (select_neurons(s, adaptive_threshold=t).neurons for s in (reference, scores))
            row[f"found_at_{t:.0%}"] = [len(exact_set), len(rounded_set), round(exact_set.jaccard(rounded_set), 3)]
        rows.append(row)
        print(row, flush=True)
    stored = json.loads(RESULTS.read_text())
    others = [row for row in stored if (row["model"], row["method"]) != (given.model, given.method)]
    RESULTS.write_text(json.dumps([*others, *rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
