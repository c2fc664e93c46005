"""The neuron space of a model: its sizes, and the mapping between neurons and tensor indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.core.sentences import count
from tn_lens.core.stored import Stored
from tn_lens.neurons.neuron import Neuron, NeuronSet
from tn_lens.neurons.sites import NEURON_SITES, SITES, SiteName


@dataclass(frozen=True, kw_only=True)
class NeuronSpace(Stored):
    """The neurons at some sites of a model."""

    n_layers: int
    d_mlp: int
    """Number of neurons of one MLP; 0 for attention-only models."""
    n_heads: int
    d_head: int
    d_model: int = 0
    """Width of the residual stream."""
    sites: tuple[str, ...] = NEURON_SITES
    """The sites that the space includes."""

    def width(self, site: SiteName) -> int:
        """Number of neurons of a site in one layer.

        Raises:
            BadInput: the site is unknown.
        """
        return {"d_mlp": self.d_mlp, "d_attn": self.n_heads * self.d_head, "d_model": self.d_model}[SITES[site].width]

    @property
    def n_neurons(self) -> int:
        """Number of neurons of all sites and layers."""
        return self.n_layers * sum(self.width(site) for site in self.sites)

    def flat(self, neuron: Neuron) -> int:
        """Index of a neuron within its layer and site."""
        return neuron.index if neuron.head is None else neuron.head * self.d_head + neuron.index

    def neuron(self, site: SiteName, layer: int, flat: int) -> Neuron:
        """The inverse of `flat`."""
        head, index = divmod(flat, self.d_head) if SITES[site].has_heads else (None, flat)
        return Neuron(site, layer, head, index)

    def at(self, places: Mapping[SiteName, Int[Tensor, " _"]]) -> tuple[Neuron, ...]:
        """The neurons at flat indices, which count the neurons of a site layer by layer."""
        return tuple(
            self.neuron(site, *divmod(flat, self.width(site))) for site, at in places.items() for flat in at.tolist()
        )

    def holds(self, neuron: Neuron) -> bool:
        """Whether the model has this neuron."""
        # a flat index can be in range although the index within the head is not
        is_inside = neuron.head is None or (neuron.head < self.n_heads and neuron.index < self.d_head)
        return neuron.layer < self.n_layers and is_inside and self.flat(neuron) < self.width(neuron.site)

    def check(self, neurons: NeuronSet) -> None:
        """Check that every neuron exists in the model.

        Raises:
            BadInput: a neuron does not exist. The message names the first one.
        """
        for neuron in neurons:
            if not self.holds(neuron):
                raise BadInput(
                    f"the neuron set does not fit the model: it contains {neuron}, but the model has "
                    f"{count(self.n_layers, 'layer')}, {count(self.d_mlp, 'MLP neuron')} per layer and "
                    f"{count(self.n_heads, 'head')} of size {self.d_head}; "
                    "use a set found in this model"
                )

    def mask(self, neurons: NeuronSet, site: SiteName) -> Bool[Tensor, "layer neuron"]:
        """Boolean mask that is True at the neurons of the set."""
        mask = torch.zeros(self.n_layers, self.width(site), dtype=torch.bool)
        for neuron in neurons.at(site):
            mask[neuron.layer, self.flat(neuron)] = True
        return mask


def usual_sites(sites: Sequence[SiteName]) -> tuple[SiteName, ...]:
    """The sites of the paper's neurons if they include all given sites, otherwise the given sites."""
    return NEURON_SITES if set(sites) <= set(NEURON_SITES) else tuple(sites)
