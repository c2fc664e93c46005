"""Truth, choice and format neurons are distinguished on models in which the type of each neuron is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pandas.testing import assert_frame_equal
from scipy import stats

from tests.conftest import needs_hooked
from tn_lens import (
    Evaluation,
    ManipulationCheck,
    Neuron,
    NeuronSet,
    QuestionSet,
    attribute,
    build_prompts,
    evaluate,
    manipulation_check,
    select_neurons,
)
from tn_lens.evaluation.diagnosis import CASES, Diagnosis, diagnose
from tn_lens.models import Model
from tn_lens.toy.plant import Planted, planted


@pytest.fixture(scope="module")
def world() -> Planted:
    return planted(seed=2, mistaken=0.3, label_logit=4.0)


def diagnosed(world: Planted, neurons: list[Neuron]) -> Diagnosis:
    """The diagnosis of given neurons."""
    check = manipulation_check(world.model, world.prompts)
    return diagnose(world.model, NeuronSet(neurons), check, n_steps=5)


@needs_hooked
def test_a_choice_neuron_turns_where_the_model_is_mistaken_and_a_truth_neuron_does_not(world: Planted) -> None:
    # the planted neurons represent the model's choice, right or wrong
    choice = next(iter(world.truth.at("mlp")))
    truth, category = world.traps["contrarian"], world.traps["category"]
    found = diagnosed(world, [choice, truth, category])
    verdicts = {row.neuron: row.verdict for row in found.to_frame().itertuples()}
    assert verdicts == {str(choice): "choice", str(truth): "truth", str(category): "unclear"}
    assert found.n_mistaken == 60
    assert found.n_by_verdict == {"truth": 1, "choice": 1, "damage": 0, "unclear": 1}
    assert "1 of 3 neurons still supports the right answer (truth), 1 supports what the model chose" in found.summary()


@needs_hooked
def test_the_four_cases_follow_the_signs_of_both_labels(world: Planted) -> None:
    signed, form, anti = next(iter(world.truth.at("mlp"))), world.traps["format"], world.traps["anti"]
    found = diagnosed(world, [signed, form, anti])
    case = {row.neuron: row.case for row in found.to_frame().itertuples()}
    assert case == {str(signed): 3, str(form): 1, str(anti): 2}
    four = replace(found, right=-np.ones(3), wrong=-np.ones(3))
    assert four.case.tolist() == [4, 4, 4]
    assert "1 of 3 neurons raises the probabilities of both" in found.summary()
    assert set(CASES) == {1, 2, 3, 4}


@needs_hooked
def test_the_numbers_are_those_of_attribute(world: Planted) -> None:
    neuron = next(iter(world.truth.at("mlp")))
    found = diagnosed(world, [neuron])
    wrong = [p for p in world.prompts if p.question in world.mistaken]
    scores = attribute(world.model, wrong, n_steps=5).difference["mlp"][:, neuron.layer, neuron.index].double().numpy()
    np.testing.assert_allclose(found.mistaken, scores.mean(), rtol=1e-6)
    low, high = stats.t.interval(0.95, len(scores) - 1, scores.mean(), stats.sem(scores))
    np.testing.assert_allclose(found.mistaken_half_width, (high - low) / 2, rtol=1e-6)


@needs_hooked
def test_nothing_found_and_nothing_wrong_are_said(tmp_path: Path) -> None:
    sure = planted(seed=2, mistaken=0.0)
    found = diagnosed(sure, list(sure.truth))
    assert found.verdicts == ["unclear"] * 7
    assert "too few wrong answers to distinguish" in found.summary()
    found.save(tmp_path / "found.safetensors")
    assert_frame_equal(Diagnosis.load(tmp_path / "found.safetensors").to_frame(), found.to_frame())
    assert "nothing to diagnose" in diagnosed(sure, []).summary()


def test_on_the_toy_the_conditions_are_those_of_the_dropped_questions(toy: Model, toy_questions: QuestionSet) -> None:
    finding = toy_questions.part("find").select(range(60))
    check: ManipulationCheck = manipulation_check(toy, build_prompts(toy, finding, order="both"))
    neurons = select_neurons(attribute(toy, check.prompts, n_steps=3), adaptive_threshold=0.1).neurons
    found = diagnose(toy, neurons, check, finding, n_repetitions=2, n_steps=3)
    dropped = {question.id for question in finding} - set(check.questions)
    assert set(check.dropped) == dropped
    again = evaluate(
        toy,
        finding.only(dropped),
        neurons,
        n_repetitions=2,
        conditions=("unablated", "random_matched", "ablated"),
    )
    assert found.evaluation is not None
    assert found.evaluation.n_questions == len(dropped) > 5
    assert found.evaluation.to_dict() == again.to_dict()
    assert [str(n) for n in neurons] == found.to_frame()["neuron"].tolist()
    assert "answers incorrectly in at least one order" in found.summary()


def test_a_rise_that_random_neurons_make_too_is_no_help(toy: Model, toy_questions: QuestionSet) -> None:
    questions = toy_questions.part("report").select(range(40))
    neurons = NeuronSet([Neuron("mlp", 1, None, i) for i in range(30)])
    conditions = ("unablated", "random_matched", "ablated")
    made = evaluate(toy, questions, neurons, n_repetitions=3, conditions=conditions)
    shape = made.probabilities["ablated"].shape[1:]
    right = np.array([p.right for p in made.prompts])
    wrong, sure = np.full(shape, 0.9), np.full(shape, 0.1)
    wrong[np.arange(len(right)), right], sure[np.arange(len(right)), right] = 0.1, 0.9
    known = diagnosed_as(made, neurons)
    no_more, more = (
        "no evidence that ablation raises accuracy there more than ablating random",
        "more than ablating random neurons does, as expected",
    )
    for others, said, unsaid in ((sure, no_more, more), (wrong, more, no_more)):
        answers = {"unablated": wrong, "random_matched": others, "ablated": sure}
        probabilities = {
            name: np.broadcast_to(value, made.probabilities[name].shape) for name, value in answers.items()
        }
        summary = replace(known, evaluation=replace(made, probabilities=probabilities)).summary()
        assert said in summary
        assert unsaid not in summary


def diagnosed_as(evaluation: Evaluation, neurons: NeuronSet) -> Diagnosis:
    """A diagnosis with an evaluation and without any other numbers."""
    names = ("right", "wrong", "mistaken", "mistaken_half_width")
    return Diagnosis(
        neurons=tuple(neurons),
        **{name: np.full(len(neurons), np.nan) for name in names},
        n_mistaken=0,
        evaluation=evaluation,
    )


def test_a_stored_diagnosis_is_the_one_in_memory(toy: Model, toy_questions: QuestionSet, tmp_path: Path) -> None:
    questions = toy_questions.part("report").select(range(12))
    neurons = NeuronSet([Neuron("mlp", 1, None, 3), Neuron("attn", 0, 1, 2)])
    made = evaluate(toy, questions, neurons, n_repetitions=2, conditions=("unablated", "random_matched", "ablated"))
    nothing = diagnosed_as(made, neurons)
    known = replace(
        nothing,
        right=np.array([0.1, -0.2]),
        wrong=np.array([0.3, 0.1]),
        mistaken=np.array([1 / 3, -0.5]),
        mistaken_half_width=np.array([0.1, 0.7]),
        n_mistaken=5,
        swapped=True,
    )
    for number, live in enumerate((nothing, known, replace(known, evaluation=None), diagnosed_as(made, NeuronSet()))):
        for ending in (".safetensors", ".json"):
            live.save(tmp_path / f"{number}{ending}")
            loaded = Diagnosis.load(tmp_path / f"{number}{ending}")
            assert loaded.neurons == live.neurons
            assert_frame_equal(loaded.to_frame(), live.to_frame())
            np.testing.assert_equal(loaded.records(), live.records())
            for name in ("n_mistaken", "swapped", "verdicts", "n_by_verdict", "n_by_case"):
                assert getattr(loaded, name) == getattr(live, name)
            for sentences in (Diagnosis.explain, Diagnosis.summary, repr, Diagnosis._repr_html_):
                assert sentences(loaded) == sentences(live)
            assert loaded.to_bytes(ending) == live.to_bytes(ending)
