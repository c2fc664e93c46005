"""What a question is, what a set of them is, and how one is worded as a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Literal, overload

import pandas as pd

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with two or more choices, of which one is right (paper 2.2: q, t and f)."""

    text: str
    choices: tuple[str, ...]
    answer: int = 0
    """Index of the right choice."""
    category: str = ""
    split: str = ""
    """Which part of its set a question belongs to ("tune", "find", "report"); empty where there are no parts."""
    context: str = ""
    """What a template with `{context}` puts before the question: solved examples, say."""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """How a question becomes text, with a chat template and without one."""

    user: str
    """The user's turn, with `{question}`, `{choices}` and, if wanted, `{labels}` ("A and B") and `{context}`."""
    choice: str = "Answer {label}: {choice}"
    """One line per choice; empty where the choices are not listed."""
    separator: str = "\n"
    """Between the lines of the choices."""
    system: str | None = None
    """The system's turn."""
    cue: str = "\nAnswer:"
    """What ends the prompt of a model without a chat template, where labels follow with a space before them."""
    chat: bool = True
    """Use the model's chat template where it has one."""
    labels: Literal["letters", "choices"] = "letters"
    """Whether the model answers with a letter or with the choice itself."""


FIGURE_9 = PromptTemplate(
    system="You are a helpful assistant that can help to answer the questions from the user truthfully",
    user=(
        "Given the following question, which answer is correct regarding the question? Each answer is associated with "
        "index {labels}. Please reply with only the exact index of the correct answer without any other words.\n"
        "Question: {question}\n{choices}"
    ),
)
"""The prompt of the paper's figure 9."""


@dataclass(frozen=True)
class Dropped:
    """A row of a file that did not become a question, and why."""

    row: int
    """Counted from 1, without a header."""
    text: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class QuestionSet(Sequence[Question]):
    """Questions in a fixed order, with the template they are asked in."""

    name: str
    questions: tuple[Question, ...]
    template: PromptTemplate = FIGURE_9
    fixed_order: bool = False
    """Whether the standard evaluation keeps the choices where they stand (MMLU), instead of permuting them."""
    source: str | None = None
    """The file that it was read from, as its path was given; None for sets by name and those made in Python."""
    dropped: tuple[Dropped, ...] = ()
    """Rows that were cleaned away when the set was loaded."""

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> QuestionSet: ...
    def __getitem__(self, index: int | slice) -> Question | QuestionSet:
        if isinstance(index, slice):
            return replace(self, questions=self.questions[index])
        return self.questions[index]

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[Question]:
        return iter(self.questions)

    def __repr__(self) -> str:
        return f"QuestionSet {self.name!r}: {len(self)} questions in {len(self.categories)} categories"

    @property
    def categories(self) -> list[str]:
        """The categories, sorted."""
        return sorted({question.category for question in self})

    @property
    def digest(self) -> str:
        """SHA-256 of everything that is asked, so that a run can name its data."""
        return sha256(repr((self.questions, self.template)).encode()).hexdigest()

    def select(self, indices: Iterable[int]) -> QuestionSet:
        """The questions at these indices, in this order."""
        return replace(self, questions=tuple(self.questions[index] for index in indices))

    def part(self, *splits: str) -> QuestionSet:
        """The questions of some parts."""
        return replace(self, questions=tuple(q for q in self if q.split in splits))

    def to_frame(self) -> pd.DataFrame:
        """One row per question."""
        rows = [(q.text, q.choices[q.answer], q.choices, q.category, q.split) for q in self]
        return pd.DataFrame(rows, columns=["question", "right", "choices", "category", "split"])

    def summary(self) -> str:
        """One sentence: how many questions, categories and parts."""
        parts = Counter(q.split for q in self if q.split)
        shown = f" ({', '.join(f'{n} to {split}' for split, n in parts.items())})" if parts else ""
        said = f"{self.name}: {len(self)} questions{shown} in {len(self.categories)} categories."
        reasons = Counter(row.reason for row in self.dropped)
        left_out = "; ".join(f"{n} rows: {reason}" for reason, n in reasons.most_common())
        return f"{said} Left out: {left_out}." if left_out else said
