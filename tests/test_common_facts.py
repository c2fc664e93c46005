"""The embedded facts: their wordings, their wrong answers and their parts, and prompts in every format."""

from __future__ import annotations

import operator
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import tn_lens as tn
from tn_lens.models import Model
from tn_lens.questions.common_facts import PARTS
from tn_lens.questions.question import plain
from tn_lens.questions.registry import QUESTION_SETS

QUESTIONS = tn.load_questions("common_facts")
MILAN = next(question for question in QUESTIONS if question.text == "In which country is the city of Milan?")


def test_facts_have_categories_and_different_questions() -> None:
    assert len(QUESTIONS) == 1665
    assert len(QUESTIONS.categories) == 28
    assert not QUESTIONS.dropped
    for wording in ("text", "completion", "statement", "id"):
        assert len({plain(getattr(question, wording)) for question in QUESTIONS}) == len(QUESTIONS), wording


def test_every_wording_is_filled() -> None:
    for question in QUESTIONS:
        statements = [question.asked_as("statement", choice) for choice in question.choices]
        wordings = question.text, question.completion, *statements
        assert len(set(wordings)) == 4, question
        for text in wordings:
            assert text == text.strip()
            assert not re.search(r"[{}]|  ", text), text
            assert text[0].isupper() or text[0].isdigit()
        assert question.text.endswith("?")
        assert not question.completion.endswith((".", "?"))
        for choice, statement in zip(question.choices, statements, strict=True):
            assert statement == question.statement.replace("{choice}", choice)
            assert statement.endswith(f" {choice}.")


def test_the_completion_continued_with_a_choice_is_the_statement() -> None:
    for question in QUESTIONS:
        if question.category not in ("addition_subtraction", "multiplication"):
            assert (
                question.asked_as("statement", question.choices[1]) == f"{question.completion} {question.choices[1]}."
            )


def test_wrong_answers_are_right_answers_of_other_facts_of_the_category() -> None:
    for category in QUESTIONS.categories:
        facts = [question for question in QUESTIONS if question.category == category]
        rights = {question.choices[0] for question in facts}
        for question in facts:
            right, wrong = question.choices
            assert question.answer == 0
            assert wrong in rights
            assert plain(right).split()[0] != plain(wrong).split()[0], question


def test_arithmetic_is_right() -> None:
    operations = {"+": operator.add, "-": operator.sub, "x": operator.mul}
    checked = Counter()
    for question in QUESTIONS:
        if sums := re.fullmatch(r"(\d+) ([-+x]) (\d+) =", question.completion):
            result = str(operations[sums[2]](int(sums[1]), int(sums[3])))
            assert question.choices[0] == result != question.choices[1]
            checked[question.category] += 1
    assert checked == {"addition_subtraction": 51, "multiplication": 43}


def test_facts_about_cities_agree_with_the_capitals() -> None:
    """Two categories that were written separately."""
    capital_of = {q.choices[0]: q.text for q in QUESTIONS if q.category == "capitals"}
    country_of = {q.text.removeprefix("In which country is the city of ")[:-1]: q.choices[0] for q in QUESTIONS}
    common = capital_of.keys() & country_of.keys()
    assert len(common) > 25
    kingdom = {"England": "the United Kingdom"}
    for city in common:
        country = kingdom.get(country_of[city], country_of[city])
        assert capital_of[city] == f"What is the capital of {country}?"


def test_every_category_is_in_every_part() -> None:
    parts = {name: QUESTIONS.part(name) for name in PARTS}
    assert sum(map(len, parts.values())) == len(QUESTIONS)
    ids = [{question.id for question in part} for part in parts.values()]
    assert not ids[0] & ids[1] | ids[0] & ids[2] | ids[1] & ids[2]
    for name, fraction in PARTS.items():
        assert parts[name].categories == QUESTIONS.categories
        for category, n in Counter(q.category for q in QUESTIONS).items():
            assert abs(sum(q.category == category for q in parts[name]) - fraction * n) <= 1


def test_the_set_is_the_same_everywhere() -> None:
    assert (
        QUESTIONS.digest
        == tn.load_questions("common_facts").digest
        == "e5c866ed78c11dc5d47657d3e6135724be5116e1a99469b2a85c948ff367f79f"
    )


def test_a_changed_wording_changes_the_digest() -> None:
    other = replace(QUESTIONS[0], completion="The seat of government of France is")
    assert other.id == QUESTIONS[0].id, "its place in the parts does not depend on the wording"
    digests = {QUESTIONS.digest}
    for changed in (
        other,
        replace(QUESTIONS[0], statement="{choice} is the capital of France."),
        replace(QUESTIONS[0], completion=""),
    ):
        digests.add(replace(QUESTIONS, questions=(changed, *QUESTIONS[1:])).digest)
    shots = QUESTIONS.with_format(n_shots=1)
    digests.add(shots.digest)
    digests.add(replace(shots, examples=(replace(shots.examples[0], completion="Say"),)).digest)
    assert len(digests) == 6


