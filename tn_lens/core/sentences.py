"""Sentences about results, rendered from the Jinja templates in `report/sentences`.

Result objects contain numbers and no prose. `say("evaluation.summary", evaluation)` renders the macro `summary` of
`report/sentences/evaluation.j2`. All sentences about results are in this one folder.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "report"


def say_each(macro: str, *args: Any, **kwargs: Any) -> list[str]:
    """Render a macro and split its text at blank lines.

    Args:
        macro: template and macro, for example "selection.nothing_found".
        args: positional arguments of the macro.
        kwargs: keyword arguments of the macro.
    """
    template, _, name = macro.partition(".")
    text = str(getattr(environment("sentences").get_template(f"{template}.j2").module, name)(*args, **kwargs))
    # a template may break a sentence over several lines
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def say(macro: str, *args: Any, **kwargs: Any) -> str:
    """Render a macro as one paragraph."""
    return " ".join(say_each(macro, *args, **kwargs))


def plural(noun: str, n: int) -> str:
    """The singular of a noun if `n` is 1, otherwise its plural."""
    if n == 1:
        return noun
    return f"{noun[:-1]}ies" if noun.endswith("y") and not noun.endswith("ay") else f"{noun}s"


def count(n: int, noun: str) -> str:
    """A number with its noun, for example "1 question" or "1,200 questions"."""
    return f"{n:,} {plural(noun, n)}"


def percent(value: float, digits: int = 1) -> str:
    """A fraction as a percentage; "not known" for NaN."""
    return f"{100 * value:.{digits}f} %" if value == value else "not known"


def fixed(value: float, digits: int = 1) -> str:
    """A number with `digits` decimals, without a minus sign before zero; "not known" for NaN."""
    return f"{round(value, digits) + 0.0:.{digits}f}" if value == value else "not known"


@cache
def environment(folder: str, *, is_html: bool = False) -> Any:
    """The Jinja environment for the templates in a folder of `tn_lens/report`.

    Args:
        folder: "sentences" or "templates".
        is_html: whether to escape inserted values. Sentences are plain text and are escaped by the pages that show them.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(FOLDER / folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=is_html,
    )
    templates.filters |= {"plural": plural, "count": count, "percent": percent, "fixed": fixed}
    templates.tests |= {"nan": lambda value: value != value, "finite": math.isfinite}
    return templates
