"""Prompt formats: how a question and its choices are written as a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tn_lens.core.registry import Registry


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """The text of a prompt, for models with and without a chat template."""

    user: str
    """The user turn, with the placeholders `{question}` and `{choices}` and, optionally, `{labels}` ("A and B") and
    `{context}`."""
    choice: str = "Answer {label}: {choice}"
    """The line for one choice; empty if the choices are not listed."""
    separator: str = "\n"
    """The text between the lines of the choices."""
    system: str | None = None
    """The system turn."""
    cue: str = "\nAnswer:"
    """The end of the prompt for models without a chat template, to which a space and the label are usually appended."""
    chat: bool = True
    """Whether to use the chat template of a model that has one."""
    labels: Literal["letters", "choices"] = "letters"
    """Whether the model answers with a letter or with the choice itself."""


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
FORMATS.register("figure_9", FIGURE_9)
