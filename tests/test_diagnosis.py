"""Truth, choice and format told apart where it is known which is which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.conftest import needs_hooked
from tn_lens import (
    Evaluation,
    ManipulationCheck,
    Neuron,
    NeuronSet,
    Prompt,
    QuestionSet,
    attribute,
    evaluate,
    manipulation_check,
    select_neurons,
)
from tn_lens.evaluation.diagnosis import CASES, Diagnosis, diagnose
from tn_lens.models import Model
from tn_lens.toy import Planted, planted


@pytest.fixture(scope="module")
def world() -> Planted:
    return planted(seed=2, mistaken=0.3, label_logit=4.0)


def diagnosed(world: Planted, neurons: list[Neuron]) -> Diagnosis:
    """The diagnosis of given neurons."""
    check = manipulation_check(world.model, world.prompts)
    return diagnose(world.model, NeuronSet(neurons), check, n_steps=5)


@needs_hooked
def test_a_choice_neuron_turns_where_the_model_is_mistaken_and_a_truth_neuron_does_not(world: Planted) -> None:
    choice = next(iter(world.truth.at("mlp")))  # carries what the model believes, which is wrong where it is mistaken
    truth, category = world.traps["contrarian"], world.traps["category"]
    found = diagnosed(world, [choice, truth, category])
    verdicts = {row.neuron: row.verdict for row in found.to_frame().itertuples()}
    assert verdicts == {str(choice): "choice", str(truth): "truth", str(category): "unclear"}
    assert found.n_mistaken == 60
    assert found.to_dict()["verdicts"] == {"truth": 1, "choice": 1, "unclear": 1}
    assert "1 of 3 neurons still support the right answer (truth), 1 support what the model chose" in found.summary()


@needs_hooked
def test_the_four_cases_follow_the_signs_of_both_labels(world: Planted) -> None:
    signed, form, anti = next(iter(world.truth.at("mlp"))), world.traps["format"], world.traps["anti"]
    found = diagnosed(world, [signed, form, anti])
    case = {row.neuron: row.case for row in found.to_frame().itertuples()}
    assert case == {str(signed): 3, str(form): 1, str(anti): 2}
    four = replace(found, right=-np.ones(3), wrong=-np.ones(3))
    assert four.case.tolist() == [4, 4, 4]
    assert "1 of 3 raise both labels" in found.summary()
    assert set(CASES) == {1, 2, 3, 4}


@needs_hooked
def test_the_numbers_are_those_of_attribute(world: Planted) -> None:
    neuron = next(iter(world.truth.at("mlp")))
    found = diagnosed(world, [neuron])
    wrong = [p for p in world.prompts if p.question in world.mistaken]
    scores = attribute(world.model, wrong, n_steps=5).difference["mlp"][:, neuron.layer, neuron.index].double().numpy()
    np.testing.assert_allclose(found.mistaken, scores.mean(), rtol=1e-6)
    from scipy import stats

    low, high = stats.t.interval(0.95, len(scores) - 1, scores.mean(), stats.sem(scores))
    np.testing.assert_allclose(found.mistaken_half_width, (high - low) / 2, rtol=1e-6)


@needs_hooked
def test_nothing_found_and_nothing_wrong_are_said() -> None:
    sure = planted(seed=2, mistaken=0.0)
    found = diagnosed(sure, list(sure.truth))
    assert found.verdicts == ["unclear"] * 7
    assert "too few of the questions wrong" in found.summary()
    assert "nothing to diagnose" in diagnosed(sure, []).summary()


def test_on_the_toy_the_arms_are_those_of_the_dropped_questions(toy: Model, toy_questions: QuestionSet) -> None:
    from tn_lens import build_prompts

    finding = toy_questions.part("find").select(range(60))
    prompts: list[Prompt] = build_prompts(toy, finding, order="both")
    check: ManipulationCheck = manipulation_check(toy, prompts)
    neurons = select_neurons(attribute(toy, check.prompts, n_steps=3), t=0.1).neurons
    found = diagnose(toy, neurons, check, finding, n_repetitions=2, n_steps=3)
    dropped = sorted(set(range(60)) - set(check.questions))
    again = evaluate(
        toy,
        finding.select(dropped),
        neurons,
        n_repetitions=2,
        arms=("baseline", "random_matched", "suppressed"),
    )
    assert found.evaluation is not None
    assert found.evaluation.n_questions == len(dropped) > 5
    assert found.evaluation.to_dict() == again.to_dict()
    assert [str(n) for n in neurons] == found.to_frame()["neuron"].tolist()
    assert "gets wrong in one order or both" in found.summary()


def test_a_rise_that_random_neurons_make_too_is_no_help(toy: Model, toy_questions: QuestionSet) -> None:
    questions = toy_questions.part("report").select(range(40))
    neurons = NeuronSet([Neuron("mlp", 1, None, i) for i in range(30)])
    arms = ("baseline", "random_matched", "suppressed")
    made = evaluate(toy, questions, neurons, n_repetitions=3, arms=arms)
    shape = made.probabilities["suppressed"].shape[1:]
    right = np.array([p.right for p in made.prompts])
    wrong, sure = np.full(shape, 0.9), np.full(shape, 0.1)
    wrong[np.arange(len(right)), right], sure[np.arange(len(right)), right] = 0.1, 0.9
    known = diagnosed_as(made, neurons)
    for others, said in ((sure, "no help beyond that of random neurons"), (wrong, "more than random neurons do")):
        arms_now = {"baseline": wrong, "random_matched": others, "suppressed": sure}
        probabilities = {
            name: np.broadcast_to(value, made.probabilities[name].shape) for name, value in arms_now.items()
        }
        assert said in replace(known, evaluation=replace(made, probabilities=probabilities)).summary()


def diagnosed_as(evaluation: Evaluation, neurons: NeuronSet) -> Diagnosis:
    """A diagnosis of which only the arms matter."""
    unknown = np.full(len(neurons), np.nan)
    return Diagnosis(
        neurons=tuple(neurons),
        right=unknown,
        wrong=unknown,
        mistaken=unknown,
        mistaken_half_width=unknown,
        n_mistaken=0,
        evaluation=evaluation,
    )
