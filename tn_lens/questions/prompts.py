"""Prompts: token ids, the ids of the labels, and the order of the choices (paper 2.2, appendix A.2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, overload

from jinja2 import TemplateError

from tn_lens.core.errors import BadInput
from tn_lens.core.options import Order
from tn_lens.core.seeds import generator
from tn_lens.core.sentences import plural
from tn_lens.models import Model, backend_of
from tn_lens.questions.formats import FIGURE_9, PromptTemplate
from tn_lens.questions.question import LETTERS, Question, QuestionSet
from tn_lens.questions.toy import LETTERED

TEMPLATE_DATE = "26 Jul 2024"
"""The date for chat templates that print today's, so that a prompt is the same tomorrow."""

PLAIN_ENDS = (("", " "), (" ", ""), ("\n", ""))
"""How plain text may end and a label begin: "Answer:" and " A" for most tokenizers; some join the colon and the space."""

TAIL = 24
"""Characters at the end of a prompt that may influence how a label after them is tokenized."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question with its choices in one order, ready for the model."""

    token_ids: tuple[int, ...] = field(repr=False)
    label_ids: tuple[tuple[int, ...], ...]
    """For each shown choice the ids whose probabilities are summed (upper and lower case; paper eq. 6-7)."""
    right: int
    """Position of the right choice among those shown."""
    question: str = "0"
    """Id of the question."""
    order: tuple[int, ...] = ()
    """Position shown -> index of the choice in the question."""
    category: str = ""
    text: str = field(default="", repr=False)
    """The rendered prompt."""
    start: int = field(default=0, repr=False)
    """Position of the first token of the question itself, after the instruction and examples."""

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
    """Prompts in order, grouped by question: the prompts of a question are neighbours.

    Raises:
        BadInput: a question occurs in two places, or twice in the same order of its choices.
    """

    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptSet:
        return PromptSet(self.prompts[index]) if isinstance(index, slice) else self.prompts[index]

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def of(cls, prompts: Prompt | Sequence[Prompt]) -> PromptSet:
        """One prompt or several as a set."""
        if isinstance(prompts, PromptSet):
            return prompts
        return cls((prompts,) if isinstance(prompts, Prompt) else tuple(prompts))

    @cached_property
    def groups(self) -> dict[str, range]:
        """Question id -> the rows of its prompts, in the order of the questions."""
        groups: dict[str, range] = {}
        orders: set[tuple[int, ...]] = set()
        for row, prompt in enumerate(self.prompts):
            # the rows of a question must be consecutive, or its mean over orders would miss some
            rows = groups.get(prompt.question)
            orders = set() if rows is None else orders
            if (rows is not None and rows.stop != row) or prompt.order in orders:
                raise BadInput(
                    f"question {prompt.question!r} occurs twice among the prompts: give every question an id of its own "
                    "(build_prompt(..., question='second')), and build its orders in one call"
                )
            groups[prompt.question] = range(row if rows is None else rows.start, row + 1)
            orders.add(prompt.order)
        return groups

    @cached_property
    def categories(self) -> dict[str, str]:
        """Question id -> category."""
        return {question: self.prompts[rows.start].category for question, rows in self.groups.items()}

    @property
    def n_orders(self) -> int:
        """Number of orders in which every question occurs; 0 for an empty set."""
        return min(map(len, self.groups.values()), default=0)

    @property
    def n_choices(self) -> int:
        """The largest number of choices shown in any prompt."""
        return max((prompt.n_choices for prompt in self.prompts), default=0)

    def only(self, questions: Iterable[str]) -> PromptSet:
        """The prompts of these questions, in the order of the set."""
        wanted = set(questions)
        return PromptSet(tuple(prompt for prompt in self.prompts if prompt.question in wanted))

    def chunks(self, size: int) -> tuple[PromptSet, ...]:
        """Cut into parts of at most `size` prompts (more only for a question with more orders); questions stay whole."""
        # by number of prompts and never by number of workers, so that chunks are the same for any number
        starts = [0]
        for rows in self.groups.values():
            if rows.stop - starts[-1] > size and rows.start > starts[-1]:
                starts.append(rows.start)
        ends = [*starts[1:], len(self)]
        return tuple(self[a:b] for a, b in zip(starts, ends, strict=True) if b > a)

    def to_plain(self) -> list[list[Any]]:
        """The form in stored results: without tokens and text."""
        return [[p.question, p.category, p.right, p.order, p.n_choices] for p in self.prompts]

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
            )
            for question, category, right, order, n_choices in rows
        ]
        return cls(tuple(prompts))


