"""Prompts: rendered text, token ids, the ids of the labels, and the order of the choices (paper 2.2, appendix A.2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from tn_lens.core.errors import BadInput
from tn_lens.core.options import Order
from tn_lens.core.seeds import generator
from tn_lens.core.sentences import plural
from tn_lens.models import Model, backend_of
from tn_lens.questions.chat import ChatTemplate, Turn, check_thinking, open_thoughts
from tn_lens.questions.formats import FIGURE_9, VERDICTS, PromptTemplate, fill
from tn_lens.questions.labels import TAIL, Ending, PromptTokenizer
from tn_lens.questions.prompt_set import Prompt, PromptSet, stream_of
from tn_lens.questions.question import Question, QuestionSet
from tn_lens.questions.repeats import groups_of
from tn_lens.questions.toy import LETTERED


def random_order(question: Question, seed: int, n: int | None = None) -> tuple[int, ...]:
    """A random order of a question's `n` choices, which depends only on the seed and the question's id."""
    n = len(question.choices) if n is None else n
    return tuple(generator(seed, stream_of(question.id)).permutation(n).tolist())


def rotations(n: int) -> list[tuple[int, ...]]:
    """All cyclic rotations of `n` choices. Each choice is at each position once."""
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
        model: model with the tokenizer and chat template to use; without a chat template, prompts are plain text.
        questions: questions to ask, in the format of their template; see `QuestionSet.with_format`.
        order: `"random"` draws one order per question from the seed and the question's id, as the paper does; `"both"`
            asks each question in every rotation of its choices, which gives two prompts for two choices; `"given"`
            keeps the question's own order. In the format "statement", the two orders of a question are a true and a false
            statement. Completions show no choices and have one order.
        seed: seed for the random order.
        drop_long: leave out questions with prompts longer than the context window, with a warning instead of an error.

    Returns:
        The prompts, grouped by question.

    Raises:
        BadInput: the tokens of a prompt do not distinguish its answers, the chat template leaves out a part of it, or prompts
            are longer than the context window.
    """
    encoder = PromptEncoder(model, questions)
    requests = [
        (question, each) for question in questions for each in _orders(question, questions.template, order, seed)
    ]
    return _fit_context(encoder.encode(requests), backend_of(model).n_ctx, drop_long)


def _is_judged(question: Question, template: PromptTemplate) -> bool:
    """Whether a question is asked as a statement about one of its choices, and not with its own choices."""
    return template.kind == "statement" and not question.is_statement


def _orders(question: Question, template: PromptTemplate, order: Order, seed: int) -> list[tuple[int, ...]]:
    # a statement about a choice has two orders of the verdicts: true and false statements
    is_about_choice = _is_judged(question, template)
    n = 2 if is_about_choice else len(question.choices)
    match order:
        case "both" | "random" | "given" if template.kind != "letters" and not is_about_choice:
            # answers that name the choices have no position to balance; True is the first label of every statement
            return [
                tuple(
                    sorted(range(n), key=lambda i: question.is_statement and question.choices[i].casefold() == "false")
                )
            ]
        case "both":
            return rotations(n)
        case "random":
            return [random_order(question, seed, n)]
        case "given":
            # the statement about the first choice
            return [(1, 0) if is_about_choice and question.answer else rotations(n)[0]]
        case _:
            raise BadInput(f"expected order 'random', 'both' or 'given', got {order!r}")


def build_prompt(
    model: Model, text: str, *, right: str, wrong: str | Sequence[str], question: str | None = None
) -> Prompt:
    """Encode a free-form prompt: `build_prompt(model, "The capital of France is", right=" Paris", wrong=" Rome")`.

    The beginning that all continuations share is appended to the prompt, and the first token in which they differ is the label.

    Args:
        model: model with the tokenizer to use, which adds its special tokens; the chat template is not applied.
        text: the prompt.
        right: the true continuation, with its leading space.
        wrong: one or more false continuations.
        question: id of the question; a digest of text and continuations by default.

    Raises:
        BadInput: two continuations are equal, or begin with the same token.
    """
    tokenizer = PromptTokenizer(model, adds_special=True)
    answers = (right, *([wrong] if isinstance(wrong, str) else wrong))
    if len(set(answers)) < len(answers):
        raise BadInput(f"two of the answers {list(answers)} are the same; they must differ")
    (ids,) = tokenizer.ids([text])
    (ending,) = tokenizer.find_endings([(text, ids, answers)], has_lower=False, is_fixed=False)
    prompt = Prompt(
        token_ids=(*ids[: len(ids) - ending.n_replaced], *ending.shared),
        label_ids=ending.label_ids,
        right=0,
        order=tuple(range(len(answers))),
        text=text,
        question=Question(text=text, choices=answers).id if question is None else question,
    )
    _check_ids(model, [prompt])
    return _fit_context([prompt], backend_of(model).n_ctx, drop_long=False)[0]


