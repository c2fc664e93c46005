"""Questions that occur several times in a set, which must not be counted as independent observations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

from tn_lens.questions.question import Dropped, Question, QuestionSet, plain

REASON = "the question occurs in an earlier row"


def without_repeats(questions: QuestionSet) -> QuestionSet:
    """Leave out questions that have the text, the choices and the right choice of an earlier one, in any order of the choices.

    Case and spaces are ignored. `dropped` lists the questions that were left out.
    """
    seen: set[tuple[object, ...]] = set()
    kept: list[Question] = []
    dropped: list[Dropped] = []
    for number, question in enumerate(questions, start=1):
        right = _plain_choices(question)[question.answer]
        key = (question.context, question.plain_text, tuple(sorted(_plain_choices(question))), right)
        if key in seen:
            dropped.append(Dropped(number, question.text, REASON))
        else:
            kept.append(question)
        seen.add(key)
    if not dropped:
        return questions
    return replace(questions, questions=tuple(kept), dropped=(*questions.dropped, *dropped))


def group_of(question: Question) -> str:
    """A digest of a question's text, without case and extra spaces: questions of one group must not be separated."""
    return sha256(question.plain_text.encode(errors="surrogatepass")).hexdigest()[:16]


def groups_of(questions: Sequence[Question]) -> list[str]:
    """The group of every question, for splits that keep equal questions on one side; empty for questions without an equal.

    Questions are equal if they have the same text (see `group_of`). A text that more than 90 % of the questions share, such
    as "Which statement is true?", does not identify them: these questions are equal if their choices are equal as well.
    """
    groups = [group_of(question) for question in questions]
    counts = Counter(groups)
    for place, question in enumerate(questions):
        if counts[groups[place]] > 0.9 * len(questions):
            groups[place] = group_of(replace(question, text=" | ".join(sorted(_plain_choices(question)))))
    counts = Counter(groups)
    return [group if counts[group] > 1 else "" for group in groups]


def _plain_choices(question: Question) -> list[str]:
    choices = [plain(choice) for choice in question.choices]
    # choices may differ only in case
    return choices if len(set(choices)) == len(choices) else list(question.choices)
