"""Activations at the last position of prompts, where the answer is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.inference.forward import Layout, prompt_logits
from tn_lens.models import Hooks, Model, backend_of, neuron_space
from tn_lens.neurons import SiteName, hook_name
from tn_lens.questions.prompts import Prompt


@torch.no_grad()
def last_activations(
    model: Model, prompts: Sequence[Prompt], sites: Sequence[SiteName], *, also: Sequence[tuple[str, Any]] = ()
) -> dict[SiteName, Float[Tensor, "prompt layer _"]]:
    """Activations at the last position of each prompt, on the CPU in at least float32.

    Args:
        model: the model.
        prompts: prompts to run.
        sites: sites to read; those that the model does not have are left out.
        also: further hooks, which act on all positions.
    """
    space, dtype = neuron_space(model), backend_of(model).wide_dtype
    shapes = {site: (len(prompts), space.n_layers, space.width(site)) for site in sites if space.width(site)}
    values = {site: torch.empty(shape, dtype=dtype) for site, shape in shapes.items()}
    places = {hook_name(site, layer): (site, layer) for site in values for layer in range(space.n_layers)}

    def hooks(layout: Layout) -> Hooks:
        last = layout.lengths - 1  # column of the last position of each row

        def keep(value: Tensor, hook: Any) -> None:
            site, layer = places[hook.name]
            each = torch.arange(len(last), device=value.device)
            # [row, column, ...] -> [row, neuron]
            values[site][list(layout.rows), layer] = value[each, last.to(value.device)].flatten(1).to("cpu", dtype)

        return [*also, *((name, keep) for name in places)]

    for _ in prompt_logits(model, prompts, hooks=hooks):
        pass
    return values
