"""Prompts: token ids, the ids of the labels, and the order of the choices (paper 2.2, appendix A.2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from tn_lens.core.errors import BadInput
from tn_lens.core.options import Order
from tn_lens.core.seeds import generator
from tn_lens.core.sentences import plural
from tn_lens.models import Model, backend_of
from tn_lens.questions.formats import FIGURE_9, PromptTemplate
from tn_lens.questions.prompt_set import Prompt, PromptSet, stream_of
from tn_lens.questions.question import LETTERS, Question, QuestionSet
from tn_lens.questions.repeats import groups_of
from tn_lens.questions.toy import LETTERED

TEMPLATE_DATE = "26 Jul 2024"
"""The date for chat templates that print the current date, so that prompts do not change from day to day."""

PLAIN_ENDS = (("", " "), (" ", ""), ("\n", ""))
"""Possible ends of a plain-text prompt and beginnings of a label: "Answer:" and " A" for most tokenizers; some tokenizers
merge the colon and the space."""

TAIL = 24
"""Number of characters at the end of a prompt that may influence how the following label is tokenized."""


def random_order(question: Question, seed: int) -> tuple[int, ...]:
    """A random order of a question's choices, which depends only on the seed and the question's id."""
    return tuple(generator(seed, stream_of(question.id)).permutation(len(question.choices)).tolist())


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
        questions: questions to ask.
        order: `"random"` draws one order per question from the seed and the question's id, as the paper does; `"both"`
            asks each question in every rotation of its choices, which gives two prompts for two choices; `"given"`
            keeps the question's own order.
        seed: seed for the random order.
        drop_long: leave out questions with prompts longer than the context window, with a warning instead of an error.

    Returns:
        The prompts, grouped by question.

    Raises:
        BadInput: a label is not a single token after its prompt, or prompts are longer than the context window.
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
    groups = {q.id: group for q, group in zip(questions, groups_of(questions), strict=True)}
    prompts = [replace(prompt, group=groups[prompt.question]) for prompt in encoder.encode(requests)]
    return _fit_context(prompts, backend_of(model).n_ctx, drop_long)


def build_prompt(
    model: Model, text: str, *, right: str, wrong: str | Sequence[str], question: str | None = None
) -> Prompt:
    """Encode a free-form prompt: `build_prompt(model, "The capital of France is", right=" Paris", wrong=" Rome")`.

    Args:
        model: model with the tokenizer to use, which adds its special tokens; the chat template is not applied.
        text: the prompt.
        right: the true continuation, with its leading space.
        wrong: one or more false continuations.
        question: id of the question; a digest of text and continuations by default.

    Raises:
        BadInput: a continuation is not a single token, or two continuations are the same token.
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
        self.template = LETTERED if own_words else template  # figure 9 has words that the embedded model lacks
        self.chat = template.chat and getattr(self.tokenizer, "chat_template", None) is not None
        self.end, self.prefix = ("", "") if self.chat else PLAIN_ENDS[0]
        """Text at the end of a prompt, and text before a label."""
        self.heads: dict[str, list[int]] = {"": []}
        """Token ids of the text before a question, by this text."""
        if (
            self.chat
            and "strftime_now" in str(self.tokenizer.chat_template)
            and "date_string" not in str(self.tokenizer.chat_template)
        ):
            warnings.warn(
                "this model's chat template always prints today's date, so the prompts differ from day to day",
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
        except TemplateError:  # templates that do not support a system turn raise an error
            pass
        try:
            return self._apply([{"role": "user", "content": f"{self.template.system}\n\n{user}" if system else user}])
        except TemplateError as error:
            raise BadInput(f"the chat template cannot be rendered: {error}; use a format with chat=False") from error

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
        known: dict[tuple[str, str], int] = {}  # a label's id depends only on the end of the prompt
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
        """Number of tokens before the question. A token that overlaps the question counts as part of it."""
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
                raise BadInput(f"two choices have the same label token (ids {prompt.label_ids}); use different labels")
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            return
        if any(unknown in ids for prompt in prompts for ids in prompt.label_ids):
            raise BadInput(
                "this model's tokenizer encodes the answer labels as its unknown token; use another tokenizer or other labels"
            )
        # the unknown token is often also the BOS, EOS or padding token, which the template or the tokenizer writes
        token, n_added = self.tokenizer.unk_token, _ids(self.tokenizer, [""], special=not self.chat)[0].count(unknown)
        texts = [p.text for p in prompts if p.token_ids.count(unknown) > n_added + p.text.count(token)]
        if not texts:
            return
        n_unknown, words = len(texts), [word for word in texts[0].split() if token not in word]
        encoded = zip(words, _ids(self.tokenizer, words, special=False), strict=True)
        word = next((word for word, ids in encoded if unknown in ids), "")
        if n_unknown == len(prompts):
            raise BadInput(
                f"this model's tokenizer cannot encode the questions: all {n_unknown} prompts contain unknown words, like "
                f"{word!r:.40}; use another model (the toy model's vocabulary covers only the toy question sets)"
            )
        warnings.warn(
            f"{n_unknown} of {len(prompts)} prompts contain words that are unknown to the tokenizer, like {word!r:.40}",
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
        raise BadInput(f"a question contains a lone surrogate (half of a character): {ascii(broken)[-120:]}") from error


def _label_id(tokenizer: Any, text: str, ids: list[int], label: str, *, special: bool) -> int:
    """The id of the single token that the label adds to `text`.

    Raises:
        BadInput: the label adds more than one token, or changes the tokens before it. The message shows the ids.
    """
    (longer,) = _ids(tokenizer, [text + label], special=special)
    added = longer[len(ids) :]
    if longer[: len(ids)] != ids:
        raise BadInput(
            f"the label {label!r} merges with the end of the prompt: the prompt's ids end with {ids[-4:]}, but with the label "
            f"appended, they are {longer[max(0, len(ids) - 4) :]}; reword the prompt so that it ends at a token boundary"
        )
    if len(added) != 1:
        raise BadInput(f"the label {label!r} must be one token after this prompt, but is {len(added)} (ids {added})")
    return added[0]


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
