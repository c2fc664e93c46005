"""The fast engine: rows of one position each, on the frozen keys and values of the prompt before them.

Only the last position is interpolated and attention is causal, so the keys and values of the earlier positions never change.
The prompt is run once; after that every (site, layer, step) is a single position that attends to the frozen prefix and to
itself. Rows join at the layer they touch, since below it they equal the untouched run; where rows differ in MLP neurons they
may join right above it, by what W_out makes of them. The results are those of the direct engine; the cost per prompt is about
T tokens through the stack and 2 L m through half of it, instead of 2 L m T through all of it.

The rows of a prompt stand side by side as sibling positions of one sequence; how a kind of model runs them is its own affair
(`Siblings`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from tn_lens.attribution.engines.direct import stack_layers
from tn_lens.attribution.methods.integrated_gradients import ROWS_UNEMBEDDED, Place, replacing
from tn_lens.attribution.result import PassSize
from tn_lens.inference.forward import pad_left
from tn_lens.models import Model, backend_of
from tn_lens.neurons.neuron import Site, hook_name
from tn_lens.prompts import Prompt


def unsupported(model: Model) -> str | None:
    """Why a model needs the direct engine; None if it does not."""
    backend = backend_of(model)
    return backend.unshareable or ("layers on several devices" if backend.n_devices > 1 else None)


LAYERS_PER_PASS = 8
"""At most so many layers have rows that run together: more fill the matrix products better and cost memory."""
RESERVED = 24 * 2**20
"""Bytes of `max_memory` left to what the products' own buffers and a prompt's frozen state take; at most half of it."""
PROMPTS_PER_PASS = 16
"""At most so many prompts side by side, where memory allows."""


def plan(model: Model, n_tokens: int, n_places: int, n_steps: int, max_memory: int) -> PassSize:
    """How many prompts and rows go into one pass: constants of the model's shape and the budget, never of free memory.

    Args:
        n_tokens: of the longest prompt.
        n_places: sites of one layer.
        max_memory: bytes that one pass may take above the weights, by an estimate of what its backward pass keeps and of
            what running the prompts takes.
    """
    backend = backend_of(model)
    space, size = backend.space, backend.dtype.itemsize
    n_rows = space.n_layers * n_places * (n_steps + 1)  # one at the baseline
    n_rows = math.ceil(n_rows / math.ceil(space.n_layers / LAYERS_PER_PASS))
    d_mlp, d_attn = space.d_mlp, space.n_heads * space.d_head
    d_cached = 2 * space.d_head * backend.n_key_value_heads
    of_row, of_logits = backend.kept_by_row(n_tokens, n_rows), 5 * backend.wide_dtype.itemsize * backend.d_vocab
    of_position = space.n_layers * d_cached + 6 * space.d_model + 3 * d_attn + 4 * d_mlp + 4 * space.n_heads * n_tokens
    free = max_memory - min(RESERVED, max_memory // 2)
    few = free // (of_row + of_logits)
    fitting = few if few < ROWS_UNEMBEDDED else (free - ROWS_UNEMBEDDED * of_logits) // of_row
    n_prompts = min(PROMPTS_PER_PASS, fitting // n_rows, max_memory // (size * n_tokens * of_position))
    return PassSize(max(1, n_prompts), max(1, min(n_rows, fitting)))


class SharedPrefix:
    """Some prompts of any length, and single positions behind their common prefix with activations replaced."""

    def __init__(self, model: Model, prompts: Sequence[Prompt], sites: Sequence[Site]) -> None:
        backend = backend_of(model)
        self.prompts = list(prompts)
        n_layers = backend.space.n_layers
        names = {hook_name(site, layer) for site in sites for layer in range(n_layers)}
        tokens, mask = (tensor.to(backend.device) for tensor in pad_left(prompts))
        self.siblings = backend.siblings(tokens, mask, names)
        self.logits = self.siblings.logits
        in_order: list[Site] = sorted(sites, key=lambda site: site == "mlp")  # whose rows may join last
        self.own = stack_layers(self.siblings.kept, in_order, n_layers)

    def carry(self, place: Place, activation: Float[Tensor, "*batch neuron"]) -> Float[Tensor, "*batch _"]:
        """What W_out makes of MLP neurons, where rows may join above their layer."""
        w_out = self._w_out(place)
        return activation if w_out is None else (activation.to(w_out.dtype) @ w_out).to(activation.dtype)

    def carry_back(self, place: Place, gradient: Float[Tensor, "*batch _"]) -> Float[Tensor, "*batch neuron"]:
        """The same weights the other way."""
        w_out = self._w_out(place)
        return gradient if w_out is None else (gradient.to(w_out.dtype) @ w_out.T).to(gradient.dtype)

    def run(
        self,
        paths: Mapping[Place, Float[Tensor, "prompt _ 1 _"]],
        nudges: Mapping[Place, Float[Tensor, "prompt 1 1 _"]],
    ) -> Float[Tensor, "prompt row _"]:
        """The rows; `paths` go up the layers, and the rows of each join at theirs or right above it."""
        beyond = {place for place in paths if self._w_out(place) is not None}
        written = {layer: path[:, :, 0] for (site, layer), path in paths.items() if (site, layer) in beyond}
        of_layer = Counter({0: 1} if nudges else {})
        for (site, layer), path in paths.items():
            if (site, layer) not in beyond:
                of_layer[layer] += path.shape[1]
        hooks = replacing(paths, nudges, lambda rows: (slice(None), rows), beyond)
        return self.siblings.run(of_layer, hooks, written)

    def logits_of(self, final: Float[Tensor, "prompt row _"]) -> Float[Tensor, "prompt row vocab"]:
        """Logits of rows that were run."""
        return self.siblings.logits_of(final)

    def _w_out(self, place: Place) -> Float[Tensor, "neuron d_model"] | None:
        """Weights that stand between the activation and what the rows of this place begin with; None if nothing does."""
        site, layer = place
        return self.siblings.w_out(layer) if site == "mlp" else None
