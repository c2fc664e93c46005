"""Count the operations that each backend launches for one prompt: `python benchmarks/launches.py`.

A GPU is idle until the next kernel is launched. If the matrix products are small, the time therefore depends on the number of
operations and on the time that the host needs to launch them. The model here is so narrow that the measured seconds are
the time of the host.
Views are not counted. If the products are large, the number of layers that a row passes matters instead, which is counted as
well. Writes launches.json.
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
from tn_lens.neurons import NEURON_SITES

RESULTS = Path(__file__).with_suffix(".json")
N_LAYERS, N_TOKENS = 28, 110
"""The layers of Llama-3.2-3B and the length of a TruthfulQA prompt; the width does not affect the count."""


class Operations(TorchDispatchMode):
    """Counts the operations that reach the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = "view" in func._schema.name or any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view:
            self.counted[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def layers_a_row_passes(model: Model) -> float:
    """Average number of layers that a row passes, counted in the outputs of the blocks."""
    passed = 0

    def count(block: object, given: object, output: Any) -> None:
        nonlocal passed
        if torch.is_grad_enabled():  # without gradients it is the prompt itself
            passed += (output[0] if isinstance(output, tuple) else output).shape[1]

    handles = [block.register_forward_hook(count) for block in model.blocks]
    try:
        ours(model, random_prompt(N_TOKENS))
    finally:
        for handle in handles:
            handle.remove()
    return passed / (len(NEURON_SITES) * N_LAYERS * N_STEPS + 1)  # plus the row at the common end of all paths


def main() -> None:
    """Count, and write the results."""
    model = lay_out_weights(random_model(64, N_LAYERS))
    rows = []
    scores = []
    torch.set_num_threads(1)
    for kind, backend in (("hooked", model), ("bridge", bridge_of(model))):
        ours(backend, random_prompt(4), n_steps=1)
        with Operations() as operations:
            scores.append(ours(backend, random_prompt(N_TOKENS)).difference["mlp"])
        counted = operations.counted
        seconds = min(timed(lambda backend=backend: ours(backend, random_prompt(N_TOKENS)))[1] for _ in range(5))
        rows.append(
            {
                "backend": kind,
                "n_layers": N_LAYERS,
                "n_tokens": N_TOKENS,
                "operations": counted.total(),
                "seconds_of_the_host": round(seconds, 2),
                "layers_a_row_passes": round(layers_a_row_passes(backend), 2),
                "most": dict(counted.most_common(12)),
            }
        )
        print(rows[-1], flush=True)
    torch.testing.assert_close(*scores, atol=1e-4 * float(scores[0].abs().max()), rtol=0)
    RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