def test_wordings_do_not_move_between_questions_unnoticed() -> None:
    first, second = (tn.Question(text=text, choices=("a", "b")) for text in ("Q?", "R?"))
    digests = {
        tn.QuestionSet(name="s", questions=pair).digest
        for pair in ((replace(first, completion="So"), second), (first, replace(second, completion="So")))
    }
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("toy", "1fdad403a13cd6aed62bfddae4950e4b44958e6f89065667e53d65d80bce7376"),
        ("toy_true_false", "dd8a377bc73b7f5d2e4567c9c29e6bc9a1c4aea50fad5a42f0bee97e8b4555d0"),
        ("toy_four_choice", "730839c30c0bf3a180fa610405bdcf7e91936b9ffa006b22e46fbde6bc98300c"),
    ],
)
def test_digests_of_sets_without_other_wordings_are_those_of_earlier_versions(name: str, digest: str) -> None:
    assert tn.load_questions(name).digest == digest


def test_the_digest_of_truthfulqa_is_that_of_earlier_versions(shared: Path) -> None:
    questions = tn.load_questions("truthfulqa", source=shared / "data" / "TruthfulQA.csv")
    assert questions.digest == "a84be943b13b2b576e46649a9a68e79aaff0a15e7f0c9659ce1c448cc881f88b"
    shots = questions.with_format("statement", n_shots=3)
    assert shots.digest == "c7730f19070dafb7f33fd73c7450b2c6f919076c3f59aaa22735dd5890d24c21"


def test_a_fact_in_the_three_formats(shared: Path) -> None:
    model = tn.load_model(shared / "models" / "tinystories-656k")
    one = replace(QUESTIONS, questions=(MILAN,))
    (completion,) = tn.build_prompts(model, one, order="both")
    assert completion.text.removesuffix(" ") == "The city of Milan is in the country of"
    first, second = tn.build_prompts(model, one.with_format("letters"), order="both")
    system = "You are a helpful assistant that can help to answer the questions from the user truthfully\n\n"
    instruction = (
        "Given the following question, which answer is correct regarding the question? Each answer is associated with index "
        "A and B. Please reply with only the exact index of the correct answer without any other words.\n"
    )
    for prompt, (a, b) in ((first, ("Italy", "Thailand")), (second, ("Thailand", "Italy"))):
        question = f"Question: In which country is the city of Milan?\nAnswer A: {a}\nAnswer B: {b}\nAnswer:"
        assert prompt.text.rstrip() == system + instruction + question
    assert [first.right, second.right] == [0, 1]
    asked = "\nIs this statement true or false? Please reply with only True or False.\nAnswer:"
    true, false = tn.build_prompts(model, one.with_format("statement"), order="both")
    assert true.text.rstrip() == f"The city of Milan is in the country of Italy.{asked}"
    assert false.text.rstrip() == f"The city of Milan is in the country of Thailand.{asked}"
    assert [true.labels[true.right], false.labels[false.right]] == ["True", "False"]


def test_questions_without_other_wordings_are_asked_with_their_text() -> None:
    question = tn.Question(text="Is it?", choices=("Yes", "No"))
    assert question.asked_as("letters") == question.asked_as("completion") == "Is it?"
    assert question.asked_as("statement", "No") == 'The answer to the question "Is it?" is "No".'
    judged = tn.Question(text="It is.", choices=("True", "False"), statement="Not {choice}")
    assert judged.asked_as("statement", "True") == "It is."


@pytest.mark.parametrize("field", ["text", "completion", "statement"])
def test_special_tokens_in_any_wording_are_refused(field: str, shared: Path) -> None:
    model: Model = tn.load_model(shared / "models" / "tinystories-656k")
    token = model.tokenizer.eos_token
    questions = replace(QUESTIONS, questions=(replace(MILAN, **{field: f"Say {token} {{choice}}"}),))
    with pytest.raises(tn.BadInput, match="which is a special token"):
        tn.build_prompts(model, questions)


def test_smollm2_prefers_the_right_completions(smollm2: Model) -> None:
    """The share on the whole set is 87.7 %."""
    sample = QUESTIONS.select(range(0, len(QUESTIONS), 17))
    check = tn.manipulation_check(smollm2, tn.build_prompts(smollm2, sample))
    assert len(sample) == 98
    assert check.n_kept / len(sample) > 0.8


def test_the_help_and_the_messages_name_every_set() -> None:
    from tn_lens.core.options import SETS, list_sets

    names = [name for names in SETS.values() for name in names]
    negated = [f"neg_{name}" for kind, names in SETS.items() if kind.startswith("statements") for name in names]
    built_in = {
        name for name, loader in QUESTION_SETS.items() if "tn_lens" in getattr(loader, "func", loader).__module__
    }
    assert sorted(names + negated) == sorted(built_in)
    with pytest.raises(tn.BadInput, match="unknown question set 'riddles'") as raised:
        tn.load_questions("riddles")
    assert list_sets() in str(raised.value)
    assert all(name in list_sets() for name in names)
