"""The sets of neurons to compare with: as many others, drawn uniformly, by layer, or among the most active (paper 3.3)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.neurons.neuron import SITES, NeuronSet, NeuronSpace, Site

POOL = 2
"""The active control draws among so many times as many of the most active neurons."""


def random_neurons(space: NeuronSpace, n: int, exclude: NeuronSet, rng: np.random.Generator) -> NeuronSet:
    """`n` neurons drawn uniformly from the whole model without `exclude`: the paper's control.

    Raises:
        BadInput: the model has too few others.
    """
    taken = {site: np.sort([n.layer * space.width(site) + space.flat(n) for n in exclude.at(site)]) for site in SITES}
    sizes = [space.n_layers * space.width(site) - len(taken[site]) for site in SITES]
    if n > sum(sizes):
        raise BadInput(f"cannot draw {n} random neurons: only {sum(sizes)} are not among the found ones")
    drawn = []
    for place in rng.choice(sum(sizes), n, replace=False).tolist():
        site = SITES[0] if place < sizes[0] else SITES[1]
        free = place if site == SITES[0] else place - sizes[0]
        drawn.append(space.neuron(site, *divmod(_nth_free(free, taken[site]), space.width(site))))
    return NeuronSet(drawn)


def matched_neurons(space: NeuronSpace, neurons: NeuronSet, rng: np.random.Generator) -> NeuronSet:
    """As many other neurons in every site and layer as the set has there; fewer, with a warning, where a layer is short."""
    drawn: list = []
    short = 0
    for site, layer, n, free in _by_layer(space, neurons):
        short += max(0, n - len(free))
        drawn += [space.neuron(site, layer, int(i)) for i in rng.permutation(free)[:n]]
    _warn(short, "matched")
    return NeuronSet(drawn)


def active_neurons(
    space: NeuronSpace,
    neurons: NeuronSet,
    activity: Mapping[Site, Float[Tensor, "layer _"]],
    rng: np.random.Generator,
) -> NeuronSet:
    """As many other neurons in every site and layer, drawn among the twice as many that are most active there.

    Args:
        space: of the model.
        neurons: the set to compare with.
        activity: mean |activation| of every neuron.
        rng: draws.
    """
    drawn: list = []
    short = 0
    for site, layer, n, free in _by_layer(space, neurons):
        short += max(0, n - len(free))
        order = np.argsort(-activity[site][layer].numpy()[free], kind="stable")
        drawn += [space.neuron(site, layer, int(i)) for i in rng.permutation(free[order[: POOL * n]])[:n]]
    _warn(short, "active")
    return NeuronSet(drawn)


def _by_layer(space: NeuronSpace, neurons: NeuronSet) -> list[tuple[Site, int, int, np.ndarray]]:
    """Site, layer, how many of the set sit there, and the indices of all others; only where some sit."""
    counts = neurons.by_layer(space.n_layers)
    masks = {site: space.mask(neurons, site).numpy() for site in SITES}
    return [
        (site, layer, n, np.flatnonzero(~masks[site][layer]))
        for site in SITES
        for layer, n in enumerate(counts[site])
        if n
    ]


def _warn(short: int, name: str) -> None:
    if short:
        warnings.warn(
            f"the {name} control is {short} neurons short: some layers hold more found neurons than others",
            stacklevel=3,
        )


def _nth_free(nth: int, taken: np.ndarray) -> int:
    """The nth whole number from 0 that is not taken; `taken` is sorted."""
    place = nth
    for one in taken:
        if one > place:
            break
        place += 1
    return place