def stream_of(question: str) -> int:
    """A number for the random stream of a question, from its id alone."""
    # 32 bits are plenty: streams only have to differ between questions
    return int(sha256(question.encode(errors="surrogatepass")).hexdigest()[:8], 16)


def random_order(question: Question, seed: int) -> tuple[int, ...]:
    """The order of a question's choices that the seed draws, whatever other questions are asked."""
    return tuple(generator(seed, stream_of(question.id)).permutation(len(question.choices)).tolist())


def rotations(n: int) -> list[tuple[int, ...]]:
    """Every cyclic rotation of `n` choices: each choice stands at each position once."""
    return [tuple((start + shift) % n for shift in range(n)) for start in range(n)]


def build_prompts(
    model: Model,
    questions: QuestionSet,
    *,
    order: Order = "random",
    seed: int = 0,
    drop_long: bool = False,
) -> PromptSet:
    """Render and encode every question as a prompt for this model (paper 2.2, eq. 5; figure 9's template by default).

    Args:
        model: whose tokenizer and chat template are used; models without a chat template get plain text.
        questions: what to ask.
        order: `"random"` draws one order per question from the seed and the question's id, as the paper does; `"both"`
            asks each question with every choice at every letter, two prompts for two choices; `"given"` keeps the
            question's own order.
        seed: seed for the random order.
        drop_long: leave out prompts beyond the context window, with a warning, instead of raising.

    Returns:
        The prompts, question by question.

    Raises:
        BadInput: a label is not one token here, or prompts are longer than the context window.
    """
    encoder = PromptEncoder(model, questions.template)
    requests: list[tuple[Question, tuple[int, ...]]] = []
    for question in questions:
        every = rotations(len(question.choices))
        match order:
            case "both":
                # without letters there is no position to balance
                chosen = every if questions.template.labels == "letters" else every[:1]
            case "random":
                chosen = [random_order(question, seed)]
            case "given":
                chosen = every[:1]
            case _:
                raise BadInput(f"expected order 'random', 'both' or 'given', got {order!r}")
        requests += [(question, each) for each in chosen]
    return _fit_context(encoder.encode(requests), backend_of(model).n_ctx, drop_long)


def build_prompt(
    model: Model, text: str, *, right: str, wrong: str | Sequence[str], question: str | None = None
) -> Prompt:
    """Encode a free prompt: `build_prompt(model, "The capital of France is", right=" Paris", wrong=" Rome")`.

    Args:
        model: whose tokenizer is used; its BOS token is added as the tokenizer does, without a chat template.
        text: the prompt.
        right: the true continuation, with its leading space.
        wrong: the false continuation, or several.
        question: id of the question, a digest of text and continuations by default.

    Raises:
        BadInput: a continuation is not one token, or two share one.
    """
    tokenizer = _tokenizer(model)
    answers = [right, *([wrong] if isinstance(wrong, str) else wrong)]
    (ids,) = _ids(tokenizer, [text], special=True)
    labels = [_label_id(tokenizer, text, ids, answer, special=True) for answer in answers]
    if len(set(labels)) < len(labels):
        raise BadInput(f"two of the answers {answers} are the same token ({labels}); they must differ")
    prompt = Prompt(
        token_ids=tuple(ids),
        label_ids=tuple((i,) for i in labels),
        right=0,
        order=tuple(range(len(labels))),
        text=text,
        question=Question(text=text, choices=tuple(answers)).id if question is None else question,
    )
    return _fit_context([prompt], backend_of(model).n_ctx, drop_long=False)[0]


