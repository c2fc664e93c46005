"""Mean activations over prompts, for the mean baseline of integrated gradients, mean-ablation, and matched controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.options import NEURON_SITES, Where
from tn_lens.inference.forward import Layout, asked_chunks, prompt_logits
from tn_lens.models import Hooks, Model, backend_of, neuron_space
from tn_lens.models.isolation import isolated
from tn_lens.neurons import SiteName, hook_name
from tn_lens.questions.prompts import Prompt, PromptSet
from tn_lens.runs.chunks import Tensors, chunk_key
from tn_lens.runs.context import map_chunks


@isolated
@torch.no_grad()
def mean_activations(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    positions: Where = "last",
    sites: Sequence[SiteName] = NEURON_SITES,
    absolute: bool = False,
) -> dict[SiteName, Float[Tensor, "layer _"]]:
    """Mean activation of every neuron over prompts.

    Args:
        model: model without interventions.
        prompts: prompts to average over. Each has the same weight, regardless of its length.
        positions: `"last"` reads the last position; `"all"` and `"question"` average over all positions of a prompt, or
            over those from the start of its question.
        sites: sites to read.
        absolute: whether to average absolute values, as a measure of activity.
    """
    space = neuron_space(model)
    wanted = [site for site in sites if space.width(site)]
    parts = asked_chunks(model, PromptSet.of(prompts))
    sums = map_chunks(
        "means",
        [chunk_key("means", positions, absolute, wanted, part) for part in parts],
        lambda index: _activation_sums(model, parts[index], wanted, positions, absolute=absolute),
        "mean activations",
    )
    # in float64: a sum over thousands of prompts would lose precision in float32
    total = {site: torch.zeros(space.n_layers, space.width(site), dtype=torch.float64) for site in wanted}
    for part in sums:
        for site in wanted:
            total[site] += part[site]
    dtype = backend_of(model).wide_dtype
    return {site: total[site].div(max(len(prompts), 1)).to(dtype) for site in wanted}


def _activation_sums(
    model: Model, prompts: Sequence[Prompt], sites: Sequence[SiteName], positions: Where, *, absolute: bool
) -> Tensors:
    """For each site [layer, neuron]: the sum over prompts of the mean over positions, in float64."""
    space = neuron_space(model)
    layers = range(space.n_layers)
    total = {hook_name(s, layer): torch.zeros(space.width(s), dtype=torch.float64) for s in sites for layer in layers}

    def hooks(layout: Layout) -> Hooks:
        at = layout.at(positions)
        counted = (layout.is_token if at is None else layout.is_token & at).double()  # [row, column]
        weights = counted / counted.sum(1, keepdim=True)

        def add(value: Tensor, hook: Any) -> None:
            flat = value.flatten(2).double()  # [row, column, neuron]
            flat = flat.abs() if absolute else flat
            total[hook.name] += einsum(weights.to(flat.device), flat, "row column, row column n -> n").cpu()

        return [(name, add) for name in total]

    for _ in prompt_logits(model, prompts, hooks=hooks):
        pass
    return {site: torch.stack([total[hook_name(site, layer)] for layer in layers]) for site in sites}
