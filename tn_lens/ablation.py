"""Suppress neurons inside a `with`, and draw the sets of neurons to compare with (paper 3.3)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .errors import BadInput
from .models import Model, neuron_space
from .neurons import SITES, NeuronSet, NeuronSpace, Site, hook_name


@contextmanager
def ablate(model: Model, neurons: NeuronSet) -> Iterator[Model]:
    """Set neurons to zero at every position of every forward pass inside the `with` (paper 3.3, "suppressed").

    The same as zero rows in W_out and W_O, bit for bit. The hooks are removed on leaving, also after an exception.

    Raises:
        BadInput: the set does not fit the model.
    """
    space = neuron_space(model)
    space.check(neurons)
    hooks = []
    for site in SITES:
        masks = space.mask(neurons, site).to(str(model.cfg.device))
        for layer in range(space.n_layers):
            if masks[layer].any():
                kept = ~masks[layer]

                def silence(value: Tensor, hook: object, kept: Tensor = kept) -> Tensor:
                    return torch.where(kept.reshape(value.shape[2:]), value, 0.0)

                hooks.append((hook_name(site, layer), silence))
    with model.hooks(fwd_hooks=hooks):
        yield model


def random_neurons(space: NeuronSpace, n: int, exclude: NeuronSet, rng: np.random.Generator) -> NeuronSet:
    """`n` neurons drawn uniformly from the whole model without `exclude`: the paper's control.

    Raises:
        BadInput: the model has too few others.
    """
    free = [(site, layer, flat) for site in SITES for layer, flat in _free(space, exclude, site)]
    if n > len(free):
        raise BadInput(f"cannot draw {n} random neurons: only {len(free)} are not among the found ones")
    return NeuronSet(space.neuron(*free[i]) for i in rng.choice(len(free), n, replace=False).tolist())


def matched_neurons(space: NeuronSpace, neurons: NeuronSet, rng: np.random.Generator) -> NeuronSet:
    """As many other neurons in every site and layer as the set has there; fewer, with a warning, where a layer is short."""
    drawn: list = []
    short = 0
    for site in SITES:
        free = _free(space, neurons, site)
        for layer, n in enumerate(neurons.by_layer(space.n_layers)[site]):
            there = [flat for at, flat in free if at == layer] if n else []
            short += max(0, n - len(there))
            drawn += [space.neuron(site, layer, int(i)) for i in rng.permutation(there)[:n]]
    if short:
        warnings.warn(
            f"the matched control is {short} neurons short: some layers hold more found neurons than others",
            stacklevel=2,
        )
    return NeuronSet(drawn)


def _free(space: NeuronSpace, exclude: NeuronSet, site: Site) -> list[tuple[int, int]]:
    return [(layer, flat) for layer, flat in (~space.mask(exclude, site)).nonzero().tolist()]