class UserTurn(NamedTuple):
    """The user turn of a question."""

    text: str
    asked: str
    """The question, or the statement about one of its choices."""
    labels: tuple[str, ...]
    """The label at each position."""


class Rendered(NamedTuple):
    """The text of a prompt."""

    text: str
    user: UserTurn
    answers: tuple[str, ...]
    """The text that follows for each answer, by the position at which it is shown."""


class PromptEncoder:
    """Renders and encodes questions of one set for one model."""

    def __init__(self, model: Model, questions: QuestionSet) -> None:
        self.model, template = model, questions.template
        own_words = backend_of(model).name == "toy" and template == FIGURE_9
        self.template = LETTERED if own_words else template  # figure 9 has words that the embedded model lacks
        self.is_chat = template.chat and getattr(model.tokenizer, "chat_template", None) is not None
        # a chat template writes its own BOS token
        self.tokenizer = PromptTokenizer(model, adds_special=not self.is_chat)
        self.chat = ChatTemplate(self.tokenizer.tokenizer, template.template_kwargs) if self.is_chat else None
        self.examples: list[tuple[str, str]] = []
        """User turns and answers of the solved examples."""
        for number, example in enumerate(questions.examples):
            self._check_text(example)
            orders = _orders(example, self.template, "both", 0)
            order = orders[number % len(orders)]
            user = self._user(example, order)
            self.examples.append((user.text, user.labels[order.index(self._right(example))]))
        self.groups = {q.id: group for q, group in zip(questions, groups_of(questions), strict=True)}
        """Groups of questions with the same text, by the id of the question."""
        self.space = " "
        """Text between the end of a prompt in plain text and its answer."""
        self.lead: str | None = None
        """Text that the chat template writes between the prompt and the answer."""
        self.heads: dict[str, list[int]] = {"": []}
        """Token ids of the text before a question, by this text."""
        self.blanks: dict[tuple[str, ...], tuple[int, ...]] = {}
        """Token ids of prompts without question and choices, by the labels of the choices."""

    def render(self, question: Question, order: tuple[int, ...], *, is_blank: bool = False) -> Rendered:
        """Render the text of a prompt, optionally without question and choices, and of its answers."""
        user = self._user(question, order, is_blank=is_blank)
        if self.chat is None:
            text = self._plain(user.text)
        else:
            turns = self._turns(user.text)
            text = self.chat.render(turns)
            if self.lead is None:
                self.lead = self._find_lead(self.chat, turns, text)
            # white space before an answer is part of the answer, since tokenizers merge the two
            text += self.lead.rstrip() if not self.template.prefill else self.lead + self.template.prefill
            check_thinking(text)
            if not self.template.prefill:
                space = self.lead[len(self.lead.rstrip()) :]
                return Rendered(text, user, tuple(space + label for label in user.labels))
        return Rendered(text, user, tuple(self._after(text, label) for label in user.labels))

    def _choose_space(self, question: Question, order: tuple[int, ...]) -> None:
        """Choose a line break instead of a space where only it makes the lower-case labels single tokens."""
        for self.space in (" ", "\n"):
            if self._encode([self.render(question, order)])[0][1].has_lower:
                return
        self.space = " "

    def _encode(self, rendered: Sequence[Rendered]) -> list[tuple[list[int], Ending]]:
        """The token ids of prompts, and their endings."""
        encoded = self.tokenizer.ids([each.text for each in rendered])
        endings = self.tokenizer.find_endings(
            [(each.text, ids, each.answers) for each, ids in zip(rendered, encoded, strict=True)],
            has_lower=self.template.kind != "completion",
            is_fixed=self.is_chat and not self.template.prefill,
        )
        return list(zip(encoded, endings, strict=True))

    def _find_lead(self, chat: ChatTemplate, turns: list[Turn], text: str) -> str:
        try:
            return chat.lead(turns, text)
        except BadInput:
            # a prefill determines how the answer begins, for example after a block for thinking that only prompts have
            if self.template.prefill or open_thoughts(text):
                return ""
            raise

    def encode(self, requests: Sequence[tuple[Question, tuple[int, ...]]]) -> list[Prompt]:
        """Encode questions, each with an order of its choices, and look up the ids of their labels."""
        for question in {question.id: question for question, _ in requests}.values():
            self._check_text(question)
        if requests and not self.is_chat:
            self._choose_space(*requests[0])
        rendered = [self.render(question, order) for question, order in requests]
        prompts = []
        for (question, order), each, (ids, ending) in zip(requests, rendered, self._encode(rendered), strict=True):
            prompts.append(
                Prompt(
                    token_ids=(*ids[: len(ids) - ending.n_replaced], *ending.shared),
                    label_ids=ending.label_ids,
                    right=order.index(self._right(question)),
                    question=question.id,
                    order=order,
                    category=question.category,
                    text=each.text + self._decode(ending),
                    start=self._start(question, each, ids),
                    blank_ids=self._blank(question, order, each.user.labels),
                    labels=() if self.template.kind == "completion" else each.user.labels,
                    group=self.groups[question.id],
                )
            )
        _check_ids(self.model, prompts)
        self._check_unknown(prompts)
        return prompts

    def _right(self, question: Question) -> int:
        """The entry of an order that is the right answer."""
        # the orders of statements about a choice consist of the right and the wrong verdict
        return 0 if _is_judged(question, self.template) else question.answer

    def _asked(self, question: Question, order: tuple[int, ...]) -> str:
        """The text of the question, or of the statement about one of its choices."""
        if not _is_judged(question, self.template):
            return question.asked_as(self.template.kind) if self.template.ends_with_question else question.text
        # the right verdict is True if the first of the order is 0
        wrong = [choice for index, choice in enumerate(question.choices) if index != question.answer]
        choice = wrong[stream_of(question.id) % len(wrong)] if order[0] else question.choices[question.answer]
        return question.asked_as("statement", choice)

    def _blank(self, question: Question, order: tuple[int, ...], labels: tuple[str, ...]) -> tuple[int, ...]:
        """Token ids of a prompt without question and choices; empty for completions, which consist of the question."""
        if labels not in self.blanks and self.template.kind != "completion":
            try:
                ((ids, ending),) = self._encode([self.render(question, order, is_blank=True)])
                self.blanks[labels] = (*ids[: len(ids) - ending.n_replaced], *ending.shared)
            except BadInput:  # only one baseline needs them, and names prompts that have none
                self.blanks[labels] = ()
        return self.blanks.get(labels, ())

    def _user(self, question: Question, order: tuple[int, ...], *, is_blank: bool = False) -> UserTurn:
        """The user turn of a question."""
        template = self.template
        if template.kind == "letters":
            if len(order) > len(template.symbols):
                raise BadInput(
                    f"the question {question.text!r:.60} has {len(order)} choices, but the format has "
                    f"{len(template.symbols)} symbols; give more symbols, or leave out choices"
                )
            labels = template.symbols[: len(order)]
        elif _is_judged(question, template):
            labels = VERDICTS
        else:
            labels = tuple(question.choices[choice] for choice in order)
        lines = [
            fill(template.choice, label=label, choice="" if is_blank else question.choices[choice])
            for label, choice in zip(labels, order, strict=True)
        ]
        asked = "" if is_blank else self._asked(question, order)
        text = fill(
            template.user,
            question=asked,
            choices=template.separator.join(lines),
            labels=f"{', '.join(labels[:-1])} and {labels[-1]}",
            context="" if is_blank else question.context,
        )
        return UserTurn(text, asked, labels)

    def _turns(self, user: str) -> list[Turn]:
        turns: list[Turn] = [("system", self.template.system)] if self.template.system else []
        for example, label in self.examples:
            prefill = self.template.prefill
            turns += [("user", example), ("assistant", prefill + self._after(prefill, label) if prefill else label)]
        return [*turns, ("user", user)]

    def _plain(self, user: str) -> str:
        template = self.template
        end = template.cue + (self._after(template.cue, template.prefill) if template.prefill else "")
        solved = [example + end + self._after(example + end, label) for example, label in self.examples]
        system = f"{template.system}\n\n" if template.system else ""
        return system + template.shot_separator.join([*solved, user + end])

    def _start(self, question: Question, rendered: Rendered, ids: list[int]) -> int:
        """Number of tokens before the question. A token that overlaps the question counts as part of it."""
        preamble, _, _ = self.template.user.partition("{question}")
        asked = rendered.user.asked
        opening = preamble[-TAIL:].rpartition("}")[2] + asked
        # within the user turn, and there after the context, since examples may repeat the question
        place = rendered.text.rfind(rendered.user.text.strip())
        if question.context and "{context}" in preamble:
            place = rendered.text.find(question.context, max(place, 0)) + len(question.context)
        place = rendered.text.find(opening, max(place, 0))
        head = rendered.text[: place + len(opening) - len(asked)] if place >= 0 else ""
        if head not in self.heads:
            (self.heads[head],) = self.tokenizer.ids([head])
        before = self.heads[head]
        # the first token that differs is one that merges the end of the head with the question
        differing = (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b)
        return next(differing, min(len(before), len(ids)))

    def _decode(self, ending: Ending) -> str:
        replaces = ending.n_replaced or not ending.shared
        return "" if replaces else str(self.tokenizer.tokenizer.decode(list(ending.shared)))

    def _after(self, text: str, answer: str) -> str:
        """An answer with the space that separates it from the text before it."""
        return answer if not text or text[-1].isspace() or text[-1] in "([{\"'“‘" else self.space + answer

    def _check_text(self, question: Question) -> None:
        wordings = (question.text, question.completion, question.statement)
        for text in (*wordings, *question.choices, question.context):
            self.tokenizer.check_markup(text, f"the question {question.text!r:.60}")

    def _check_unknown(self, prompts: list[Prompt]) -> None:
        tokenizer = self.tokenizer.tokenizer
        unknown = tokenizer.unk_token_id
        if unknown is None:
            return
        # the unknown token is often also the BOS, EOS or padding token, which the template or the tokenizer writes
        token, n_added = tokenizer.unk_token, self.tokenizer.before.count(unknown)
        texts = [p.text for p in prompts if p.token_ids.count(unknown) > n_added + p.text.count(token)]
        if not texts:
            return
        n_unknown, words = len(texts), [word for word in texts[0].split() if token not in word]
        encoded = zip(words, self.tokenizer.ids(words), strict=True)
        word = next((word for word, ids in encoded if unknown in ids[len(self.tokenizer.before) :]), "")
        if n_unknown == len(prompts):
            raise BadInput(
                f"this model's tokenizer cannot encode the questions: every prompt contains unknown words, like "
                f"{word!r:.40}; use another model (the toy model's vocabulary covers only the toy question sets)"
            )
        warnings.warn(
            f"{n_unknown} of {len(prompts)} prompts contain words that are unknown to the tokenizer, like {word!r:.40}",
            stacklevel=4,
        )


