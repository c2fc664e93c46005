"""Common facts: capitals, antonyms, past tenses and others that small models know. They are embedded, so nothing is downloaded."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from typing import Any

from tn_lens.questions.formats import COMPLETION
from tn_lens.questions.question import Question, QuestionSet, stream_of
from tn_lens.questions.registry import QUESTION_SETS

PARTS = {"find": 0.5, "report": 0.35, "tune": 0.15}
"""Fractions of every category in the parts of the set."""


@QUESTION_SETS.register("common_facts")
def load_common_facts() -> QuestionSet:
    """Load the embedded common facts.

    Every fact has a wrong answer of the same kind, which is the right answer of another fact of its category. A fact can be
    asked as a completion (the default), as a question with letters, and as a statement. The parts `"find"`, `"report"` and
    `"tune"` divide every category.
    """
    content = resources.files("tn_lens.questions").joinpath("common_facts.json").read_text(encoding="utf-8")
    questions = []
    for category, entry in json.loads(content).items():
        questions += _in_parts([_question(category, entry, *fact) for fact in entry["facts"]])
    return QuestionSet(name="common_facts", questions=tuple(questions), template=COMPLETION)


def _question(category: str, wordings: dict[str, Any], subject: str, right: str, wrong: str) -> Question:
    text, completion, statement = (
        wordings[name].replace("{subject}", subject) for name in ("question", "completion", "statement")
    )
    return Question(text=text, choices=(right, wrong), category=category, completion=completion, statement=statement)


def _in_parts(questions: list[Question]) -> list[Question]:
    """Assign the questions of a category to the parts, in an order that depends on their ids alone."""
    ranked = sorted(questions, key=lambda question: stream_of(question.id))
    part_of, start = {}, 0.0
    for part, fraction in PARTS.items():
        for question in ranked[round(start * len(ranked)) : round((start + fraction) * len(ranked))]:
            part_of[question.id] = part
        start += fraction
    return [replace(question, split=part_of[question.id]) for question in questions]
