"""Controls: equally many other neurons, drawn uniformly, by layer, or from the most active (paper 3.3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.core.registry import Registry
from tn_lens.core.sentences import count, plural
from tn_lens.neurons import Neuron, NeuronSet, NeuronSpace, SiteName

POOL = 2
"""Size of the pool of most active neurons, as a multiple of the number of neurons to draw from it."""

Activity: TypeAlias = Mapping[SiteName, Float[Tensor, "layer _"]]
"""Mean |activation| of every neuron."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """A way to draw neurons to compare with the found ones."""

    draw: Callable[[NeuronSpace, NeuronSet, Callable[[], Activity], np.random.Generator], NeuronSet]
    """Function of the space, the found neurons, a function that computes mean activities, and a random generator, which
    returns other neurons."""
    label: str
    """Name in tables and figures."""
    stream: int | None = None
    """Number of the random stream; by default derived from the control's name."""


CONTROLS: Registry[Control] = Registry("control")
"""All controls by name; each is a condition of the evaluation."""


def random_neurons(space: NeuronSpace, n: int, exclude: NeuronSet, rng: np.random.Generator) -> NeuronSet:
    """Draw `n` neurons uniformly from the whole space except `exclude`: the paper's control.

    Raises:
        BadInput: fewer than `n` neurons are not excluded.
    """
    # [layer, neuron] -> flat places of the neurons that may be drawn
    free = [(~space.mask(exclude, site)).flatten().nonzero().flatten() for site in space.sites]
    sizes = list(map(len, free))
    if n > sum(sizes):
        raise BadInput(
            f"cannot draw {count(n, 'random neuron')}: only {sum(sizes)} {'is' if sum(sizes) == 1 else 'are'} outside the found "
            "set; use a smaller set, found with a higher t or p"
        )
    is_drawn = torch.zeros(sum(sizes), dtype=torch.bool)
    is_drawn[torch.from_numpy(rng.choice(sum(sizes), n, replace=False))] = True
    chosen = zip(space.sites, free, is_drawn.split(sizes), strict=True)
    return NeuronSet(space.at({site: places[at] for site, places, at in chosen}))


def matched_neurons(space: NeuronSpace, neurons: NeuronSet, rng: np.random.Generator) -> NeuronSet:
    """Draw equally many other neurons in every site and layer of the set; fewer, with a warning, if a layer is too small."""
    return _draw_by_layer(space, neurons, rng, None)


def active_neurons(space: NeuronSpace, neurons: NeuronSet, activity: Activity, rng: np.random.Generator) -> NeuronSet:
    """Draw equally many other neurons in every site and layer, from the most active ones there (twice as many as are drawn).

    Args:
        space: neurons of the model.
        neurons: the set to compare with.
        activity: mean |activation| of every neuron.
        rng: random generator.
    """
    return _draw_by_layer(space, neurons, rng, activity)


def _draw_by_layer(
    space: NeuronSpace, neurons: NeuronSet, rng: np.random.Generator, activity: Activity | None
) -> NeuronSet:
    """Draw in every site and layer that has neurons of the set, from all others or from the most active of them."""
    drawn: list[Neuron] = []
    for site in space.sites:
        for layer, mask in enumerate(space.mask(neurons, site).numpy()):
            # layers without neurons of the set draw no random numbers
            if n := int(mask.sum()):
                pool = np.flatnonzero(~mask)
                if activity is not None:
                    order = np.argsort(-activity[site][layer].numpy()[pool], kind="stable")
                    pool = pool[order[: POOL * n]]
                drawn += [space.neuron(site, layer, int(index)) for index in rng.permutation(pool)[:n]]
    n_missing = sum(neuron.site in space.sites for neuron in neurons) - len(drawn)
    name = "matched" if activity is None else "active"
    if n_missing:
        warnings.warn(
            f"the {name} control has {n_missing} fewer {plural('neuron', n_missing)} than requested: in some layers more than "
            "half of the neurons were found",
            stacklevel=3,
        )
    return NeuronSet(drawn)


# "random" and "random_matched" draw one after the other from the same stream
CONTROLS["random"] = Control(
    draw=lambda space, neurons, _, rng: random_neurons(space, len(neurons), neurons, rng),
    label="random neurons",
    stream=2,
)
CONTROLS["random_matched"] = Control(
    draw=lambda space, neurons, _, rng: matched_neurons(space, neurons, rng), label="matched random neurons", stream=2
)
CONTROLS["top_activation"] = Control(
    draw=lambda space, neurons, activity, rng: active_neurons(space, neurons, activity(), rng),
    label="most active neurons",
    stream=9,
)
