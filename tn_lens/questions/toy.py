"""The toy world's questions: two choices, true or false, four choices."""

from __future__ import annotations

from random import Random

from tn_lens.questions.question import PromptTemplate, Question, QuestionSet
from tn_lens.questions.toy_world import RELATIONS, WORLD_SEED, Fact, facts

LETTERED = PromptTemplate(
    user="Question : {question} {choices}",
    choice="Answer {label} : {choice}",
    separator=" ",
    cue=" Answer :",
    chat=False,
)
JUDGED = PromptTemplate(
    user="Statement : {question} True or False ?", choice="", cue=" Answer :", chat=False, labels="choices"
)


def binary() -> QuestionSet:
    """The 576 facts held out from every choice format, each with one wrong value: the toy's TruthfulQA."""
    return QuestionSet(
        name="toy", questions=tuple(_choice(fact, (fact.distractor,)) for fact in _held_out()), template=LETTERED
    )


def true_false() -> QuestionSet:
    """The held-out facts as statements, half of them false: the toy's TriviaQA."""
    questions = []
    for index, fact in enumerate(_held_out()):
        is_true = index % 2 == 0
        text = fact.statement(fact.value if is_true else fact.distractor)
        questions.append(
            Question(
                text=text,
                choices=("True", "False"),
                answer=0 if is_true else 1,
                category=fact.relation,
                split=fact.split,
            )
        )
    return QuestionSet(name="toy_true_false", questions=tuple(questions), template=JUDGED)


def four_choice() -> QuestionSet:
    """The held-out facts with three wrong values, the right one at a random letter: the toy's MMLU."""
    random = Random(WORLD_SEED + 1)
    questions = []
    for fact in _held_out():
        others = [v for v in RELATIONS[fact.relation] if v not in (fact.value, fact.distractor)]
        options = random.sample([fact.value, fact.distractor, *random.sample(others, 2)], 4)
        questions.append(
            Question(
                text=fact.question(),
                choices=tuple(options),
                answer=options.index(fact.value),
                category=fact.relation,
                split=fact.split,
            )
        )
    return QuestionSet(name="toy_four_choice", questions=tuple(questions), template=LETTERED)


def _held_out() -> list[Fact]:
    return [fact for fact in facts() if fact.split != "train"]


def _choice(fact: Fact, wrong: tuple[str, ...]) -> Question:
    return Question(text=fact.question(), choices=(fact.value, *wrong), category=fact.relation, split=fact.split)
