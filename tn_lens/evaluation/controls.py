"""Controls: other neurons in the same number, drawn uniformly, by layer, or among the most active (paper 3.3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias
from zlib import crc32

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.core.registry import Registry
from tn_lens.core.sentences import plural
from tn_lens.neurons import NeuronSet, NeuronSpace, SiteName

POOL = 2
"""The control of active neurons draws among this many times as many of the most active neurons."""

Activity: TypeAlias = Mapping[SiteName, Float[Tensor, "layer _"]]
"""Mean |activation| of every neuron."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """A way to draw neurons to compare with the found ones."""

    draw: Callable[[NeuronSpace, NeuronSet, Callable[[], Activity], np.random.Generator], NeuronSet]
    """Space, found neurons, mean activities (computed when called) and random generator -> other neurons."""
    label: str
    """Name in tables and figures."""
    stream: int | None = None
    """Random stream; by default one of its own, derived from the control's name."""

    def stream_of(self, name: str) -> int:
        """The random stream under a name in the registry."""
        return crc32(name.encode()) if self.stream is None else self.stream


CONTROLS: Registry[Control] = Registry("control")
"""All controls by name; each is a condition of the evaluation."""


def random_neurons(space: NeuronSpace, n: int, exclude: NeuronSet, rng: np.random.Generator) -> NeuronSet:
    """Draw `n` neurons uniformly from the whole space except `exclude`: the paper's control.

    Raises:
        BadInput: there are too few other neurons.
    """
    taken = {
        site: np.sort([neuron.layer * space.width(site) + space.flat(neuron) for neuron in exclude.at(site)])
        for site in space.sites
    }
    sizes = [space.n_layers * space.width(site) - len(taken[site]) for site in space.sites]
    if n > sum(sizes):
        raise BadInput(f"cannot draw {n} random neurons: only {sum(sizes)} are not among the found ones")
    ends = np.cumsum(sizes)
    drawn = []
    for place in rng.choice(sum(sizes), n, replace=False).tolist():
        index = int(np.searchsorted(ends, place, side="right"))
        site, free = space.sites[index], place - int(ends[index] - sizes[index])
        drawn.append(space.neuron(site, *divmod(_nth_free(free, taken[site]), space.width(site))))
    return NeuronSet(drawn)


def matched_neurons(space: NeuronSpace, neurons: NeuronSet, rng: np.random.Generator) -> NeuronSet:
    """Draw as many other neurons in every site and layer as the set has there; fewer, with a warning, if a layer is too small."""
    return _draw_by_layer(space, neurons, rng, "matched", lambda site, layer, free, n: free)


def active_neurons(space: NeuronSpace, neurons: NeuronSet, activity: Activity, rng: np.random.Generator) -> NeuronSet:
    """Draw as many other neurons in every site and layer, among the twice as many that are most active there.

    Args:
        space: neurons of the model.
        neurons: the set to compare with.
        activity: mean |activation| of every neuron.
        rng: random generator.
    """

    def most_active(site: SiteName, layer: int, free: np.ndarray, n: int) -> np.ndarray:
        order = np.argsort(-activity[site][layer].numpy()[free], kind="stable")
        return free[order[: POOL * n]]

    return _draw_by_layer(space, neurons, rng, "active", most_active)


def _draw_by_layer(
    space: NeuronSpace,
    neurons: NeuronSet,
    rng: np.random.Generator,
    name: str,
    pool: Callable[[SiteName, int, np.ndarray, int], np.ndarray],
) -> NeuronSet:
    """Draw from the pool of every site and layer that has neurons of the set."""
    drawn: list = []
    n_missing = 0
    counts = neurons.by_layer(space.n_layers)
    for site in space.sites:
        mask = space.mask(neurons, site).numpy()
        for layer, n in enumerate(counts.get(site, ())):
            if n:
                free = np.flatnonzero(~mask[layer])
                n_missing += max(0, n - len(free))
                chosen = rng.permutation(pool(site, layer, free, n))[:n]
                drawn += [space.neuron(site, layer, int(index)) for index in chosen]
    if n_missing:
        warnings.warn(
            f"the {name} control has {n_missing} fewer {plural('neuron', n_missing)} than requested: in some layers more than "
            "half of the neurons were found",
            stacklevel=3,
        )
    return NeuronSet(drawn)


def _nth_free(nth: int, taken: np.ndarray) -> int:
    """The nth non-negative integer that is not taken; `taken` is sorted."""
    place = nth
    for index in taken:
        if index > place:
            break
        place += 1
    return place


# "random" and "random_matched" draw one after the other from the same stream
CONTROLS.register(
    "random",
    Control(
        draw=lambda space, neurons, activity, rng: random_neurons(space, len(neurons), neurons, rng),
        label="random neurons",
        stream=2,
    ),
)
CONTROLS.register(
    "random_matched",
    Control(
        draw=lambda space, neurons, activity, rng: matched_neurons(space, neurons, rng),
        label="matched random neurons",
        stream=2,
    ),
)
CONTROLS.register(
    "top_activation",
    Control(
        draw=lambda space, neurons, activity, rng: active_neurons(space, neurons, activity(), rng),
        label="most active neurons",
        stream=9,
    ),
)
