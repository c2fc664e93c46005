"""Answers, the manipulation check, and what suppression does to accuracy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from tests.conftest import PAPER_MODELS
from tn_lens import NeuronSet, Prompt, build_prompts, evaluate, manipulation_check
from tn_lens.ablation import random_neurons
from tn_lens.answers import ask, batches
from tn_lens.evaluation import ARMS, Evaluation
from tn_lens.manipulation import is_right
from tn_lens.models import Model, neuron_space
from tn_lens.questions.toy import binary, four_choice


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_batches_equal_one_by_one(name: str, tiny: Callable[..., Model]) -> None:
    model = tiny(name, torch.float32)
    prompts = build_prompts(model, binary()[:12], order="both")
    assert len({len(p.token_ids) for p in prompts}) > 1, "lengths differ, so that rows are padded"
    together = ask(model, prompts)
    alone = torch.cat([ask(model, [prompt]) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    for prompt, row in zip(prompts, together, strict=True):
        logits = model(torch.tensor([prompt.token_ids]))[0, -1]
        by_hand = [float(logits.softmax(-1)[list(ids)].sum()) for ids in prompt.label_ids]
        np.testing.assert_allclose(row.tolist(), by_hand, atol=1e-4)


def test_a_forgotten_mask_would_be_seen(tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Llama-3.1-8B-Instruct", torch.float32)
    prompts = build_prompts(model, binary()[:12], order="both")
    right = ask(model, prompts)
    monkeypatch.setattr("tn_lens.answers.last_logits", lambda model, tokens, _: model(tokens)[:, -1])
    assert (ask(model, prompts) - right).abs().max() > 1e-3


def test_batches_hold_every_prompt_once(toy: Model) -> None:
    prompts = build_prompts(toy, binary()[:30], order="both")
    cut = list(batches(prompts, 100))
    assert sorted(i for batch in cut for i in batch) == list(range(60))
    assert all(len(b) * max(len(prompts[i].token_ids) for i in b) <= 100 for b in cut)
    assert all(len(b) == 1 for b in batches(prompts, 1))


def prompt(question: int, right: int) -> Prompt:
    return Prompt(token_ids=(1,), label_ids=((2,), (3,)), right=right, question=question, order=(right, 1 - right))


def test_right_is_strictly_more_probable() -> None:
    probabilities = torch.tensor([[0.6, 0.3], [0.6, 0.3], [0.4, 0.4]])
    assert is_right(probabilities, [prompt(0, 0), prompt(1, 1), prompt(2, 0)]).tolist() == [True, False, False]


def test_a_question_passes_only_if_right_in_both_orders(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.9, 0.1], [0.7, 0.2]])
    monkeypatch.setattr("tn_lens.manipulation.ask", lambda *_, **__: answers)
    prompts = [prompt(0, 0), prompt(0, 1), prompt(1, 0), prompt(1, 1)]
    check = manipulation_check(toy, prompts)
    assert check.passed.tolist() == [True, True, False, False]
    assert check.questions == [0]
    assert check.says_a == 0.75
    assert check.answer_mass == pytest.approx(0.975)
    assert check.right_at_a_before == check.right_at_a_after == 0.5
    assert not check.is_lopsided
    assert len(check.to_frame()) == 4


def test_a_model_that_always_says_a_is_called_lopsided(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tn_lens.manipulation.ask", lambda _, prompts, **__: torch.tensor([[0.9, 0.1]] * len(prompts)))
    check = manipulation_check(toy, [prompt(i, i % 2) for i in range(20)])
    assert check.questions == list(range(0, 20, 2))
    assert check.right_at_a_after == 1
    assert "lopsided" in check.summary()


@pytest.fixture(scope="module")
def evaluation(toy: Model) -> Evaluation:
    space = neuron_space(toy)
    neurons = random_neurons(space, 60, NeuronSet(), np.random.default_rng(5))
    return evaluate(toy, binary().part("report")[:60], neurons, n_repetitions=6)


def test_all_arms_share_the_orders_and_random_ones_draw_anew(evaluation: Evaluation) -> None:
    assert evaluation.asked.shape == (6, 60)
    assert set(evaluation.arms) == set(ARMS)
    assert [len(evaluation.probabilities[arm]) for arm in ARMS] == [1, 6, 6, 1]
    random = evaluation.probabilities["random"]
    assert all((random[0] != random[i]).any() for i in range(1, 6))
    per_question = np.stack([[evaluation.prompts[i].question for i in row] for row in evaluation.asked.tolist()])
    assert (per_question == np.arange(60)).all()
    share_swapped = np.mean([[evaluation.prompts[i].order == (1, 0) for i in row] for row in evaluation.asked.tolist()])
    assert 0.35 < share_swapped < 0.65


def test_accuracies_by_hand(evaluation: Evaluation) -> None:
    for name, arm in evaluation.arms.items():
        p = evaluation.probabilities[name]
        for repetition, row in enumerate(evaluation.asked.tolist()):
            draw = repetition if len(p) > 1 else 0
            hits = [p[draw, i, evaluation.prompts[i].right] > p[draw, i, 1 - evaluation.prompts[i].right] for i in row]
            assert arm.accuracies[repetition] == pytest.approx(np.mean(hits))
        averaged = []
        for question in range(60):
            first, second = (i for i, q in enumerate(evaluation.prompts) if q.question == question)
            by_choice = p[:, first] + p[:, second][:, ::-1]  # the second prompt shows the choices the other way round
            averaged.append(by_choice[:, 0] > by_choice[:, 1])
        assert arm.order_averaged_accuracy == pytest.approx(np.mean(averaged))
        assert arm.answer_mass == pytest.approx(np.mean(p.sum(-1)), abs=0.02)
    arms = evaluation.arms
    expected = stats.ttest_ind(
        arms["suppressed"].accuracies, arms["baseline"].accuracies, equal_var=False, alternative="less"
    ).pvalue
    assert evaluation.welch_p == pytest.approx(expected)
    table = evaluation.to_frame()
    assert table.loc["baseline", "accuracy_mean"] == pytest.approx(100 * arms["baseline"].accuracies.mean())
    assert table.loc["baseline", "accuracy_std"] == pytest.approx(100 * arms["baseline"].accuracies.std(ddof=1))


def test_equation_11_by_hand(evaluation: Evaluation) -> None:
    before, after = (evaluation.probabilities[arm][0] for arm in ("baseline", "suppressed"))
    changes = [
        (before[i, right] - after[i, right]) / before[i, right]
        for row in evaluation.asked.tolist()
        for i in row
        for right in [evaluation.prompts[i].right]
    ]
    assert evaluation.probability_change == pytest.approx(np.mean(changes))


def test_some_of_the_questions(evaluation: Evaluation) -> None:
    part = evaluation.only(range(10, 30))
    assert part.n_questions == 20
    assert {p.question for p in part.prompts} == set(range(10, 30))
    for name in ARMS:
        whole = evaluation.arms[name]
        expected = whole._drawn(whole.right)[:, 10:30].mean(-1)
        np.testing.assert_allclose(part.arms[name].accuracies, expected)


def test_four_choices_average_over_their_rotations(toy: Model) -> None:
    found = evaluate(toy, four_choice().part("report")[:20], NeuronSet(), n_repetitions=2)
    assert found.probabilities["baseline"].shape == (1, 80, 4)
    assert found.arms["baseline"].order_averaged_accuracy > 0.5
    assert found.welch_p == 1 or found.arms["baseline"].accuracy_std > 0


def test_no_neurons_change_nothing_and_it_says_so(toy: Model) -> None:
    found = evaluate(toy, binary().part("report")[:20], NeuronSet(), n_repetitions=3)
    for arm in ARMS:
        assert (found.probabilities[arm] == found.probabilities["baseline"]).all()
    assert found.probability_change == 0
    assert "No neurons were suppressed" in found.summary()


def made(before: list[list[float]], after: list[list[float]]) -> Evaluation:
    prompts = tuple(prompt(q, r) for q in range(len(before) // 2) for r in (0, 1))
    asked = np.arange(0, len(before), 2)[None].repeat(2, 0) + np.array([[0], [1]])
    return Evaluation(
        name="made",
        prompts=prompts,
        asked=asked,
        neurons=NeuronSet(),
        probabilities={"baseline": np.array([before]), "suppressed": np.array([after])},
        seed=0,
    )


def test_a_fall_by_letter_bias_alone_is_called_that() -> None:
    knows = [[0.9, 0.1], [0.1, 0.9]] * 10
    says_a = [[0.9, 0.1], [0.6, 0.4]] * 10
    found = made(knows, says_a)
    assert found.arms["suppressed"].accuracy == 0.5
    assert found.arms["suppressed"].order_averaged_accuracy == 1, "the letters cancel and the knowledge is still there"
    assert (
        "letter bias explains part of the fall of 50.0 points; with the letters averaged out it is 0.0"
        in found.summary()
    )


def test_lost_mass_and_inverted_answers_are_called_that() -> None:
    knows = [[0.9, 0.1], [0.1, 0.9]] * 10
    assert "lost instruction following" in made(knows, [[0.3, 0.2], [0.2, 0.3]] * 10).summary()
    assert "below chance" in made(knows, [[0.1, 0.9], [0.9, 0.1]] * 10).summary()
    assert "hardly follows" in made([[0.01, 0.0], [0.0, 0.01]] * 10, knows).summary()


def test_arms_that_cannot_be_compared_are_refused(toy: Model) -> None:
    with pytest.raises(ValueError, match="'suppressed' is missing"):
        evaluate(toy, binary()[:4], NeuronSet(), arms=("baseline",))
    with pytest.raises(ValueError, match="no prompts to ask"):
        manipulation_check(toy, [])


def test_even_letters_are_not_lopsided_with_four_choices(toy: Model) -> None:
    check = manipulation_check(toy, build_prompts(toy, four_choice()[:40], order="both"))
    assert check.right_at_a_before == 0.25
    assert not check.is_lopsided


def test_a_question_that_stands_twice_is_refused(toy: Model) -> None:
    twice = build_prompts(toy, binary()[:3]) + build_prompts(toy, binary()[:3])
    with pytest.raises(ValueError, match="question 0 stands twice"):
        manipulation_check(toy, twice)
    with pytest.raises(ValueError, match="question 0 stands twice"):
        manipulation_check(toy, [prompt(0, 0), prompt(0, 0)])


@pytest.mark.parametrize("bad", [{"n_repetitions": 0}, {"questions": []}])
def test_nothing_to_evaluate_is_refused(bad: dict, toy: Model) -> None:
    questions = binary()[:0] if "questions" in bad else binary()[:4]
    with pytest.raises(ValueError, match="needs a repetition and a question"):
        evaluate(toy, questions, NeuronSet(), n_repetitions=bad.get("n_repetitions", 1))
