"""The reference engine: every row is a whole prompt that runs through all layers."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.attribution.methods.method import Place
from tn_lens.attribution.methods.paths import replacing
from tn_lens.core.options import Positions
from tn_lens.models import Model, backend_of
from tn_lens.models.tensors import at_least_float32
from tn_lens.neurons import SiteName, hook_name
from tn_lens.questions.prompts import Prompt


class Direct:
    """Engine that runs copies of one whole prompt in which activations are replaced."""

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        sites: Sequence[SiteName],
        positions: Positions,
        layers: Mapping[SiteName, Container[int]] | None = None,
    ) -> None:
        self.backend, self.prompts, self.positions = backend_of(model), [prompt], positions
        self.layers = layers or {}
        self.precision = torch.finfo(self.backend.dtype).eps
        self.tokens = torch.tensor([prompt.token_ids], device=self.backend.device)  # [1, position]
        n_layers = self.backend.space.n_layers
        activations: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> None:
            # [1, position, head, d_head] -> [1, position, neuron]; cloned, since a view keeps all positions in memory
            activations[hook.name] = (value if positions == "all" else value[:, -1:].clone()).flatten(2)

        names = {hook_name(site, layer) for site in sites for layer in range(n_layers)}
        with torch.no_grad(), self.backend.hooks([(name, keep) for name in names]):
            self.logits = self.backend.last_logits(self.tokens)
        self.own = stack_layers(activations, sites, n_layers)

    def carry(self, place: Place, activation: Float[Tensor, "*batch neuron"]) -> Float[Tensor, "*batch neuron"]:
        """Return the activation, which is interpolated directly."""
        return activation

    def carry_back(self, place: Place, gradient: Float[Tensor, "*batch neuron"]) -> Float[Tensor, "*batch neuron"]:
        """Return the gradient unchanged."""
        return gradient

    def run(
        self,
        paths: Mapping[Place, Float[Tensor, "1 _ position _"]],
        nudges: Mapping[Place, Float[Tensor, "1 1 position _"]],
    ) -> Float[Tensor, "1 row vocab"]:
        """Run one copy of the prompt per row and return its last logits."""
        columns = slice(None) if self.positions == "all" else slice(-1, None)
        n_rows = sum(path.shape[1] for path in paths.values()) + bool(nudges)  # the nudges have a separate row
        with self.backend.hooks(replacing(paths, nudges, lambda rows: (rows, columns))):
            # rows are the batch dimension: [row, vocab] -> [1, row, vocab]
            return self.backend.last_logits(self.tokens.expand(n_rows, -1))[None]

    def logits_of(self, final: Float[Tensor, "1 row vocab"]) -> Float[Tensor, "1 row vocab"]:
        """Return the logits unchanged."""
        return final


def stack_layers(
    activations: Mapping[str, Float[Tensor, "prompt position _"]], sites: Sequence[SiteName], n_layers: int
) -> dict[SiteName, Float[Tensor, "prompt layer position _"]]:
    """Stack the activations of all layers into one tensor per site, in at least float32.

    Args:
        activations: activations by hook name.
        sites: sites to stack, in the order of the result.
        n_layers: number of layers.
    """
    return {
        site: at_least_float32(torch.stack([activations[hook_name(site, layer)] for layer in range(n_layers)], dim=1))
        for site in sites
    }
