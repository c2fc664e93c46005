"""Prompts and sets of prompts, grouped by question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.questions.formats import VERDICTS


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """An encoded prompt: one question with its choices in one order."""

    token_ids: tuple[int, ...] = field(repr=False)
    label_ids: tuple[tuple[int, ...], ...]
    """For each shown choice, the token ids whose probabilities are summed (upper and lower case; paper eq. 6-7)."""
    right: int
    """Position of the right choice among those shown."""
    question: str = "0"
    """Id of the question."""
    order: tuple[int, ...] = ()
    """Index of the choice in the question, by the position at which it is shown."""
    category: str = ""
    text: str = field(default="", repr=False)
    """The rendered prompt."""
    start: int = field(default=0, repr=False)
    """Position of the first token of the question itself, after the instruction and examples."""
    blank_ids: tuple[int, ...] = field(default=(), repr=False)
    """Token ids of the prompt without its question and choices; empty if the prompt has no template around them."""
    labels: tuple[str, ...] = ()
    """The labels that the positions have in every prompt, such as A and B; empty if the answers are the choices themselves."""
    group: str = field(default="", repr=False)
    """Group of questions with the same text, see `tn_lens.questions.repeats`; empty if no other question has this text."""

    @property
    def n_choices(self) -> int:
        """Number of choices shown."""
        return len(self.label_ids)

    @property
    def wrong_ids(self) -> tuple[int, ...]:
        """The label ids of all wrong choices together."""
        return tuple(i for shown, ids in enumerate(self.label_ids) if shown != self.right for i in ids)


@dataclass(frozen=True, eq=False)
class PromptSet(Sequence[Prompt]):
    """An ordered set of prompts, in which the prompts of each question are consecutive.

    `groups` raises `BadInput` if the prompts of a question are not consecutive, or if an order of its choices is repeated.
    """

    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))

    def __getitem__(self, index: int | slice) -> Any:  # a prompt, or the set of a slice
        return PromptSet(self.prompts[index]) if isinstance(index, slice) else self.prompts[index]

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @classmethod
    def of(cls, prompts: Prompt | Sequence[Prompt]) -> PromptSet:
        """Convert one or more prompts to a set."""
        if isinstance(prompts, PromptSet):
            return prompts
        return cls((prompts,) if isinstance(prompts, Prompt) else tuple(prompts))

    @cached_property
    def groups(self) -> dict[str, range]:
        """Rows of the prompts of each question by question id, in the order of the questions."""
        groups: dict[str, range] = {}
        orders: set[tuple[int, ...]] = set()
        for row, prompt in enumerate(self.prompts):
            # the rows of a question must be consecutive, or its mean over orders would miss some
            rows = groups.get(prompt.question)
            orders = set() if rows is None else orders
            if (rows is not None and rows.stop != row) or prompt.order in orders:
                raise BadInput(
                    f"question {prompt.question!r} occurs twice among the prompts: use a different id for every question "
                    "(build_prompt(..., question='second')), and build all orders of a question in one call"
                )
            groups[prompt.question] = range(row if rows is None else rows.start, row + 1)
            orders.add(prompt.order)
        return groups

    @cached_property
    def categories(self) -> dict[str, str]:
        """Category of each question by question id."""
        return {question: self.prompts[rows.start].category for question, rows in self.groups.items()}

    @cached_property
    def equal(self) -> dict[str, str]:
        """Group of each question by question id, without questions that have no equal."""
        groups = {question: self.prompts[rows.start].group for question, rows in self.groups.items()}
        return {question: group for question, group in groups.items() if group}

    @property
    def n_orders(self) -> int:
        """The smallest number of orders of any question; 0 for an empty set."""
        return min(map(len, self.groups.values()), default=0)

    @property
    def n_choices(self) -> int:
        """The largest number of choices shown in any prompt."""
        return max((prompt.n_choices for prompt in self.prompts), default=0)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The labels of the positions, such as A and B; empty if the answers are the choices themselves."""
        return max((prompt.labels for prompt in self.prompts), key=len, default=())

    @property
    def first_label(self) -> str:
        """The label of the first position; empty if the answers are the choices themselves."""
        return next(iter(self.labels), "")

    @property
    def are_statements(self) -> bool:
        """Whether the prompts are statements, which are answered with True or False."""
        return tuple(map(str.casefold, self.labels)) == tuple(map(str.casefold, VERDICTS))

    def only(self, questions: Iterable[str]) -> PromptSet:
        """The prompts of these questions, in the order of the set."""
        wanted = set(questions)
        return PromptSet(tuple(prompt for prompt in self.prompts if prompt.question in wanted))

    def sample(self, n: int, seed: int) -> PromptSet:
        """The prompts of at most `n` questions, sampled without replacement, in the order of the set."""
        questions = list(self.groups)
        return self.only(generator(seed).permutation(questions)[:n].tolist())

    def chunks(self, size: int) -> tuple[PromptSet, ...]:
        """Split into parts of at most `size` prompts, without splitting a question; a question with more is one part."""
        # split by number of prompts only, so that chunks do not depend on the number of workers
        starts = [0]
        for rows in self.groups.values():
            if rows.stop - starts[-1] > size and rows.start > starts[-1]:
                starts.append(rows.start)
        ends = [*starts[1:], len(self)]
        return tuple(self[a:b] for a, b in zip(starts, ends, strict=True) if b > a)

    def to_plain(self) -> list[list[Any]]:
        """The representation in stored results, without tokens and text."""
        return [[p.question, p.category, p.right, p.order, p.n_choices, p.labels, p.group] for p in self]

    @classmethod
    def from_plain(cls, rows: Iterable[Sequence[Any]]) -> PromptSet:
        """The inverse of `to_plain`; the prompts have no tokens."""
        prompts = [
            Prompt(
                token_ids=(),
                label_ids=((),) * n_choices,
                right=right,
                question=question,
                order=tuple(order),
                category=category,
                labels=tuple(labels),
                group=group,
            )
            for question, category, right, order, n_choices, labels, group in rows
        ]
        return cls(tuple(prompts))


def stream_of(question: str) -> int:
    """The number of a question's random stream, computed from its id."""
    # 32 bits are enough: streams only have to differ between questions
    return int(sha256(question.encode(errors="surrogatepass")).hexdigest()[:8], 16)
