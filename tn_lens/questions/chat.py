"""Chat templates: turns as text, and the text between the prompt and the answer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from tn_lens.core.errors import BadInput

Turn = tuple[str, str]
"""Role and content."""

TEMPLATE_DATE = "26 Jul 2024"
"""The date for chat templates that print the current date, so that prompts do not change from day to day."""

THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
)
"""Beginnings and ends of the blocks in which models think before they answer."""

ANSWER = "ANSWER"
"""Placeholder for an answer, to find where a template writes it."""

USE_PLAIN = "use a format with chat=False, or other template_kwargs (--template-kwargs)"


class ChatTemplate:
    """The chat template of a tokenizer, with a layout in which it keeps every turn."""

    def __init__(self, tokenizer: Any, variables: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.variables = {"date_string": TEMPLATE_DATE, "enable_thinking": False, **variables}
        self.layout: tuple[bool, bool] | None = None
        """Whether contents are lists of parts, and whether the system text is part of the first user turn."""
        template = str(tokenizer.chat_template)
        if "strftime_now" in template and "date_string" not in template:
            warnings.warn(
                "this model's chat template always prints today's date, so the prompts differ from day to day",
                stacklevel=4,
            )

    def render(self, turns: Sequence[Turn]) -> str:
        """Render turns as a prompt, which ends where the assistant's answer begins.

        Raises:
            BadInput: the template raises an error, or leaves out the text of a turn.
        """
        if self.layout is None:
            self.layout = self._find_layout(turns)
        text = self._apply(turns, self.layout)
        if missing := _missing(turns, text):
            raise BadInput(f"the chat template leaves out a part of the prompt ({missing[:80]!r}); {USE_PLAIN}")
        return text

    def lead(self, turns: Sequence[Turn], prompt: str) -> str:
        """The text that the template writes between a prompt and the answer, such as a space; usually empty.

        Raises:
            BadInput: the rendered answer turn does not continue the prompt.
        """
        assert self.layout is not None
        whole = self._apply([*turns, ("assistant", ANSWER)], self.layout, add_generation_prompt=False)
        # only what follows the last user turn: some templates write the system text into the last turn, whosever it is
        asked = turns[-1][1].strip()
        end, continued = (text[text.rfind(asked) + len(asked) :] for text in (prompt, whole))
        before, found, _ = continued.partition(ANSWER)
        if not found:
            return ""  # the template has no answer turns, only prompts
        if not before.startswith(end):
            raise BadInput(
                f"the chat template ends the prompt with {prompt[-40:]!r}, but renders an answer after {before[-40:]!r}; "
                f"give the beginning of the answer with prefill (--prefill), or {USE_PLAIN}"
            )
        return before.removeprefix(end)

    def _find_layout(self, turns: Sequence[Turn]) -> tuple[bool, bool]:
        """The first layout that renders without an error and keeps every turn."""
        has_system = turns[0][0] == "system"
        errors: list[BadInput] = []
        for merges_system in (False, True) if has_system else (False,):
            for has_parts in (False, True):
                try:
                    if not _missing(turns, self._apply(turns, (has_parts, merges_system))):
                        return has_parts, merges_system
                except BadInput as error:
                    errors.append(error)
        if errors:
            raise errors[0]
        return False, False  # `render` names the part that is left out

    def _apply(self, turns: Sequence[Turn], layout: tuple[bool, bool], *, add_generation_prompt: bool = True) -> str:
        has_parts, merges_system = layout
        if merges_system:
            (_, system), (role, user), *rest = turns
            turns = [(role, f"{system}\n\n{user}"), *rest]
        messages = [
            {"role": role, "content": [{"type": "text", "text": content}] if has_parts else content}
            for role, content in turns
        ]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self.variables
            )
        except Exception as error:  # templates are programs, and may raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadInput(f"the chat template cannot be rendered: {reason}; {USE_PLAIN}") from error


def check_thinking(text: str) -> None:
    """Check that a prompt does not end where the model would think rather than answer.

    Raises:
        BadInput: the last thinking block is open.
    """
    if opened := open_thoughts(text):
        begin, end = opened[0]
        raise BadInput(
            f"the prompt ends inside an open thinking block ({begin}), where the model would not write its answer; close it "
            f"with prefill={end + chr(10) * 2!r} (--prefill), or turn thinking off with template_kwargs (--template-kwargs)"
        )


def open_thoughts(text: str) -> list[tuple[str, str]]:
    """The kinds of thinking blocks, as beginning and end, of which the last one in a text is open."""
    return [(begin, end) for begin, end in THINKING if text.rfind(begin) > text.rfind(end)]


def _missing(turns: Sequence[Turn], text: str) -> str:
    """The first content that the text does not contain; empty if it contains all."""
    return next((content for _, content in turns if content.strip() not in text), "")
