"""Prompt formats: how a question and its choices are written as a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tn_lens.core.registry import Registry

Kind = Literal["letters", "completion", "statement"]
"""How the model answers: with the letter of a choice, with the choice itself, or with True or False."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
VERDICTS = ("True", "False")
PLACEHOLDER = re.compile(r"\{(question|choices|labels|context|label|choice)\}")


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """The text of a prompt, for models with and without a chat template."""

    user: str
    """The user turn, with the placeholders `{question}` and `{choices}` and, optionally, `{labels}` ("A and B") and
    `{context}`. Other braces are plain text."""
    choice: str = "Answer {label}: {choice}"
    """The line for one choice; empty if the choices are not listed."""
    separator: str = "\n"
    """The text between the lines of the choices."""
    system: str | None = None
    """The system turn."""
    cue: str = "\nAnswer:"
    """The end of the prompt for models without a chat template; a space and the answer follow."""
    chat: bool = True
    """Whether to use the chat template of a model that has one."""
    kind: Kind = "letters"
    """What the model answers with: the symbol of a choice; the choice itself; or a verdict, True or False, on a statement. A
    question whose choices are True and False is a statement already; others are asked as statements about one choice."""
    symbols: tuple[str, ...] = tuple(LETTERS)
    """The symbols of the choices in a format of kind "letters"."""
    prefill: str = ""
    """The beginning of the answer, which the model continues."""
    shot_separator: str = "\n\n"
    """The text between solved examples, for models without a chat template."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template, in addition to `enable_thinking=False`."""

    @property
    def ends_with_question(self) -> bool:
        """Whether the answer continues the question itself, and not a cue after it."""
        return (self.user + self.cue).endswith("{question}")


FORMATS: Registry[PromptTemplate] = Registry("prompt format")
"""Prompt formats by name."""

FIGURE_9 = PromptTemplate(
    system="You are a helpful assistant that can help to answer the questions from the user truthfully",
    user=(
        "Given the following question, which answer is correct regarding the question? Each answer is associated with "
        "index {labels}. Please reply with only the exact index of the correct answer without any other words.\n"
        "Question: {question}\n{choices}"
    ),
)
"""The prompt in figure 9 of the paper."""
FORMATS.register("letters", FIGURE_9)
FORMATS.register("figure_9", FIGURE_9)

COMPLETION = PromptTemplate(user="{question}", choice="", cue="", chat=False, kind="completion", shot_separator="\n")
"""Plain text that the choices continue: "The capital of Egypt is", with " Cairo" and " Athens"."""
FORMATS.register("completion", COMPLETION)

QA = PromptTemplate(user="Q: {question}", choice="", cue="\nA:", chat=False, kind="completion")
"""Plain text in which a whole answer follows the question, as in the harness' tasks of multiple choice."""
FORMATS.register("qa", QA)

STATEMENT = PromptTemplate(
    user="{question}\nIs this statement true or false? Please reply with only True or False.",
    choice="",
    kind="statement",
)
"""A statement that is judged True or False."""
FORMATS.register("statement", STATEMENT)


def fill(text: str, **values: str) -> str:
    """Replace the placeholders for which there is a value, and leave all other braces as they are."""
    return PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), text)


def statement_about(text: str, choice: str) -> str:
    """The statement that a choice is the answer to a question, or that it continues a text."""
    if text.rstrip().endswith("?"):
        return f'The answer to the question "{text.strip()}" is "{choice}".'
    end = "" if choice.rstrip().endswith((".", "!", "?")) else "."
    return f"{text.rstrip()} {choice.strip()}{end}"
