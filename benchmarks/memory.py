"""What attribution holds above the weights: against its budget, and over 10 and 1,000 prompts: `python benchmarks/memory.py`.

Writes memory.json. Scores go to a run folder shard by shard, as in a run. The budget is about what is allocated; a process
also keeps freed memory for later, which is given as resident and does not belong to any pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import Peak, machine, random_model, random_prompt, with_peak

from tn_lens import Prompt, attribute
from tn_lens.models import Model, lay_out_weights
from tn_lens.runs.folder import RunFolder
from tn_lens.runs.units import cut_prompts
from tn_lens.selection.stored import pack_scores

RESULTS = Path(__file__).with_suffix(".json")
MIB = 2**20


def run(model: Model, prompts: list[Prompt], max_memory: int) -> tuple[Peak, int]:
    """The peak, and rows in a pass."""
    rows = 0

    def shards() -> None:
        nonlocal rows
        with tempfile.TemporaryDirectory() as scratch:
            folder = RunFolder.open(Path(scratch) / "run", {})
            for index, shard in enumerate(cut_prompts(prompts)):
                found = attribute(model, shard, engine="shared_prefix", max_memory=max_memory)
                rows = found.pass_size.n_rows * min(found.pass_size.n_prompts, len(shard))
                folder.write_unit("scores", index, pack_scores(found))

    _, peak = with_peak(shards)
    return peak, rows


def mib(peak: Peak) -> dict[str, int]:
    """For a row."""
    return {"peak_mib": round(peak.allocated / MIB), "resident_mib": round(peak.resident / MIB)}


def of_count(n_prompts: int) -> dict[str, int]:
    """The peak of some prompts on a small model."""
    model = lay_out_weights(random_model(256, 4))
    attribute(model, random_prompt(64), n_steps=1)
    return mib(run(model, [random_prompt(64, seed) for seed in range(n_prompts)], 128 * MIB)[0])


def main() -> None:
    """Measure and write; every number of prompts in a process of its own, since freed memory is used again."""
    if len(sys.argv) > 1:
        print(json.dumps(of_count(int(sys.argv[1]))))
        return
    counts = []
    for n in (10, 100, 1000):
        done = subprocess.run([sys.executable, __file__, str(n)], capture_output=True, text=True, check=True)
        counts.append({"n_prompts": n, "max_memory_mib": 128, **json.loads(done.stdout)})
        print(counts[-1], flush=True)
    model = lay_out_weights(random_model(512, 12))
    prompts = [random_prompt(128, seed) for seed in range(4)]
    attribute(model, prompts[0], n_steps=1)
    budgets = []
    for budget in (64, 128, 256, 512, 1024, 2048):
        peak, rows = run(model, prompts, budget * MIB)
        budgets.append({"max_memory_mib": budget, **mib(peak), "rows_in_a_pass": rows})
        print(budgets[-1], flush=True)
    results = {"machine": machine(), "budgets": budgets, "prompts": counts}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
