"""Suppressing is zeroing rows; controls are of the right size and in the right places."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.conftest import PAPER_MODELS
from tn_lens import Neuron, NeuronSet, ablate, load_model
from tn_lens.ablation import matched_neurons, random_neurons
from tn_lens.models import Model, neuron_space
from tn_lens.neurons import SITES, NeuronSpace

TOKENS = torch.randint(4, 283, (2, 15), generator=torch.Generator().manual_seed(2))
SPACE = NeuronSpace(n_layers=3, d_mlp=10, n_heads=2, d_head=4)


def some(space: NeuronSpace, seed: int = 0) -> NeuronSet:
    return random_neurons(space, 20, NeuronSet(), np.random.default_rng(seed))


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_ablating_equals_zeroing_rows_of_the_weights(name: str, checkpoint: Callable) -> None:
    model, zeroed = (load_model(checkpoint(name), dtype="float32") for _ in range(2))
    neurons = some(neuron_space(model))
    with ablate(model, neurons):
        ablated = model(TOKENS)
    for neuron in neurons:
        block = zeroed.blocks[neuron.layer]
        if neuron.head is None:
            block.mlp.W_out.data[neuron.index] = 0
        else:
            block.attn.W_O.data[neuron.head, neuron.index] = 0
    assert torch.equal(ablated, zeroed(TOKENS))
    assert not torch.equal(ablated, model(TOKENS))


def test_hooks_are_gone_after_an_exception(tiny: Callable[..., Model]) -> None:
    model = tiny("Llama-3.1-8B-Instruct")
    before = model(TOKENS)
    with pytest.raises(RuntimeError, match="on purpose"), ablate(model, some(neuron_space(model))):
        raise RuntimeError("on purpose")
    assert torch.equal(model(TOKENS), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_contexts_nest(tiny: Callable[..., Model]) -> None:
    model = tiny("Qwen2.5-3B-Instruct")
    one, two = some(neuron_space(model), 1), some(neuron_space(model), 2)
    with ablate(model, one), ablate(model, two):
        nested = model(TOKENS)
    with ablate(model, one | two):
        assert torch.equal(model(TOKENS), nested)


def test_an_empty_set_changes_nothing(tiny: Callable[..., Model]) -> None:
    model = tiny("Qwen2.5-3B-Instruct")
    before = model(TOKENS)
    with ablate(model, NeuronSet()):
        assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("stranger", [Neuron("mlp", 3, None, 0), Neuron("mlp", 0, None, 10), Neuron("attn", 0, 2, 0)])
def test_a_set_that_does_not_fit_is_named(stranger: Neuron) -> None:
    with pytest.raises(ValueError, match=str(stranger)):
        SPACE.check(NeuronSet([stranger]))


def test_random_neurons_are_uniform_replayable_and_never_found_ones() -> None:
    found = some(SPACE)
    draws = [random_neurons(SPACE, 10, found, np.random.default_rng(seed)) for seed in range(400)]
    assert all(len(draw) == 10 and draw.isdisjoint(found) for draw in draws)
    assert random_neurons(SPACE, 10, found, np.random.default_rng(7)) == draws[7]
    counts = np.array([sum(n in draw for draw in draws) for site in SITES for n in _others(found, site)])
    expected = 400 * 10 / len(counts)
    assert abs(counts - expected).max() < 5 * expected**0.5
    with pytest.raises(ValueError, match="only 34"):
        random_neurons(SPACE, 35, found, np.random.default_rng(0))


def _others(found: NeuronSet, site: str) -> list[Neuron]:
    width = SPACE.width(site)  # pyright: ignore[reportArgumentType]
    every = [SPACE.neuron(site, layer, flat) for layer in range(3) for flat in range(width)]  # pyright: ignore[reportArgumentType]
    return [n for n in every if n not in found]


def test_matched_neurons_stand_in_the_same_layers() -> None:
    found = NeuronSet([Neuron("mlp", 0, None, i) for i in range(4)] + [Neuron("attn", 2, 1, 0)])
    matched = matched_neurons(SPACE, found, np.random.default_rng(0))
    assert matched.by_layer(3) == found.by_layer(3)
    assert matched.isdisjoint(found)
    crowded = NeuronSet(Neuron("mlp", 1, None, i) for i in range(6))
    with pytest.warns(UserWarning, match="2 neurons short"):
        matched = matched_neurons(SPACE, crowded, np.random.default_rng(0))
    assert len(matched) == 4