class PromptEncoder:
    """Renders and encodes questions in one template for one model."""

    def __init__(self, model: Model, template: PromptTemplate) -> None:
        self.tokenizer = _tokenizer(model)
        own_words = backend_of(model).name == "toy" and template == FIGURE_9
        self.template = LETTERED if own_words else template  # the embedded model knows no other words
        self.chat = template.chat and getattr(self.tokenizer, "chat_template", None) is not None
        self.end, self.prefix = ("", "") if self.chat else PLAIN_ENDS[0]
        """Text at the end of a prompt, and text before a label."""
        self.heads: dict[str, list[int]] = {"": []}
        """Tokens of the text before a question, by that text."""
        if (
            self.chat
            and "strftime_now" in str(self.tokenizer.chat_template)
            and "date_string" not in str(self.tokenizer.chat_template)
        ):
            warnings.warn(
                "this model's chat template prints today's date and offers no way to pin it: prompts differ from day to day",
                stacklevel=3,
            )

    def render(self, question: Question, order: tuple[int, ...]) -> str:
        """Render the text of a prompt."""
        shown = self.template.separator.join(
            self.template.choice.format(label=LETTERS[position], choice=question.choices[choice])
            for position, choice in enumerate(order)
        )
        letters = list(LETTERS[: len(order)])
        labels = f"{', '.join(letters[:-1])} and {letters[-1]}"
        user = self.template.user.format(question=question.text, choices=shown, labels=labels, context=question.context)
        if not self.chat:
            system = f"{self.template.system}\n\n" if self.template.system else ""
            return system + user + self.template.cue + self.end
        system = [{"role": "system", "content": self.template.system}] if self.template.system else []
        try:
            return self._apply([*system, {"role": "user", "content": user}])
        except TemplateError:  # templates without a system turn refuse it
            pass
        try:
            return self._apply([{"role": "user", "content": f"{self.template.system}\n\n{user}" if system else user}])
        except TemplateError as error:
            raise BadInput(f"the model's chat template cannot be rendered: {error}") from error

    def _apply(self, turns: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, date_string=TEMPLATE_DATE
        )

    def encode(self, requests: Sequence[tuple[Question, tuple[int, ...]]]) -> list[Prompt]:
        """Encode questions, each with an order of its choices, and look up the ids of their labels."""
        if requests and not self.chat:
            self._choose_end(*requests[0])
        texts = [self.render(question, order) for question, order in requests]
        special = not self.chat  # a chat template writes its own BOS token
        encoded = _ids(self.tokenizer, texts, special=special)
        known: dict[tuple[str, str], int] = {}  # a label's id depends on the end of the prompt alone
        prompts = []
        for (question, order), text, ids in zip(requests, texts, encoded, strict=True):
            label_ids = []
            for position, choice in enumerate(order):
                label = LETTERS[position] if self.template.labels == "letters" else question.choices[choice]
                variants = []
                for variant in (label, label.lower()):
                    key = (text[-TAIL:], variant)
                    if key not in known:
                        known[key] = _label_id(self.tokenizer, text, ids, self.prefix + variant, special=special)
                    variants.append(known[key])
                label_ids.append(tuple(dict.fromkeys(variants)))
            prompts.append(
                Prompt(
                    token_ids=tuple(ids),
                    label_ids=tuple(label_ids),
                    right=order.index(question.answer),
                    question=question.id,
                    order=order,
                    category=question.category,
                    text=text,
                    start=self._start(question, text, ids, special=special),
                )
            )
        self._check(prompts)
        return prompts

    def _start(self, question: Question, text: str, ids: list[int], *, special: bool) -> int:
        """Number of tokens before the question; a token that reaches into the question belongs to it."""
        preamble, _, _ = self.template.user.partition("{question}")
        opening = preamble[-TAIL:].rpartition("}")[2] + question.text
        place = text.find(opening, text.find(question.context))
        head = text[: place + len(opening) - len(question.text)] if place >= 0 else ""
        if head not in self.heads:
            (self.heads[head],) = _ids(self.tokenizer, [head], special=special)
        before = self.heads[head]
        # the first token that differs is one that merges the end of the head with the question
        differing = (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b)
        return next(differing, min(len(before), len(ids)))

    def _choose_end(self, question: Question, order: tuple[int, ...]) -> None:
        """Choose the first of `PLAIN_ENDS` after which every label is a single token."""
        labels = LETTERS[: len(order)] if self.template.labels == "letters" else question.choices
        for self.end, self.prefix in PLAIN_ENDS:
            text = self.render(question, order)
            (ids,) = _ids(self.tokenizer, [text], special=True)
            try:
                for variant in (variant for label in labels for variant in (label, label.lower())):
                    _label_id(self.tokenizer, text, ids, self.prefix + variant, special=True)
            except BadInput:
                continue
            return
        self.end, self.prefix = PLAIN_ENDS[0]

    def _check(self, prompts: list[Prompt]) -> None:
        for prompt in prompts:
            every = [i for ids in prompt.label_ids for i in ids]
            if len(set(every)) < len(every):
                raise BadInput(f"two choices share a label token here (label ids {prompt.label_ids}); they must differ")
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            return
        if any(unknown in ids for prompt in prompts for ids in prompt.label_ids):
            raise BadInput(
                "this model's tokenizer encodes the answer labels as its unknown token; use another tokenizer or other labels"
            )
        n_unknown = sum(unknown in prompt.token_ids for prompt in prompts)
        if not n_unknown:
            return
        text = next(prompt.text for prompt in prompts if unknown in prompt.token_ids)
        word = next((w for w in text.split() if unknown in _ids(self.tokenizer, [w], special=False)[0]), "")
        if n_unknown == len(prompts):
            raise BadInput(
                f"this model's tokenizer cannot read the questions: all {n_unknown} prompts contain words that it does not "
                f"know, like {word!r:.40} (the toy model reads only the words of its own world)"
            )
        warnings.warn(
            f"{n_unknown} of {len(prompts)} prompts contain words that the tokenizer does not know, like {word!r:.40}",
            stacklevel=4,
        )


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None:
        raise BadInput("this model has no tokenizer; load it with load_model(..., tokenizer=...)")
    return model.tokenizer


