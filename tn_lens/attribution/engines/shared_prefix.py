"""The fast engine: every row is a single position that attends to the cached keys and values of the prompt before it.

Only the last position is interpolated and attention is causal, so the keys and values of the earlier positions never
change. The prompt runs once. After that, every (site, layer, step) is a single position that attends to the frozen
prefix and to itself. A row joins at the layer in which it differs, since below that layer it equals the prompt without
intervention. Rows that differ in MLP neurons may join right above their layer, through their W_out projection. The
results equal those of the direct engine. The cost per prompt is about T tokens through all layers plus 2 L m tokens
through half of the layers, instead of 2 L m T tokens through all layers (T: tokens of the prompt, L: layers, m: steps).

The rows of a prompt run next to each other as positions of one sequence. The details depend on the model class
(`Siblings`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.attribution.engines.direct import stack_layers
from tn_lens.attribution.methods.method import Place
from tn_lens.attribution.methods.paths import ROWS_UNEMBEDDED, replacing
from tn_lens.attribution.result import PassSize
from tn_lens.inference.forward import pad_left
from tn_lens.models import Model, backend_of
from tn_lens.neurons import SiteName, hook_name
from tn_lens.questions.prompts import Prompt

LAYERS_PER_PASS = 8
"""Maximum number of layers whose rows run together. More layers use the hardware better, but cost memory."""
STEPS = 20
"""Number of steps to which LAYERS_PER_PASS applies."""
ROWS_REFINED = 50
"""Minimum number of rows of one prompt in a pass, if its paths are refined."""
ENOUGH_ROWS = 200
"""Number of rows from which matrix products on a CPU are efficient."""
RESERVED = 24 * 2**20
"""Bytes of `max_memory` that are reserved for buffers of matrix products and a prompt's cache, but at most half."""
PROMPTS_PER_PASS = 16
"""Maximum number of prompts in one pass, if memory allows."""
SLOPES_KEPT = 16
"""Slopes per neuron that are reserved for the pieces of refined paths: five of the first panel, which exist twice while it is
evaluated, and those of the places that are refined."""


def unsupported(model: Model) -> str | None:
    """The reason why a model requires the direct engine; None if it does not."""
    backend = backend_of(model)
    return backend.unshareable or ("layers on several devices" if backend.n_devices > 1 else None)


