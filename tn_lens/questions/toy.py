"""The toy world's questions: two choices, true or false, four choices."""

from __future__ import annotations

from random import Random

from tn_lens.questions.formats import FORMATS, PromptTemplate
from tn_lens.questions.question import Question, QuestionSet
from tn_lens.questions.registry import QUESTION_SETS
from tn_lens.questions.toy_world import RELATIONS, WORLD_SEED, Fact, facts

LETTERED = PromptTemplate(
    user="Question : {question} {choices}",
    choice="Answer {label} : {choice}",
    separator=" ",
    cue=" Answer :",
    chat=False,  # the toy model has no chat template
)
"""The toy model's format for questions whose answer is a letter."""
FORMATS.register("toy", LETTERED)

JUDGED = PromptTemplate(
    user="Statement : {question} True or False ?", choice="", cue=" Answer :", chat=False, kind="statement"
)
"""The toy model's format for statements that are judged True or False."""
FORMATS.register("toy_statement", JUDGED)

ANSWERED = PromptTemplate(user="Question : {question}", choice="", cue=" Answer :", chat=False, kind="completion")
"""The toy model's form of "qa", in which the answer itself follows the question."""
FORMATS.register("toy_qa", ANSWERED)


@QUESTION_SETS.register("toy")
def binary() -> QuestionSet:
    """Load the 576 held-out facts, each with one wrong value: the toy model's counterpart of TruthfulQA."""
    questions = [_question(fact, fact.question(), (fact.value, fact.distractor)) for fact in _held_out()]
    return QuestionSet(name="toy", questions=tuple(questions), template=LETTERED, formats=("letters",))


@QUESTION_SETS.register("toy_true_false")
def true_false() -> QuestionSet:
    """Load the held-out facts as statements, half of them false: the toy model's counterpart of TriviaQA."""
    questions = []
    for index, fact in enumerate(_held_out()):
        answer = index % 2  # 0 for a true statement, 1 for a false one
        text = fact.statement((fact.value, fact.distractor)[answer])
        questions.append(_question(fact, text, ("True", "False"), answer))
    return QuestionSet(name="toy_true_false", questions=tuple(questions), template=JUDGED, formats=("statement",))


@QUESTION_SETS.register("toy_four_choice")
def four_choice() -> QuestionSet:
    """Load the held-out facts with three wrong values, the right one at a random letter: the counterpart of MMLU."""
    random = Random(WORLD_SEED + 1)
    questions = []
    for fact in _held_out():
        # one wrong choice is the misconception, as in the set with two choices
        others = [value for value in RELATIONS[fact.relation] if value not in (fact.value, fact.distractor)]
        choices = random.sample([fact.value, fact.distractor, *random.sample(others, 2)], 4)
        questions.append(_question(fact, fact.question(), tuple(choices), choices.index(fact.value)))
    return QuestionSet(name="toy_four_choice", questions=tuple(questions), template=LETTERED, formats=("letters",))


def _held_out() -> list[Fact]:
    return [fact for fact in facts() if fact.split != "train"]


def _question(fact: Fact, text: str, choices: tuple[str, ...], answer: int = 0) -> Question:
    return Question(text=text, choices=choices, answer=answer, category=fact.relation, split=fact.split)
