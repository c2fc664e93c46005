"""Damage neurons are named: neurons without which the model loses every text, and not only the truth."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import QUICK, contents, needs_hooked
from tn_lens import (
    BadInput,
    ManipulationCheck,
    NeuronSet,
    QuestionSet,
    Zero,
    attribute,
    build_prompts,
    diagnose,
    find_truth_neurons,
    load_run,
    manipulation_check,
    measure_damage,
    neuron_space,
    select_neurons,
)
from tn_lens.evaluation.damage import WHOLE, Damage, _damaging, _Measured, _Measurements, _parts
from tn_lens.evaluation.text import text_loss
from tn_lens.figures import plot_damage
from tn_lens.models import Model
from tn_lens.neurons import Neuron
from tn_lens.toy.plant import Planted, planted


@pytest.fixture(scope="module")
def world() -> Planted:
    return planted(seed=3, word_logit=1.0)


@pytest.fixture(scope="module")
def check(world: Planted) -> ManipulationCheck:
    return manipulation_check(world.model, world.prompts)


def measured(world: Planted, neurons: NeuronSet, **options: Any) -> Damage:
    return measure_damage(world.model, neurons, world.prompts, texts=world.texts, **options)


@needs_hooked
@pytest.mark.parametrize("seed", range(2))
def test_the_damage_trap_enters_without_its_filter_and_is_the_only_one_named(seed: int) -> None:
    world = planted(seed=seed, word_logit=1.0)
    scores = attribute(world.model, manipulation_check(world.model, world.prompts).prompts, n_steps=5)
    found = select_neurons(scores, adaptive_threshold=0.1).neurons
    trap = NeuronSet([world.traps["damage"]])
    assert found == world.truth | trap
    damage = measured(world, found)
    assert damage.neurons == trap
    assert found - damage.neurons == world.truth
    assert damage.is_damaging
    assert "1 neuron is a damage neuron" in damage.summary()
    without = measured(world, world.truth)
    assert not without.neurons
    assert not without.is_damaging
    assert "None of the neurons is a damage neuron" in without.summary()


@needs_hooked
def test_the_losses_are_those_of_a_model_whose_weights_are_zero(world: Planted) -> None:
    trap, truth = world.traps["damage"], next(iter(world.truth.at("mlp", 1)))
    damage = measured(world, NeuronSet([trap, truth]))

    def loss(*neurons: Neuron) -> float:
        rows = [world.model.blocks[n.layer].mlp.W_out for n in neurons]
        saved = [row.clone() for row in rows]
        with torch.no_grad():
            for row, neuron in zip(rows, neurons, strict=True):
                row[neuron.index] = 0
            tokens = torch.tensor(world.texts)
            logits = world.model(tokens)[:, :-1].flatten(0, 1)
            value = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).item()
            for row, before in zip(rows, saved, strict=True):
                row.copy_(before)
        return value

    assert damage.text_loss == pytest.approx(loss(), abs=1e-5)
    assert damage.rise() == pytest.approx(loss(trap, truth) - loss(), abs=1e-5)
    for neuron in (trap, truth):
        assert damage.rise(neuron) == pytest.approx(loss(neuron) - loss(), abs=1e-5)
        assert damage.rise(f"mlp {neuron.layer}") == pytest.approx(loss(neuron) - loss(), abs=1e-5)
    assert damage.rise(trap) > 0.5 > 100 * abs(damage.rise(truth))
    assert np.isnan(damage.rise("mlp 3"))


@needs_hooked
def test_controls_have_as_many_neurons_in_every_place_and_are_harmless_here(world: Planted) -> None:
    found = NeuronSet([*world.truth, world.traps["damage"]])
    frame = measured(world, found).to_frame()
    places = frame[~frame["part"].str.contains(":")].pivot(index="part", columns="condition", values="n_neurons")
    assert (places["ablated"] == places["random_matched"]).all()
    assert (places["ablated"] == places["top_activation"]).all()
    assert dict(places["ablated"]) == {WHOLE: 8, "mlp 0": 1, "mlp 1": 3, "mlp 2": 2, "attn 0": 1, "attn 1": 1}
    rise = frame.set_index(["condition", "part"])["rise"]
    assert rise["ablated", WHOLE] > 0.5
    assert abs(rise["random_matched", WHOLE]) < 0.05
    assert rise["top_activation", WHOLE] < 0.05  # they include the format neuron, without which text gains


class Losses(_Measurements):
    """Stands for measurements: the loss is a function of the set."""

    def __init__(self, loss: Callable[[Collection[Neuron]], float]) -> None:
        self.loss = loss

    def __missing__(self, neurons: NeuronSet) -> _Measured:
        return _Measured(self.loss(neurons), 1.0)


def neurons_of(layer: int, n: int) -> list[Neuron]:
    return [Neuron("mlp", layer, None, index) for index in range(n)]


def chosen(loss: Callable[[Collection[Neuron]], float], neurons: list[Neuron], limit: float) -> NeuronSet:
    parts = _parts(NeuronSet(neurons))
    return _damaging(Losses(loss), parts, neurons, limit)


def test_neurons_that_only_damage_together_are_named_until_the_rest_is_harmless() -> None:
    redundant, innocent = neurons_of(1, 6), neurons_of(2, 6)

    def loss(ablated: Collection[Neuron]) -> float:
        together = sum(neuron.layer == 1 for neuron in ablated)
        return 0.001 * together + (together > 3) * together + 0.002 * sum(n.layer == 2 for n in ablated)

    damaging = chosen(loss, redundant + innocent, limit=0.05)
    assert len(damaging) == 3  # with three of the six left, the model still works
    assert damaging <= set(redundant)
    assert all(loss(part) <= 0.05 for part in combinations(set(redundant + innocent) - damaging, 9))
    assert chosen(loss, innocent, limit=0.05) == NeuronSet()


def test_neurons_that_damage_across_layers_are_named_as_well() -> None:
    across = [neurons_of(layer, 1)[0] for layer in range(4)]

    def loss(ablated: Collection[Neuron]) -> float:
        return float(len(ablated) > 1) + 0.01 * sum(neuron.layer for neuron in ablated)

    assert chosen(loss, across, limit=0.05) == NeuronSet(across[1:])  # the largest rise alone is chosen first


def test_a_neuron_that_damages_alone_is_named_even_if_another_one_compensates_for_it() -> None:
    harmful, compensating = neurons_of(1, 2)

    def loss(ablated: Collection[Neuron]) -> float:
        return 1.0 * (harmful in ablated) - 1.0 * (compensating in ablated)

    assert chosen(loss, [harmful, compensating], limit=0.05) == NeuronSet([harmful])


@needs_hooked
def test_diagnosis_and_its_sentences_name_damage(world: Planted, check: ManipulationCheck, tmp_path: Path) -> None:
    found = NeuronSet([*world.truth, world.traps["damage"]])
    diagnosis = diagnose(world.model, found, check, damage=measured(world, found), n_steps=5)
    frame = diagnosis.to_frame().set_index("neuron")
    assert frame["verdict"][str(world.traps["damage"])] == "damage"
    assert (frame["verdict"] == "damage").sum() == diagnosis.n_by_verdict["damage"] == 1
    assert frame["text_loss_rise"].idxmax() == str(world.traps["damage"])
    assert "1 is a damage neuron" in diagnosis.summary()
    diagnosis.save(tmp_path / "diagnosis.safetensors")
    loaded = type(diagnosis).load(tmp_path / "diagnosis.safetensors")
    assert loaded.verdicts == diagnosis.verdicts
    assert loaded.damage is not None
    assert loaded.damage.to_frame().equals(diagnosis.damage.to_frame())  # type: ignore[union-attr]


@needs_hooked
def test_the_figure_shows_every_condition_and_the_rest(world: Planted) -> None:
    found = NeuronSet([*world.truth, world.traps["damage"]])
    damage = measured(world, found)
    figure = plot_damage(damage)
    bar = figure.traces[0]
    assert list(bar.customdata)[:3] == ["all 8", "without damage neurons (7)", "mlp 0 (1)"]
    assert bar.x[0] == damage.rise()
    assert bar.x[1] == damage.rest_loss - damage.text_loss
    assert {trace.name for trace in figure.traces} == {"found neurons", "matched neurons", "most active neurons"}
    with pytest.raises(BadInput, match="got none"):
        plot_damage(measured(world, NeuronSet()))


@needs_hooked
def test_token_ids_need_no_tokenizer_and_the_size_of_batches_does_not_matter(
    world: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [ids[:length] for ids, length in zip(world.texts, [*range(2, 13), *[5] * 9], strict=True)]
    whole = text_loss(world.model, texts)
    monkeypatch.setattr("tn_lens.evaluation.likelihoods.MOST_LOGITS", 1)
    assert text_loss(world.model, texts) == pytest.approx(whole, abs=1e-6)
    total = sum(text_loss(world.model, [ids]) * (len(ids) - 1) for ids in texts)
    assert whole == pytest.approx(total / sum(len(ids) - 1 for ids in texts), abs=1e-6)
    with pytest.raises(BadInput, match="no tokenizer"):
        text_loss(world.model, ["a text"])


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf")])
def test_the_bound_is_a_positive_number(toy: Model, few: QuestionSet, bound: float) -> None:
    with pytest.raises(BadInput, match="bound must be a positive number of nats per token"):
        measure_damage(toy, NeuronSet(), build_prompts(toy, few), bound=bound)
    with pytest.raises(BadInput, match="damage_bound must be a positive number of nats per token"):
        find_truth_neurons(toy, few, replace(QUICK, damage_bound=bound))


def test_interventions_that_take_values_from_prompts_have_no_loss_on_text(toy: Model, few: QuestionSet) -> None:
    neurons = NeuronSet([neuron_space(toy).neuron("mlp", 0, 1)])
    with pytest.raises(BadInput, match="takes no values from prompts"):
        measure_damage(toy, neurons, build_prompts(toy, few), intervention=Zero(positions="last"))


LOW = replace(QUICK, alpha=0.05, damage_bound=0.0003)
"""Settings with a bound so low that some neurons of the toy exceed it."""


@pytest.fixture(scope="module")
def damaged(toy: Model, few: QuestionSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "run"
    find_truth_neurons(toy, few, LOW, out=folder, progress=False)
    return folder


def test_a_run_says_what_is_left_without_damage_neurons(damaged: Path) -> None:
    found = load_run(damaged)
    damage = found.damage
    assert damage is not None
    assert damage.others is not None
    assert damage.others.neurons == found.neurons - damage.neurons
    assert damage.is_damaging
    assert found.diagnosis.n_by_verdict["damage"] == len(damage.neurons) > 0
    warning = next(sentence for sentence in found.warnings() if "raises the loss on plain text" in sentence)
    after = damage.others.conditions["ablated"].accuracy
    assert f"to {100 * after:.1f} %" in warning
    page = (damaged / "report.html").read_text(encoding="utf-8")
    assert "Damage to plain text" in page
    assert warning in page
    marked = [card for card in found.cards if card.verdict == "damage"]
    assert {card.neuron for card in marked} <= damage.neurons
    assert all("damage:" in card.to_text() for card in marked)
    assert marked


def test_excluding_damage_redoes_the_evaluation_from_stored_scores(
    damaged: Path, toy: Model, few: QuestionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, first = contents(damaged), load_run(damaged)

    def nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("scores are attributed again")

    with monkeypatch.context() as patch:
        patch.setattr("tn_lens.pipeline.run.attribute", nothing)
        found = find_truth_neurons(toy, few, replace(LOW, exclude="damage"), out=damaged, progress=False)
    assert first.damage is not None
    assert found.neurons == first.neurons - first.damage.neurons
    assert found.selection.excluded == first.damage.neurons & first.neurons
    assert found.evaluation.neurons == found.neurons
    n_out = len(found.selection.excluded)
    assert f"{n_out} damage neuron{'s' if n_out > 1 else ''} left out" in found.selection.summary()
    assert load_run(damaged).settings.exclude == "damage"
    assert found.diagnosis.n_by_verdict["damage"] == 0
    # and back
    find_truth_neurons(toy, few, LOW, out=damaged, progress=False)
    after = contents(damaged)
    changed = {name for name in before if before[name] != after.get(name)}
    assert {name for name in changed if not name.startswith("work/")} <= {"report.html"}
    assert set(before) <= set(after)


def test_another_setting_is_still_refused(damaged: Path, toy: Model, few: QuestionSet) -> None:
    with pytest.raises(BadInput, match=r"damage_bound = 0\.0003, but this run has damage_bound = 0\.5"):
        find_truth_neurons(toy, few, replace(LOW, damage_bound=0.5), out=damaged)


@needs_hooked
def test_sentences_on_what_is_left_add_up(world: Planted) -> None:
    trap = world.traps["damage"]
    some = measured(world, NeuronSet([*world.truth, trap]))
    assert "No other neurons" not in some.summary(), "others were found, but not evaluated"
    alone = measured(world, NeuronSet([trap]))
    assert alone.neurons == {trap}
    assert "1 neuron is a damage neuron. No other neurons were found" in alone.summary()


def test_an_excluded_run_says_what_was_left_out(toy: Model, few: QuestionSet) -> None:
    found = find_truth_neurons(toy, few, replace(LOW, exclude="damage"), progress=False)
    n_out = len(found.selection.excluded)
    assert n_out
    said = " ".join(found.warnings())
    assert f"{n_out} damage neuron{'s were' if n_out > 1 else ' was'} left out" in said
    assert "raises the loss on plain text from" not in said
    assert not found.selection.excluded & found.neurons
    assert found.selection.found.sum() == len(found.neurons) + n_out
    assert len(found.selection.to_frame()) == len(found.neurons) == len(found.selection.by_strength)
    assert found.found_again is None or 0 <= found.found_again <= 1


def test_damage_that_cannot_be_measured_cannot_be_excluded(toy: Model, few: QuestionSet) -> None:
    for settings, texts in (
        (replace(QUICK, exclude="damage", intervention="resample"), None),
        (replace(QUICK, intervention="resample"), ["some words"]),
    ):
        with pytest.raises(BadInput, match="the loss on plain text needs a tokenizer, and an intervention"):
            find_truth_neurons(toy, few, settings, texts=texts)
    for nothing in ([], [""], [[3]]):
        with pytest.raises(BadInput, match="needs a text of at least two tokens; got none"):
            find_truth_neurons(toy, few, QUICK, texts=nothing)


@pytest.mark.parametrize("intervention", ["mean", "resample"])
def test_runs_with_other_interventions(toy: Model, few: QuestionSet, intervention: str) -> None:
    found = find_truth_neurons(toy, few, replace(QUICK, intervention=intervention), progress=False)
    assert found.neurons
    if intervention == "resample":
        assert found.damage is None
    else:
        assert found.damage is not None
        assert found.damage.intervention == "mean-ablated"
        assert "mean-ablated" in found.damage.summary()
