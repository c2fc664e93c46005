"""Where the time of a whole run goes: `python benchmarks/run_profile.py NAME -- run --model toy --questions toy --out runs/profile`.

Executes the `tn-lens` command after `--` in this process, and samples the stack of the main thread every 20 ms. A sample counts for the
model if the model's forward or backward pass is on the stack, for loading if packages are imported or weights are read, and
otherwise for the innermost package of tn_lens. Adds a row called NAME to run_profile.json.

With --shape MODEL instead of a command, runs two questions of the toy world through a model of this size with random weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from measuring import machine

RESULTS = Path(__file__).with_suffix(".json")
PAUSE = 0.02
"""Seconds between two samples."""
PASSES = ("/transformer_lens/", "/torch/autograd/", "/tn_lens/attribution/engines/", "/tn_lens/inference/forward.py")
"""Parts of the paths of the files that run the model."""
LOADING = {"load_model", "_find_and_load"}
"""Functions that read weights, and the one of Python's import system."""


def kind_of(frame: FrameType | None) -> str:
    """What the main thread does, from its innermost frame."""
    package = "other"
    is_pass = False
    while frame is not None:
        path = frame.f_code.co_filename
        if frame.f_code.co_name in LOADING:
            return "loading"
        is_pass = is_pass or any(part in path for part in PASSES)
        _, found, inside = path.rpartition("/tn_lens/")
        if found and package == "other":
            package = inside.partition("/")[0].removesuffix(".py")
        frame = frame.f_back
    return "model" if is_pass else package


class Sampler(threading.Thread):
    """A thread that counts what the main thread does."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.counts: Counter[str] = Counter()
        self.done = threading.Event()

    def run(self) -> None:
        main = threading.main_thread().ident
        while not self.done.wait(PAUSE):
            self.counts[kind_of(sys._current_frames().get(main or 0))] += 1


def shares(counts: Counter[str]) -> dict[str, float]:
    """Fraction of the samples of each kind, largest first."""
    return {kind: round(n / counts.total(), 4) for kind, n in counts.most_common()}


def run_command(command: list[str]) -> None:
    """Run tn-lens in this process."""
    from tn_lens import cli  # the imports are part of the run

    sys.argv = ["tn-lens", *command]
    try:
        cli.main()
    except SystemExit as done:
        if done.code:
            raise


def run_shape(shape: str) -> None:
    """A small run of a model with random weights in bfloat16."""
    import torch
    from real_size import SHAPES, random_weights

    from tn_lens import Settings, find_truth_neurons, load_model, load_questions

    weights = random_weights(SHAPES[shape](), torch.bfloat16)
    tokenizer = load_model("toy").tokenizer
    model = load_model(shape, hf_model=weights, dtype="bfloat16", device="cpu", tokenizer=tokenizer)
    settings = Settings(limit=2, n_repetitions=1, adaptive_threshold=0.2, controls=("random",), convergence_sample=0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        find_truth_neurons(
            model, load_questions("toy"), settings, out=out, force=True, texts=["The cat sat on the mat ."]
        )


def main() -> None:
    """Profile one run, and store the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the row")
    parser.add_argument("command", nargs="*", help="arguments of tn-lens, after --")
    parser.add_argument("--shape", help="run a model of this name's size instead")
    arguments = parser.parse_args()
    sampler, start = Sampler(), time.perf_counter()
    sampler.start()
    run_shape(arguments.shape) if arguments.shape else run_command(arguments.command)
    sampler.done.set()
    sampler.join()
    seconds = time.perf_counter() - start
    row: dict[str, Any] = {
        "name": arguments.name,
        "run": f"2 questions, {arguments.shape}" if arguments.shape else " ".join(["tn-lens", *arguments.command]),
        "seconds": round(seconds, 1),
        "shares": shares(sampler.counts),
        "outside_the_model": round(
            sum(n for kind, n in sampler.counts.items() if kind not in ("model", "loading")) / sampler.counts.total(), 4
        ),
        "machine": machine(),
    }
    print(json.dumps(row, indent=1))
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [other for other in rows if other["name"] != row["name"]] + [row]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
