"""Selecting again from the stored scores of a large run: `python benchmarks/reselection.py`.

Writes 790 prompts x 757,760 neurons (OLMo-2-13B's size) of random scores to a temporary run folder, and runs
`tn-lens select` on it in fresh processes. Writes reselection.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import machine

from tn_lens import Prompt
from tn_lens.neurons.neuron import NeuronSpace, Site
from tn_lens.runs.folder import RunFolder
from tn_lens.runs.units import cut_prompts
from tn_lens.selection.stored import StoredScores

RESULTS = Path(__file__).with_suffix(".json")
SPACE = NeuronSpace(n_layers=40, d_mlp=13824, n_heads=40, d_head=128)
N_PROMPTS = 790


def write_run(path: Path) -> int:
    """Heavy-tailed noise with a few neurons that are always salient; the bytes it takes."""
    folder = RunFolder.open(path, {"model": "random"})
    prompts = [
        Prompt(token_ids=(), label_ids=(), right=q % 2, question=q, category=str(q % 38)) for q in range(N_PROMPTS)
    ]
    stored = StoredScores(folder, SPACE, cut_prompts(prompts))
    stored.save_index()
    torch.manual_seed(0)
    sites: tuple[Site, ...] = ("mlp", "attn")
    for index, shard in enumerate(stored.shards):
        tensors: dict[str, torch.Tensor] = {}
        for site in sites:
            scores = torch.randn(len(shard), SPACE.n_layers, SPACE.width(site)).pow_(3) / 100
            scores[:, 20, :50] = 0.5 + 0.2 * torch.randn(len(shard), 50)
            tensors[site] = scores.clamp_(-1, 1).half()
            tensors[f"{site}.scale"] = torch.full((len(shard),), 0.1)
            tensors[f"{site}.gap"] = tensors[f"{site}.change"] = torch.zeros(len(shard), SPACE.n_layers)
            tensors[f"{site}.change"] = tensors[f"{site}.change"].clone()
        folder.write_unit("scores", index, tensors)
    return sum(file.stat().st_size for file in (path / "scores").iterdir())


def measured(*arguments: str) -> tuple[float, int]:
    """Seconds and peak bytes of a fresh process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "tn_lens", "select", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    """Measure and write."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "run"
        size = write_run(path)
        print(f"{size / 2**30:.2f} GiB, {size / N_PROMPTS / SPACE.n_neurons:.3f} bytes a score", flush=True)
        for options in (("--t", "0.1"), ("--t", "0.2", "--correction", "holm"), ("--t", "0.1", "--sweep")):
            seconds, peak = measured(str(path), *options)
            rows.append({"options": " ".join(options), "seconds": round(seconds, 1), "peak_mib": round(peak / 2**20)})
            print(rows[-1], flush=True)
    results = {
        "machine": machine(),
        "n_prompts": N_PROMPTS,
        "n_neurons": SPACE.n_neurons,
        "bytes_per_score": round(size / N_PROMPTS / SPACE.n_neurons, 3),
        "runs": rows,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
