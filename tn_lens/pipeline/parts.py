"""Which questions neurons are found on, reported on, and tuned on."""

from __future__ import annotations

from typing import NamedTuple

from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.core.settings import Settings
from tn_lens.questions.question import QuestionSet

TUNING_SHARE = 0.2
"""Fraction of a set without parts that t is tuned on."""


class Parts(NamedTuple):
    """The questions of a run by their use."""

    finding: QuestionSet
    reporting: QuestionSet
    tuning: QuestionSet
    is_held_out: bool
    """Whether the questions to report on are others than those to find neurons on."""


def split_questions(questions: QuestionSet, settings: Settings) -> Parts:
    """The questions to find neurons on, those to report on, and those to tune t on.

    The set's own parts if it has them, else the whole set for finding and reporting; with t = "auto" a fraction of it,
    drawn with the seed, is for tuning only.

    Raises:
        BadInput: there are too few questions to tune t on some of them.
    """
    if settings.format is not None:
        questions = questions.with_format(settings.format)
    finding, reporting, tuning = (questions.part(name) for name in ("find", "report", "tune"))
    is_held_out = bool(finding) and bool(reporting)
    if not is_held_out:
        finding = questions
    if settings.adaptive_threshold == "auto" and not tuning:
        # a stream of its own: the seed draws other things as well
        shuffled = generator(settings.seed, 5).permutation(len(questions)).tolist()
        n_tuning = max(1, round(TUNING_SHARE * len(questions)))
        tuning, finding = (questions.select(sorted(part)) for part in (shuffled[:n_tuning], shuffled[n_tuning:]))
        is_held_out = False
        if not finding:
            raise BadInput(f"{len(questions)} questions are too few to tune t on some of them; set t yourself")
    finding = finding.sample(settings.limit, generator(settings.seed))
    return Parts(finding, reporting if is_held_out else finding, tuning, is_held_out)
