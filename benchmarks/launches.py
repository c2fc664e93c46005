"""How many operations each backend asks of the device for one prompt: `python benchmarks/launches.py`.

A GPU is idle wherever it waits for the next kernel: where the products are small for it, what counts is how many operations
there are and how long the host takes to ask for them. The model here is so narrow that its seconds are the host's. Views are
not counted. The rows' passes through layers stand beside that, for where products are large. Writes launches.json.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from attribution import N_STEPS, ours
from measuring import bridge_of, machine, random_model, random_prompt, timed
from torch.utils._python_dispatch import TorchDispatchMode

from tn_lens.models import Model, lay_out_weights
from tn_lens.neurons.neuron import SITES

RESULTS = Path(__file__).with_suffix(".json")
N_LAYERS, N_TOKENS = 28, 110
"""Llama-3.2-3B's layers and a prompt of TruthfulQA; the width makes no difference to the count."""


class Operations(TorchDispatchMode):
    """Counts what reaches the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [one.alias_info for one in func._schema.returns]
        views = "view" in func._schema.name or any(alias is not None and not alias.is_write for alias in returned)
        if not views:
            self.counted[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def layers_a_row_passes(model: Model) -> float:
    """On average, counted in the blocks' outputs."""
    passed = 0

    def count(block: object, given: object, output: Any) -> None:
        nonlocal passed
        if torch.is_grad_enabled():  # else it is the prompt itself
            passed += (output[0] if isinstance(output, tuple) else output).shape[1]

    handles = [block.register_forward_hook(count) for block in model.blocks]
    try:
        ours(model, random_prompt(N_TOKENS))
    finally:
        for handle in handles:
            handle.remove()
    return passed / (len(SITES) * N_LAYERS * N_STEPS + 1)  # the row in which all paths end is one


def main() -> None:
    """Count and write."""
    model = lay_out_weights(random_model(64, N_LAYERS))
    rows = []
    scores = []
    torch.set_num_threads(1)
    for kind, one in (("hooked", model), ("bridge", bridge_of(model))):
        ours(one, random_prompt(4), n_steps=1)
        with Operations() as operations:
            scores.append(ours(one, random_prompt(N_TOKENS)).difference["mlp"])
        counted = operations.counted
        seconds = min(timed(lambda one=one: ours(one, random_prompt(N_TOKENS)))[1] for _ in range(5))
        rows.append(
            {
                "backend": kind,
                "n_layers": N_LAYERS,
                "n_tokens": N_TOKENS,
                "operations": counted.total(),
                "seconds_of_the_host": round(seconds, 2),
                "layers_a_row_passes": round(layers_a_row_passes(one), 2),
                "most": dict(counted.most_common(12)),
            }
        )
        print(rows[-1], flush=True)
    torch.testing.assert_close(*scores, atol=1e-4 * float(scores[0].abs().max()), rtol=0)
    RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
