"""Questions with their choices, and sets of questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from heapq import nsmallest
from itertools import count
from typing import Any, get_args

import numpy as np
import pandas as pd

from tn_lens.core.errors import BadInput
from tn_lens.core.sentences import say
from tn_lens.questions.formats import FIGURE_9, FORMATS, VERDICTS, Kind, PromptTemplate, fill, statement_about
from tn_lens.questions.prompt_set import stream_of


def plain(text: str) -> str:
    """A text without case and extra spaces."""
    return " ".join(text.split()).casefold()


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with two or more choices, one of which is right (paper 2.2: q, t and f)."""

    text: str
    choices: tuple[str, ...]
    answer: int = 0
    """Index of the right choice."""
    category: str = ""
    split: str = ""
    """The part of its set that the question belongs to ("tune", "find", "report"); empty if the set has no parts."""
    context: str = ""
    """The text that a template with `{context}` puts before the question, for example solved examples."""
    completion: str = field(default="", repr=False)
    """The text that the choices continue in formats of kind "completion" that end with it; by default `text`."""
    statement: str = field(default="", repr=False)
    """The statement about a choice in formats of kind "statement", with the placeholder `{choice}`; by default made from `text`."""
    correct: tuple[str, ...] = field(default=(), repr=False)
    """All correct answers, for the metrics MC1 and MC2 of TruthfulQA; they include the right choice."""
    incorrect: tuple[str, ...] = field(default=(), repr=False)
    """All incorrect answers, for the same metrics."""
    id: str = field(default="", repr=False)  # not in the repr, from which `QuestionSet.digest` is computed
    """Identifier, unique within a set; by default a digest of the text and the choices."""

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", self._default_id)  # the dataclass is frozen

    @property
    def plain_text(self) -> str:
        """The text without case and extra spaces: questions with the same one are the same question."""
        return plain(self.text)

    @property
    def is_statement(self) -> bool:
        """Whether the text is a statement, which is answered with True or False."""
        return sorted(choice.casefold() for choice in self.choices) == sorted(map(str.casefold, VERDICTS))

    def asked_as(self, kind: Kind, choice: str = "") -> str:
        """The wording of the question in a kind of format.

        Args:
            kind: kind of the format.
            choice: the choice that a statement is about. A question that is a statement already keeps its text.
        """
        if kind == "statement" and not self.is_statement:
            return fill(self.statement, choice=choice) if self.statement else statement_about(self.text, choice)
        return (self.completion if kind == "completion" else "") or self.text

    @property
    def _default_id(self) -> str:
        return sha256(repr((self.text, self.choices)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Dropped:
    """A row of a file that was left out, and the reason."""

    row: int
    """Number of the row, counted from 1 and without the header."""
    text: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class QuestionSet(Sequence[Question]):
    """Questions in a fixed order, with their prompt template.

    The ids of the questions are unique: the second question with the same id gets the suffix "-2", the third "-3".
    """

    name: str
    questions: tuple[Question, ...]
    template: PromptTemplate = FIGURE_9
    formats: tuple[Kind, ...] = get_args(Kind)
    """The kinds of formats in which the questions can be asked."""
    examples: tuple[Question, ...] = ()
    """Questions that are shown with their answers before every question."""
    fixed_order: bool = False
    """Whether the standard evaluation keeps the choices in the given order (MMLU) instead of permuting them."""
    source: str | None = None
    """Path of the user's own file, as given; None for registered sets and for sets made in Python."""
    dropped: tuple[Dropped, ...] = ()
    """Rows that were left out when the set was loaded."""

    def __post_init__(self) -> None:
        # a file may repeat a question, and users may repeat an id
        taken = {question.id for question in self.questions}
        suffixes: dict[str, Iterator[int]] = {}
        questions = []
        for question in self.questions:
            if question.id in suffixes:
                # "a-2" may already be the id of another question, which keeps it
                candidates = (f"{question.id}-{n}" for n in suffixes[question.id])
                question = replace(question, id=next(new for new in candidates if new not in taken))
            suffixes.setdefault(question.id, count(2))
            questions.append(question)
        object.__setattr__(self, "questions", tuple(questions))

    def __getitem__(self, index: int | slice) -> Any:  # a question, or the set of a slice
        return replace(self, questions=self.questions[index]) if isinstance(index, slice) else self.questions[index]

    def __len__(self) -> int:
        return len(self.questions)

    def __repr__(self) -> str:
        return f"QuestionSet: {self.summary()}"

    @property
    def categories(self) -> list[str]:
        """The categories, sorted."""
        return sorted({question.category for question in self})

    @property
    def digest(self) -> str:
        """SHA-256 of the questions, their wordings, their user-defined ids and the template, by which a run identifies its data."""
        # default ids are computed from text and choices, so they add no information
        own_ids = tuple(q.id for q in self if not q.id.startswith(q._default_id))
        # as sets without other wordings had this digest before there were any, those of other sets are appended
        asked = (*self, *self.examples)
        wordings = tuple((q.id, q.completion, q.statement) for q in asked if q.completion or q.statement)
        content = (self.questions, self.template, *(part for part in (own_ids, self.examples, wordings) if part))
        return sha256(repr(content).encode()).hexdigest()

    def select(self, indices: Iterable[int]) -> QuestionSet:
        """The questions at these indices, in this order."""
        return replace(self, questions=tuple(self.questions[index] for index in indices))

    def sample(self, n: int | None, random: np.random.Generator) -> QuestionSet:
        """At most `n` questions, sampled without replacement, in the order of the set; all questions if `n` is None."""
        if n is None or n >= len(self):
            return self
        return self.select(sorted(random.choice(len(self), n, replace=False).tolist()))

    def part(self, *splits: str) -> QuestionSet:
        """The questions of these parts."""
        return replace(self, questions=tuple(q for q in self if q.split in splits))

    def only(self, ids: Iterable[str]) -> QuestionSet:
        """The questions with these ids, in the order of the set.

        Raises:
            BadInput: the set has no question with one of the ids.
        """
        wanted = set(ids)
        if unknown := sorted(wanted - {q.id for q in self}):
            raise BadInput(
                f"{self.name} has no question with the id {unknown[0]!r}; use ids of the questions in this set"
            )
        return replace(self, questions=tuple(q for q in self if q.id in wanted))

    def with_format(
        self,
        name: str | None = None,
        *,
        n_shots: int = 0,
        symbols: Sequence[str] = (),
        prefill: str = "",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> QuestionSet:
        """The same questions in another prompt format.

        Args:
            name: name of a registered format. The set's own template is kept by default, and for the name of its kind
                ("letters" for MMLU keeps figure 8).
            n_shots: number of questions that are removed from the set, and shown with their answers before every question. They
                are drawn by their ids, and the right answers of the examples take turns in their positions.
            symbols: symbols of the choices instead of A, B, ..., for example `"12"`.
            prefill: the beginning of the answer, which the model continues.
            template_kwargs: variables of the chat template, for example `{"enable_thinking": True}`.

        Raises:
            BadInput: the format is unknown, the set cannot be asked in it, or it has too few questions for the examples.
        """
        template = self.template if name in (None, self.template.kind) else FORMATS[name]
        if template.kind not in self.formats:
            raise BadInput(
                f"{self.name} can only be asked in the format {' or '.join(map(repr, self.formats))}; got {name!r}"
            )
        if symbols and len({symbol.casefold() for symbol in symbols}) < max(len(symbols), 2):
            raise BadInput(f"expected at least two different symbols; got {', '.join(map(repr, symbols))}")
        if not isinstance(n_shots, int) or not 0 <= n_shots < max(len(self), 1):
            raise BadInput(
                f"n_shots must be an integer from 0 to {len(self) - 1}, since {self.name} has {len(self)} questions; got {n_shots!r}"
            )
        template = replace(
            template,
            symbols=tuple(symbols) or template.symbols,
            prefill=prefill or template.prefill,
            template_kwargs={**template.template_kwargs, **(template_kwargs or {})},
        )
        examples = tuple(nsmallest(n_shots, self, key=lambda question: stream_of(question.id)))
        texts = {question.plain_text for question in examples}  # equal questions are not asked either
        kept = tuple(question for question in self if question.plain_text not in texts) if texts else self.questions
        return replace(self, template=template, examples=examples, questions=kept)

    def to_frame(self) -> pd.DataFrame:
        """One row per question."""
        rows = [(q.id, q.text, q.choices[q.answer], q.choices, q.category, q.split) for q in self]
        return pd.DataFrame(rows, columns=["id", "question", "right", "choices", "category", "split"])

    def summary(self) -> str:
        """The number of questions, parts and categories, and the rows that were left out."""
        parts = Counter(q.split for q in self if q.split)
        return say("questions.summary", self, parts, Counter(row.reason for row in self.dropped).most_common())
