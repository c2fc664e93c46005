"""Compare scores and found neurons in bfloat16 and float16 with those in float32: `python benchmarks/precision.py`.

The model is the embedded one, and all dtypes use the same questions. Writes precision.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tn_lens import attribute, build_prompts, load_model, load_questions, manipulation_check, select_neurons
from tn_lens.neurons import NEURON_SITES

RESULTS = Path(__file__).with_suffix(".json")


def main() -> None:
    """Measure, and write the results."""
    exact = load_model("toy", dtype="float32")
    prompts = manipulation_check(exact, build_prompts(exact, load_questions("toy").part("find"), order="both")).prompts
    reference = attribute(exact, prompts)
    rows = []
    for dtype in ("bfloat16", "float16"):
        scores = attribute(load_model("toy", dtype=dtype), prompts)
        row: dict[str, object] = {"dtype": dtype, "n_prompts": len(prompts)}
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
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