def _check_ids(model: Model, prompts: Sequence[Prompt]) -> None:
    """Check that the model has an embedding and a logit for every token."""
    backend = backend_of(model)
    largest = max((i for p in prompts for ids in (p.token_ids, *p.label_ids) for i in ids), default=0)
    if largest >= (size := min(backend.d_vocab, backend.n_embeddings)):
        tokenizer: Any = model.tokenizer
        token = tokenizer.convert_ids_to_tokens(largest)
        raise BadInput(
            f"the tokenizer has the token {token!r} with id {largest}, but the model's vocabulary has {size} entries; use the "
            "tokenizer that was saved with the model"
        )


def _fit_context(prompts: Sequence[Prompt], n_ctx: int, drop_long: bool) -> PromptSet:
    """Leave out questions with prompts longer than the context window, or raise an error if there are any."""
    long = {p.question for p in prompts if len(p.token_ids) > n_ctx}
    if not long:
        return PromptSet(tuple(prompts))
    longest = max(len(p.token_ids) for p in prompts)
    message = f"{len(long)} {plural('question', len(long))} {'exceeds' if len(long) == 1 else 'exceed'} the context window of {n_ctx} tokens (the longest prompt has {longest})"
    kept = [p for p in prompts if p.question not in long]
    if not drop_long or not kept:
        raise BadInput(f"{message}; shorten them, or leave them out with drop_long=True (--drop-long)")
    warnings.warn(f"{message}; they are left out", stacklevel=3)
    return PromptSet(tuple(kept))
