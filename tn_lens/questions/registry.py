"""The registry of question sets.

A question set is added with one file that registers a loader, or with one call:

    @QUESTION_SETS.register("capitals")
    def load_capitals(source=None, *, continent="Europe") -> QuestionSet: ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path

from tn_lens.core.errors import BadInput
from tn_lens.core.registry import Registry
from tn_lens.questions.question import QuestionSet

Source = str | Path | Sequence[str | Path] | None
"""The source of a question set: one or more paths or URLs. None means its public location."""

QUESTION_SETS: Registry[Callable[..., QuestionSet]] = Registry("question set")
"""Loaders of question sets by name: functions `(source=None, **options)`.

A loader that reads no file has no parameter `source`.
"""


def options_of(name: str) -> set[str]:
    """The options that `load_questions` accepts for a registered question set, or for a user's own file."""
    return set(signature(QUESTION_SETS[name]).parameters) if name in QUESTION_SETS else {"columns"}


def single(source: Source, name: str) -> str | Path | None:
    """Return the source of the question set `name`, which accepts only one.

    Raises:
        BadInput: more than one source is given.
    """
    if isinstance(source, Sequence) and not isinstance(source, str):
        raise BadInput(f"expected one source for {name!r}, got {len(source)}")
    return source


def name_and_source(text: str) -> tuple[str, str | None]:
    """Split NAME=PATH into the name of a registered question set and its source; any other text is a name or a path."""
    name, _, source = text.partition("=")
    return (name, source or None) if name in QUESTION_SETS else (text, None)
