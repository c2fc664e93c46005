"""The planted truth neurons are found, and each trap is found if and only if its filters are disabled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import chain, combinations
from typing import Any

import pytest

from tests.conftest import needs_hooked
from tn_lens import Attribution, NeuronSet, ablate, attribute, manipulation_check, select_neurons
from tn_lens.core.seeds import generator
from tn_lens.evaluation.controls import random_neurons
from tn_lens.inference.answers import ask
from tn_lens.models import neuron_space
from tn_lens.toy.plant import Planted, planted

pytestmark = needs_hooked  # models from a configuration, and processed in float64 throughout

OFF: dict[str, dict[str, Any]] = {
    "t": {"adaptive_threshold": None},
    "p": {"share_threshold": None},
    "test": {"alpha": None},
}
FILTERS = ("check", "t", "p", "test", "target", "positions")
"""The filters that can be disabled: the manipulation check, the thresholds, the held-out test, a target that is normalised over the
labels, and reading the last position only."""


@cache
def scores_of(world: Planted, off: frozenset[str]) -> Attribution:
    """The scores with the check, the target or the positions disabled; the thresholds do not change them."""
    prompts = world.prompts if "check" in off else manipulation_check(world.model, world.prompts).prompts
    return attribute(
        world.model,
        prompts,
        n_steps=5,
        positions="all" if "positions" in off else "last",
        target="probability_difference" if "target" in off else "normalized_difference",
    )


def found(world: Planted, off: set[str], *, t: float = 0.1) -> NeuronSet:
    """The neurons that are found with some filters disabled."""
    scores = scores_of(world, frozenset(off).difference(OFF))
    settings: dict[str, Any] = {"adaptive_threshold": t}
    for name in off & OFF.keys():
        settings |= OFF[name]
    return select_neurons(scores, **settings).neurons


def smaller(off: set[str]) -> Iterator[set[str]]:
    return map(set, chain.from_iterable(combinations(sorted(off), n) for n in range(len(off))))


@pytest.mark.parametrize("seed", range(8))
def test_everything_planted_is_found_and_nothing_else(seed: int) -> None:
    world = planted(seed=seed)
    check = manipulation_check(world.model, world.prompts)
    assert set(check.questions) == set(world.prompts.groups) - world.mistaken
    assert len(world.prompts.groups) == 200
    assert len(world.mistaken) == 40
    scores = attribute(world.model, check.prompts, n_steps=20 if seed < 2 else 5)  # the default, and a faster one
    for t in (0.1, 0.2, 0.3):
        assert select_neurons(scores, adaptive_threshold=t).neurons == world.truth


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "options",
    [
        {"noise": 0.0},
        {"noise": 0.02},
        {"d_model": 64, "d_mlp": 60, "d_head": 16},
        {"n_layers": 7},
        {"n_questions": 400},
        {"mistaken": 0.0},
    ],
)
def test_so_it_is_at_other_sizes_and_with_other_noise(options: dict[str, Any], seed: int) -> None:
    world = planted(seed=seed, **options)
    assert found(world, {"target"}, t=0.2) == world.truth


@cache
def world_of(**options: float) -> Planted:
    """A planted model that is shared by all traps; its scores are computed once."""
    return planted(seed=1, **options)


@pytest.mark.parametrize(
    ("trap", "options", "off"),
    [
        ("letter", {}, {"test"}),
        ("weak", {}, {"t"}),
        ("category", {}, {"p"}),
        ("format", {}, {"t", "target"}),
        ("format", {"label_logit": 4.0}, {"target"}),
        ("contrarian", {}, {"check", "p"}),
        ("contrarian", {"mistaken": 0.5}, {"check"}),
        ("anti", {}, {"check", "p", "test"}),
        ("elsewhere", {}, {"positions"}),
    ],
)
def test_a_trap_enters_when_its_filters_are_off_and_not_before(
    trap: str, options: dict[str, Any], off: set[str]
) -> None:
    world = world_of(**options)
    neuron = world.traps[trap]
    assert neuron in found(world, off)
    for fewer in smaller(off):
        assert neuron not in found(world, fewer), f"{trap} enters already without {fewer}"


def test_the_traps_and_the_truth_are_different_neurons_of_the_model() -> None:
    world = planted()
    space = neuron_space(world.model)
    traps = NeuronSet(world.traps.values())
    space.check(world.truth | traps)
    assert len(traps) == 7
    assert not traps & world.truth


def test_ablating_the_truth_leaves_chance_and_random_neurons_change_nothing() -> None:
    world = planted(seed=3)
    prompts = world.prompts

    def right(neurons: NeuronSet) -> float:
        with ablate(world.model, neurons):
            return manipulation_check(world.model, prompts).passed.double().mean().item()

    assert right(NeuronSet()) == 0.8
    assert right(world.truth) == pytest.approx(0.5, abs=0.02)
    random = random_neurons(neuron_space(world.model), 7, world.truth | NeuronSet(world.traps.values()), generator(0))
    assert right(random) == 0.8
    with ablate(world.model, NeuronSet([world.traps["format"]])):
        assert right(NeuronSet()) == 0.8, "a format neuron carries no truth"
    low = planted(seed=3, label_logit=4.0)
    before = ask(low.model, prompts).sum(-1).mean()
    with ablate(low.model, NeuronSet([low.traps["format"]])):
        assert ask(low.model, prompts).sum(-1).mean() < before - 0.05, "but it carries answer mass"


def test_the_same_seed_gives_the_same_world() -> None:
    one, two, other = planted(seed=5), planted(seed=5), planted(seed=6)
    assert list(one.prompts) == list(two.prompts) != list(other.prompts)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("bad", [{"n_layers": 2}, {"d_model": 20}, {"mistaken": 1.5}, {"n_questions": 0}])
def test_what_cannot_be_planted(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"planted needs|expected n_questions"):
        planted(**bad)
