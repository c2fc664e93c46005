"""Measure a new selection from the stored scores of a large run: `python benchmarks/reselection.py`.

Writes random scores for 790 prompts and 757,760 neurons (the size of OLMo-2-13B) to a temporary run folder, and runs
`tn-lens select` on it in new processes. Writes reselection.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from measuring import machine

from tn_lens import Prompt, PromptSet, Settings
from tn_lens.neurons import NeuronSpace
from tn_lens.runs.chunks import PROMPTS_ATTRIBUTED, chunk_key
from tn_lens.runs.folder import SCORES, RunFolder
from tn_lens.selection.stored import StoredScores

RESULTS = Path(__file__).with_suffix(".json")
SPACE = NeuronSpace(n_layers=40, d_mlp=13824, n_heads=40, d_head=128)
N_PROMPTS = 790


def write_run(path: Path) -> int:
    """Write heavy-tailed noise with a few neurons that are salient in every question, and return the size in bytes."""
    prompts = PromptSet(
        tuple(
            Prompt(token_ids=(), label_ids=(), right=number % 2, question=str(number), category=str(number % 38))
            for number in range(N_PROMPTS)
        )
    )
    chunks = prompts.chunks(PROMPTS_ATTRIBUTED)
    keys = tuple(chunk_key(index) for index in range(len(chunks)))
    torch.manual_seed(0)
    with RunFolder.open(path, {"model": "random", **asdict(Settings())}) as folder:
        StoredScores(folder, SPACE, chunks, keys).save_index()
        for index, (chunk, key) in enumerate(zip(chunks, keys, strict=True)):
            tensors: dict[str, torch.Tensor] = {}
            for site in SPACE.sites:
                scores = torch.randn(len(chunk), SPACE.n_layers, SPACE.width(site)).pow_(3) / 100
                scores[:, 20, :50] = 0.5 + 0.2 * torch.randn(len(chunk), 50)
                tensors[site] = scores.clamp_(-1, 1).half()
                tensors[f"{site}.scale"] = torch.full((len(chunk),), 0.1)
                tensors[f"{site}.gap"] = torch.zeros(len(chunk), SPACE.n_layers)
                tensors[f"{site}.change"] = torch.zeros(len(chunk), SPACE.n_layers)
            folder.write_chunk(SCORES, index, tensors, key)
    return sum(file.stat().st_size for file in (path / SCORES).iterdir())


def measured(*arguments: str) -> tuple[float, int]:
    """Run `tn-lens select` in a new process, and return its seconds and its peak memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "tn_lens", "select", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    """Measure, and write the results."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "run"
        size = write_run(path)
        print(f"{size / 2**30:.2f} GiB, {size / N_PROMPTS / SPACE.n_neurons:.3f} bytes per score", flush=True)
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
