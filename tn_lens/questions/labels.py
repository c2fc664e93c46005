"""The tokens of prompts, and the tokens with which their answers begin."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tn_lens.core.errors import BadInput
from tn_lens.models import Model

TAIL = 24
"""Number of characters at the end of a prompt that may influence how the following answer is tokenized."""


@dataclass(frozen=True)
class Ending:
    """How a prompt ends, and the tokens that decide between its answers."""

    n_replaced: int
    """Number of tokens at the end of the prompt that are not part of the prompt with an answer."""
    shared: tuple[int, ...]
    """Tokens that replace these: the beginning that all answers share."""
    label_ids: tuple[tuple[int, ...], ...]
    """For each answer, the first token in which it differs from the others, and that of its lower-case form."""
    has_lower: bool
    """Whether the lower-case forms of all answers are single tokens, after the same beginning; otherwise none counts."""


class PromptTokenizer:
    """Tokenizes prompts, and finds the tokens with which their answers begin."""

    def __init__(self, model: Model, *, adds_special: bool) -> None:
        if model.tokenizer is None:
            raise BadInput("this model has no tokenizer; load it with load_model(..., tokenizer=...)")
        self.tokenizer: Any = model.tokenizer
        self.before = self._added_before() if adds_special else []
        """Special tokens before a text."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        markup = {str(token) for token in added if token.special or str(token).startswith(("<", "["))}
        self.markup = re.compile("|".join(map(re.escape, sorted(markup - {""}, key=len, reverse=True))) or r"(?!)")
        """Matches texts that become special tokens."""
        self.endings: dict[tuple[str, tuple[str, ...]], Ending] = {}
        """Endings by the end of the prompt and its answers."""

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, after the special tokens that the tokenizer adds before a text.

        Raises:
            BadInput: a text contains a lone surrogate.
        """
        return [self.before + ids for ids in self._encode(texts)] if texts else []

    def find_endings(
        self, prompts: Sequence[tuple[str, Sequence[int], tuple[str, ...]]], *, has_lower: bool, is_fixed: bool
    ) -> list[Ending]:
        """The ending of each prompt, given as its text, token ids, and the texts of its answers.

        Args:
            prompts: text, token ids and answers of each prompt.
            has_lower: whether the lower-case form of an answer counts as the same answer (paper eq. 6-7).
            is_fixed: whether the tokens of the prompt must stay the same, as those of a chat template.

        Raises:
            BadInput: the tokens do not distinguish the answers, or a fixed prompt would change.
        """
        keys = [(text[-TAIL:], answers) for text, _, answers in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self.endings}
        forms = {key: [key[1], tuple(a.lower() for a in key[1])] if has_lower else [key[1]] for key in new}
        texts = [new[key][0] + answer for key, both in forms.items() for answers in both for answer in answers]
        encoded = iter(self.ids(texts))
        for key, both in forms.items():
            text, ids, answers = new[key]
            upper, *lower = [[next(encoded) for _ in form] for form in both]
            self.endings[key] = self._ending(text, ids, answers, upper, *lower)
        endings = [self.endings[key] for key in keys]
        for ending, (text, ids, answers) in zip(endings, prompts, strict=True):
            if is_fixed and ending.n_replaced:
                raise BadInput(
                    f"the answer {answers[0]!r} merges with the end of the chat template's prompt ({text[-20:]!r}, ids "
                    f"{list(ids[-4:])}); use a format with chat=False, or give the beginning of the answer with prefill"
                )
        return endings

    def _ending(
        self,
        text: str,
        ids: Sequence[int],
        answers: tuple[str, ...],
        upper: list[list[int]],
        lower: Sequence[list[int]] = (),
    ) -> Ending:
        shared = _common_beginning(upper)
        n = len(shared)
        if ended := [answer for answer, longer in zip(answers, upper, strict=True) if len(longer) == n]:
            others = ", ".join(f"{answer!r:.60}" for answer in answers if answer != ended[0])
            raise BadInput(
                f"the answer {ended[0]!r:.60} is the beginning of the other answers ({others}) after {text[-40:]!r}, so that no "
                "token distinguishes them; reword the answers"
            )
        first = [longer[n] for longer in upper]
        if unknown := [a for a, i in zip(answers, first, strict=True) if i == self.tokenizer.unk_token_id]:
            raise BadInput(
                f"this model's tokenizer encodes the answer {unknown[0]!r:.60} as its unknown token; use another tokenizer or "
                "other labels"
            )
        if same := [
            (a, b)
            for a, i in zip(answers, first, strict=True)
            for b, j in zip(answers, first, strict=True)
            if a < b and i == j
        ]:
            raise BadInput(
                f"the answers {same[0][0]!r:.60} and {same[0][1]!r:.60} begin with the same token after {text[-40:]!r}; answers "
                "must differ in the first token after the beginning that all of them share"
            )
        forms = lower or upper
        # the same for all answers, since an answer with more forms would be more probable
        has_lower = all(
            form == same or (len(form) == n + 1 and form[:n] == shared and form[n] not in first)
            for form, same in zip(forms, upper, strict=True)
        )
        variants = [form[n] for form in forms] if has_lower else first
        kept = len(_common_beginning([ids, shared]))
        label_ids = tuple(tuple(dict.fromkeys(pair)) for pair in zip(first, variants, strict=True))
        return Ending(len(ids) - kept, tuple(shared[kept:]), label_ids, has_lower)

    def check_markup(self, text: str, what: str) -> None:
        """Check that a text from outside contains no special tokens, which would end or open turns of the prompt.

        Raises:
            BadInput: the text contains one.
        """
        if found := self.markup.search(text):
            raise BadInput(
                f"{what} contains {found[0]!r}, which is a special token of this model ({text[:60]!r}); remove it from the text"
            )

    def _added_before(self) -> list[int]:
        """The special tokens that the tokenizer adds before a text. Those that it adds after a text would end the prompt."""
        (bare,), (full,) = self._encode(["a"]), self._encode(["a"], add_special_tokens=True)
        starts = range(len(full) - len(bare) + 1)
        return next((full[:start] for start in starts if full[start : start + len(bare)] == bare), [])

    def _encode(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        try:
            return self.tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        except (TypeError, UnicodeEncodeError) as error:  # tokenizers cannot encode lone surrogates
            broken = [text for text in texts if not text.isascii() and text != text.encode(errors="ignore").decode()]
            if not broken:
                raise
            raise BadInput(
                f"a question contains a lone surrogate (half of a character): {ascii(broken[0])[-120:]}"
            ) from error


def _common_beginning(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all sequences begin."""
    shared: list[int] = []
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        shared.append(tokens[0])
    return shared
