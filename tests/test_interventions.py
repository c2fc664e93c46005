"""Interventions equal zeroed weights and manual hooks, and controls have the right size, sites and layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import PAPER_MODELS
from tn_lens import (
    Mean,
    Neuron,
    NeuronSet,
    Prompt,
    Resample,
    Scale,
    Zero,
    ablate,
    intervene,
    load_model,
    mean_activations,
)
from tn_lens.evaluation.controls import active_neurons, matched_neurons, random_neurons
from tn_lens.inference.answers import ask
from tn_lens.inference.interventions import INTERVENTIONS
from tn_lens.models import HAS_HOOKED, Model, neuron_space
from tn_lens.neurons import NEURON_SITES, NeuronSpace, hook_name

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
    counts = np.array([sum(n in draw for draw in draws) for site in NEURON_SITES for n in _others(found, site)])
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
    with pytest.warns(UserWarning, match="2 fewer neurons than requested"):
        matched = matched_neurons(SPACE, crowded, np.random.default_rng(0))
    assert len(matched) == 4


def prompts_of(n: int = 24) -> list[Prompt]:
    """Prompts of several lengths with a common beginning."""
    rows = torch.randint(4, 283, (n, 30), generator=torch.Generator().manual_seed(4)).tolist()
    tokens = [[*rows[0][:9], *row[: 6 + i % 5]] for i, row in enumerate(rows)]
    return [
        Prompt(token_ids=tuple(ids), label_ids=((5,), (7,)), right=0, question=str(i), start=10)
        for i, ids in enumerate(tokens)
    ]


def by_hand(model: Model, prompt: Prompt, change: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
    """The label probabilities of one prompt, which is run completely with plain hooks."""

    def put(value: torch.Tensor, hook: object, name: str) -> torch.Tensor:
        return change[name](value.flatten(2).clone()).reshape(value.shape)

    hooks = [(name, partial(put, name=name)) for name in change]
    logits = model.run_with_hooks(torch.tensor([prompt.token_ids]), fwd_hooks=hooks)
    return logits[0, -1].float().softmax(-1)[[5, 7]]


@pytest.mark.parametrize("positions", ["all", "last", "question"])
@pytest.mark.parametrize("mode", ["zero", "scale", "mean", "resample"])
def test_interventions_by_hand(mode: str, positions: str, tiny: Callable[..., Model]) -> None:
    model, prompts = tiny("Mistral-Nemo-Instruct-2407"), prompts_of()
    space = neuron_space(model)
    neurons = some(space)
    options: dict[str, Any] = {"scale": {"factor": 2.5}, "resample": {"seed": 3}}.get(mode, {})
    intervention = INTERVENTIONS[mode](positions=positions, **options)
    assert type(intervention) is {"zero": Zero, "scale": Scale, "mean": Mean, "resample": Resample}[mode]
    found = ask(model, prompts, neurons=neurons, intervention=intervention)
    masks = {(s, layer): space.mask(neurons, s)[layer] for s in NEURON_SITES for layer in range(space.n_layers)}
    values = mean_activations(model, prompts, positions=positions)
    donors = np.random.default_rng([3, 7]).permutation(len(prompts))

    def change(prompt: Prompt, donor: Prompt, cache: Any, site: str, layer: int, flat: torch.Tensor) -> torch.Tensor:
        mask, n = masks[site, layer], len(prompt.token_ids)
        for place in range({"all": 0, "last": n - 1, "question": prompt.start}[positions], n):
            match mode:
                case "zero":
                    flat[0, place, mask] = 0
                case "scale":
                    flat[0, place, mask] *= 2.5
                case "mean":
                    flat[0, place, mask] = values[site][layer][mask].to(flat.dtype)
                case "resample":
                    own = cache[hook_name(site, layer)].flatten(2)[0]
                    flat[0, place, mask] = own[max(0, place + len(donor.token_ids) - n)][mask]
        return flat

    for i in (0, 7, 13, 23):
        donor = prompts[donors[i]]
        _, cache = model.run_with_cache(torch.tensor([donor.token_ids]))
        hooks = {
            hook_name(site, layer): partial(change, prompts[i], donor, cache, site, layer)
            for (site, layer), mask in masks.items()
            if mask.any()
        }
        expected = by_hand(model, prompts[i], hooks)
        torch.testing.assert_close(found[i].float(), expected.float(), atol=1e-5, rtol=0)


def test_factor_one_changes_nothing_bit_for_bit(tiny: Callable[..., Model]) -> None:
    model, prompts = tiny("Qwen2.5-3B-Instruct", torch.float32), prompts_of()
    neurons = some(neuron_space(model))
    unablated = ask(model, prompts)
    for positions in ("all", "last", "question"):
        one = Scale(factor=1, positions=positions)
        assert torch.equal(ask(model, prompts, neurons=neurons, intervention=one), unablated)
    ablated = ask(model, prompts, neurons=neurons)
    assert torch.equal(ask(model, prompts, neurons=neurons, intervention=Scale(factor=0)), ablated)
    assert torch.equal(ask(model, prompts, neurons=neurons, intervention=Zero()), ablated)
    assert not torch.equal(ablated, unablated)
    for context in (ablate(model, neurons), intervene(model, neurons, Scale(factor=0))):
        with context:
            assert torch.equal(ask(model, prompts), ablated)


def test_hooks_are_gone_after_an_exception_in_the_middle(tiny: Callable[..., Model]) -> None:
    model = tiny("Llama-3.1-8B-Instruct", torch.float32)
    bad = [*prompts_of(4), Prompt(token_ids=(10_000,), label_ids=((5,), (7,)), right=0)]
    with pytest.raises(IndexError):
        ask(model, bad, neurons=some(neuron_space(model)), intervention=Scale(factor=2))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_means_over_prompts_by_hand(tiny: Callable[..., Model]) -> None:
    model, prompts = tiny("Qwen2.5-3B-Instruct"), prompts_of(6)
    near = 1e-10 if HAS_HOOKED else 1e-6  # Hugging Face's softmax is in float32, whatever the weights are
    caches = [model.run_with_cache(torch.tensor([p.token_ids]))[1] for p in prompts]
    for positions in ("last", "all", "question"):
        found = mean_activations(model, prompts, positions=positions)
        absolute = mean_activations(model, prompts, positions=positions, absolute=True)
        for site in NEURON_SITES:
            for layer in range(model.cfg.n_layers):
                values = [cache[hook_name(site, layer)][0].flatten(1) for cache in caches]
                first = {"last": -1, "all": 0, "question": 10}[positions]
                for mean, of in ((found, values), (absolute, [v.abs() for v in values])):
                    expected = torch.stack([v[first:].mean(0) for v in of]).mean(0)
                    torch.testing.assert_close(mean[site][layer], expected, atol=near, rtol=near)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Scale(), TypeError, "factor"),  # pyright: ignore[reportCallIssue]
        (lambda: Zero(factor=2.0), TypeError, "factor"),  # pyright: ignore[reportCallIssue]
        (lambda: Scale(factor=float("nan")), ValueError, "factor must be a finite number; got nan"),
        (lambda: Scale(factor=float("inf")), ValueError, "factor must be a finite number; got inf"),
        (lambda: INTERVENTIONS["shrink"], ValueError, "expected zero, scale, mean, resample"),
    ],
)
def test_bad_interventions_are_refused(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_active_neurons_are_among_the_most_active_and_never_found_ones() -> None:
    found = NeuronSet([Neuron("mlp", 0, None, i) for i in range(2)] + [Neuron("attn", 2, 1, 0)])
    activity = {site: torch.arange(3 * SPACE.width(site)).reshape(3, -1).float() % 7 for site in NEURON_SITES}
    draws = [active_neurons(SPACE, found, activity, np.random.default_rng(seed)) for seed in range(40)]
    assert all(draw.by_layer(3) == found.by_layer(3) and draw.isdisjoint(found) for draw in draws)
    assert {n for draw in draws for n in draw.at("mlp")} == {Neuron("mlp", 0, None, i) for i in (3, 4, 5, 6)}
    assert len(set(draws)) > 1