def plan(
    model: Model, n_tokens: int, n_places: int, n_steps: int, max_memory: int, *, is_refined: bool = False
) -> PassSize:
    """Number of prompts and rows in one pass, from the shapes of the model and the budget, never from free memory.

    Args:
        model: the model.
        n_tokens: number of tokens of the longest prompt.
        n_places: number of attributed pairs of a site and a layer.
        n_steps: number of steps.
        max_memory: maximum memory of one pass in bytes, without the weights. It is compared with estimates of what the
            backward pass keeps and of what the pass over the prompts requires.
        is_refined: whether prompts get further rows, which differ between them. Prompts in a pass run equally many rows, so
            on a CPU no more prompts run together than are needed for efficient matrix products.
    """
    backend = backend_of(model)
    space, size = backend.space, backend.dtype.itemsize
    # one more row at each place for the baseline; the common end of all paths is not one of the steps if they are refined
    n_rows = n_places * (n_steps + 1) + is_refined
    # the rows are divided evenly among the passes; of few steps, more layers run together
    layers_per_pass = LAYERS_PER_PASS * max(1, STEPS // max(1, n_steps))
    n_rows = math.ceil(n_rows / math.ceil(space.n_layers / layers_per_pass))
    # a few places need more rows when they are refined than at first
    n_rows = max(n_rows, ROWS_REFINED) if is_refined else n_rows
    d_mlp, d_attn = space.d_mlp, space.n_heads * space.d_head
    d_cached = 2 * space.d_head * backend.n_key_value_heads  # keys and values
    row_bytes, logit_bytes = backend.bytes_per_row(n_tokens, n_rows), 5 * backend.wide_dtype.itemsize * backend.d_vocab
    # numbers at one position of a prompt: the cache of all layers, and the activations of one layer
    d_position = space.n_layers * d_cached + 6 * space.d_model + 3 * d_attn + 4 * d_mlp + 4 * space.n_heads * n_tokens
    free = max_memory - min(RESERVED, max_memory // 2)
    # only the logits of ROWS_UNEMBEDDED rows exist at a time
    max_rows = free // (row_bytes + logit_bytes)
    if max_rows >= ROWS_UNEMBEDDED:
        max_rows = (free - ROWS_UNEMBEDDED * logit_bytes) // row_bytes
    # the slopes of all pieces of a prompt's paths, in units of rows
    n_kept = SLOPES_KEPT * space.n_neurons * backend.wide_dtype.itemsize // row_bytes if is_refined else 0
    n_prompts = min(PROMPTS_PER_PASS, max_rows // (n_rows + n_kept), max_memory // (size * n_tokens * d_position))
    if is_refined and backend.device.type == "cpu":
        n_prompts = min(n_prompts, math.ceil(ENOUGH_ROWS / n_rows))
    return PassSize(max(1, n_prompts), max(1, min(n_rows, max_rows - n_kept)))


class SharedPrefix:
    """Engine for prompts of any length, whose rows are single positions that replace the last position of the prompt."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        sites: Sequence[SiteName],
        layers: Mapping[SiteName, Container[int]] | None = None,
    ) -> None:
        backend = backend_of(model)
        self.layers = layers or {}
        self.prompts = list(prompts)
        self.precision = torch.finfo(backend.dtype).eps
        n_layers = backend.space.n_layers
        names = {hook_name(site, layer) for site in sites for layer in range(n_layers)}
        # both [prompt, position]; padded on the left, so that the last positions are aligned
        tokens, mask = (tensor.to(backend.device) for tensor in pad_left(prompts))
        self.siblings = backend.siblings(tokens, mask, names)
        self.logits = self.siblings.logits
        # the MLP comes last in its layer, since its rows may join above the layer
        in_order = sorted(sites, key=lambda site: site == "mlp")
        self.own = stack_layers(self.siblings.activations, in_order, n_layers)

    def carry(self, place: Place, activation: Float[Tensor, "*batch neuron"]) -> Float[Tensor, "*batch _"]:
        """Project MLP neurons through W_out if their rows join above the layer; return other activations unchanged."""
        w_out = self._w_out(place)
        # [..., neuron] -> [..., d_model]; in the dtype of the weights, as in the model
        return activation if w_out is None else (activation.to(w_out.dtype) @ w_out).to(activation.dtype)

    def carry_back(self, place: Place, gradient: Float[Tensor, "*batch _"]) -> Float[Tensor, "*batch neuron"]:
        """Return the gradient of the activation: the transpose of `carry`."""
        w_out = self._w_out(place)
        # [..., d_model] -> [..., neuron]
        return gradient if w_out is None else (gradient.to(w_out.dtype) @ w_out.T).to(gradient.dtype)

    def run(
        self,
        paths: Mapping[Place, Float[Tensor, "prompt _ 1 _"]],
        nudges: Mapping[Place, Float[Tensor, "prompt 1 1 _"]],
    ) -> Float[Tensor, "prompt row _"]:
        """Run the rows. `paths` are ordered by layer, and the rows of each join at its layer or right above it."""
        above = {place for place in paths if self._w_out(place) is not None}
        # [prompt, row, 1, d_model] -> [prompt, row, d_model]
        mlp_outputs = {layer: path[:, :, 0] for (site, layer), path in paths.items() if (site, layer) in above}
        # the row of the nudges differs from layer 0 on
        rows_at = Counter({0: 1} if nudges else {})
        for (site, layer), path in paths.items():
            if (site, layer) not in above:
                rows_at[layer] += path.shape[1]
        # rows are positions here: [prompt, row, ...]
        hooks = replacing(paths, nudges, lambda rows: (slice(None), rows), above)
        return self.siblings.run(rows_at, hooks, mlp_outputs)

    def logits_of(self, final: Float[Tensor, "prompt row _"]) -> Float[Tensor, "prompt row vocab"]:
        """Logits of all or some of the rows that `run` returned."""
        return self.siblings.logits_of(final)

    def _w_out(self, place: Place) -> Float[Tensor, "neuron d_model"] | None:
        """The weights that `carry` applies at a place; None if its rows start at the activation itself."""
        site, layer = place
        return self.siblings.w_out(layer) if site == "mlp" else None