def _ids(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    try:
        return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    except (TypeError, UnicodeEncodeError) as error:  # tokenizers cannot encode lone surrogates
        broken = next(
            (text for text in texts if not text.isascii() and text != text.encode(errors="ignore").decode()), None
        )
        if broken is None:
            raise
        raise BadInput(f"a question holds half of a character (a lone surrogate): {ascii(broken)[-120:]}") from error


def _label_id(tokenizer: Any, text: str, ids: list[int], label: str, *, special: bool) -> int:
    """The single token id that `text + label` adds to `text`.

    Raises:
        BadInput: the label adds several tokens, or changes the tokens before it; the ids are shown.
    """
    (longer,) = _ids(tokenizer, [text + label], special=special)
    added = longer[len(ids) :]
    if longer[: len(ids)] != ids:
        raise BadInput(
            f"the label {label!r} cannot be found in context: the prompt's ids end with {ids[-4:]}, and with the label "
            f"appended the text has the ids {longer[max(0, len(ids) - 4) :]} there; word the prompt so that it ends in a whole token"
        )
    if len(added) != 1:
        raise BadInput(f"the label {label!r} must be one token after this prompt, and is {len(added)} (ids {added})")
    return added[0]


def _fit_context(prompts: Sequence[Prompt], n_ctx: int, drop_long: bool) -> PromptSet:
    """Raise, or leave out, questions with prompts longer than the context window."""
    long = {p.question for p in prompts if len(p.token_ids) > n_ctx}
    if not long:
        return PromptSet(tuple(prompts))
    longest = max(len(p.token_ids) for p in prompts)
    message = f"{len(long)} {plural('question', len(long))} {'needs' if len(long) == 1 else 'need'} more than the context window of {n_ctx} tokens (the longest prompt has {longest})"
    kept = [p for p in prompts if p.question not in long]
    if not drop_long or not kept:
        raise BadInput(f"{message}; shorten them, or leave them out with drop_long=True (--drop-long)")
    warnings.warn(f"{message}; they are left out", stacklevel=3)
    return PromptSet(tuple(kept))
