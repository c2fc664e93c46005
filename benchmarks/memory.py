"""Measure the memory of attribution above the weights: `python benchmarks/memory.py`.

The peak is compared with the budget, and over 10 to 1,000 prompts. Scores are written to a run folder chunk by chunk, as in a
run. The budget limits the allocated memory. A process also keeps freed memory for reuse, which is reported as resident memory and
does not belong to any pass. Writes memory.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import Peak, machine, random_model, random_prompt, with_peak

from tn_lens import PromptSet, attribute
from tn_lens.models import Model, lay_out_weights
from tn_lens.runs.chunks import PROMPTS_ATTRIBUTED
from tn_lens.runs.folder import SCORES, RunFolder
from tn_lens.selection.stored import pack_scores

RESULTS = Path(__file__).with_suffix(".json")
MIB = 2**20


def run(
    model: Model, n_prompts: int, n_tokens: int, max_memory: int, method: str = "riemann_right"
) -> tuple[Peak, int]:
    """Attribute random prompts, and return the peak memory and the number of rows in one pass."""
    prompts = PromptSet(tuple(random_prompt(n_tokens, seed) for seed in range(n_prompts)))
    n_together = 0

    def attribute_chunks() -> None:
        nonlocal n_together
        with tempfile.TemporaryDirectory() as scratch, RunFolder.open(Path(scratch) / "run", {}) as folder:
            for index, chunk in enumerate(prompts.chunks(PROMPTS_ATTRIBUTED)):
                scores = attribute(model, chunk, method=method, engine="shared_prefix", max_memory=max_memory)
                prompts_per_pass, rows_per_prompt = scores.pass_size
                n_together = rows_per_prompt * min(prompts_per_pass, len(chunk))
                folder.write_chunk(SCORES, index, pack_scores(scores))

    _, peak = with_peak(attribute_chunks)
    return peak, n_together


def mib(peak: Peak) -> dict[str, int]:
    """The peak memory in MiB, as fields of a row."""
    return {"peak_mib": round(peak.allocated / MIB), "resident_mib": round(peak.resident / MIB)}


def peak_of(n_prompts: int) -> dict[str, int]:
    """The peak memory for a number of prompts on a small model."""
    model = lay_out_weights(random_model(256, 4))
    attribute(model, random_prompt(64), n_steps=1)  # excludes one-time setup from the measurement
    return mib(run(model, n_prompts, 64, 128 * MIB)[0])


def main() -> None:
    """Measure, and write the results. Each number of prompts has its own process, since freed memory is reused."""
    if len(sys.argv) > 1:
        print(json.dumps(peak_of(int(sys.argv[1]))))
        return
    counts = []
    for n in (10, 100, 1000):
        done = subprocess.run([sys.executable, __file__, str(n)], capture_output=True, text=True, check=True)
        counts.append({"n_prompts": n, "max_memory_mib": 128, **json.loads(done.stdout)})
        print(counts[-1], flush=True)
    model = lay_out_weights(random_model(512, 12))
    attribute(model, random_prompt(128), n_steps=1)
    budgets = []
    for method in ("riemann_right", "adaptive"):
        for budget in (64, 128, 256, 512, 1024, 2048):
            peak, rows = run(model, 4, 128, budget * MIB, method)
            budgets.append({"method": method, "max_memory_mib": budget, **mib(peak), "rows_in_a_pass": rows})
            print(budgets[-1], flush=True)
    results = {"machine": machine(), "budgets": budgets, "prompts": counts}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
