"""The definition: every row is a whole prompt, run from the first layer to the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.attribution.methods.integrated_gradients import Place, replacing
from tn_lens.models import Model, backend_of
from tn_lens.neurons.neuron import Site, hook_name
from tn_lens.prompts import Prompt

Positions = Literal["last", "all"]
"""Which positions are interpolated: the one whose logits are read (Dai et al.), or all together, scores summed."""


class Direct:
    """One prompt, and whole copies of it with activations replaced."""

    def __init__(self, model: Model, prompt: Prompt, sites: Sequence[Site], positions: Positions) -> None:
        self.backend, self.prompts, self.positions = backend_of(model), [prompt], positions
        self.tokens = torch.tensor([prompt.token_ids], device=self.backend.device)
        n_layers = self.backend.space.n_layers
        kept: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> None:
            kept[hook.name] = (value if positions == "all" else value[:, -1:].clone()).flatten(2)

        names = {hook_name(site, layer) for site in sites for layer in range(n_layers)}
        with torch.no_grad(), self.backend.hooks([(name, keep) for name in names]):
            self.logits = self.backend.last_logits(self.tokens)
        self.own = stack_layers(kept, sites, n_layers)

    def carry(self, place: Place, activation: Float[Tensor, "*batch neuron"]) -> Float[Tensor, "*batch neuron"]:
        """The activation itself."""
        return activation

    def carry_back(self, place: Place, gradient: Float[Tensor, "*batch neuron"]) -> Float[Tensor, "*batch neuron"]:
        """The gradient itself."""
        return gradient

    def run(
        self,
        paths: Mapping[Place, Float[Tensor, "1 _ position _"]],
        nudges: Mapping[Place, Float[Tensor, "1 1 position _"]],
    ) -> Float[Tensor, "1 row vocab"]:
        """Last logits of whole prompts."""
        at = slice(None) if self.positions == "all" else slice(-1, None)
        n_rows = sum(path.shape[1] for path in paths.values()) + bool(nudges)
        with self.backend.hooks(replacing(paths, nudges, lambda rows: (rows, at))):
            return self.backend.last_logits(self.tokens.expand(n_rows, -1))[None]

    def logits_of(self, final: Float[Tensor, "1 row vocab"]) -> Float[Tensor, "1 row vocab"]:
        """The logits themselves."""
        return final


def stack_layers(
    kept: Mapping[str, Tensor], sites: Sequence[Site], n_layers: int
) -> dict[Site, Float[Tensor, "prompt layer position _"]]:
    """One tensor per site from the activations of each hook, in at least float32."""
    stacked: dict[Site, Tensor] = {
        site: torch.stack([kept[hook_name(site, layer)] for layer in range(n_layers)], dim=1) for site in sites
    }
    return {site: value.to(torch.promote_types(value.dtype, torch.float32)) for site, value in stacked.items()}
