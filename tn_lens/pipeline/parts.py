"""The split of the questions into those for finding neurons, for reporting, and for tuning."""

from __future__ import annotations

from typing import NamedTuple

from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.core.settings import Settings
from tn_lens.questions.question import QuestionSet
from tn_lens.questions.repeats import groups_of, without_repeats

TUNING_SHARE = 0.2
"""Fraction of the questions on which t is tuned, for sets without parts."""


class Parts(NamedTuple):
    """The questions of a run by their use."""

    finding: QuestionSet
    reporting: QuestionSet
    tuning: QuestionSet
    is_held_out: bool
    """Whether the questions for reporting are not those for finding neurons."""


def split_questions(questions: QuestionSet, settings: Settings) -> Parts:
    """The questions to find neurons on, those to report on, and those to tune t on.

    Uses the parts of the set if it has them, otherwise the whole set both for finding and for reporting. With t = "auto", a
    fraction of such a set, drawn with the seed, is used for tuning only. Questions that repeat an earlier one are left out,
    and questions with the same text are not divided between tuning and finding.

    Raises:
        BadInput: there are too few questions to set some of them aside for tuning.
    """
    questions = without_repeats(questions).with_format(**settings.of_format())
    finding, reporting, tuning = (questions.part(name) for name in ("find", "report", "tune"))
    is_held_out = bool(finding) and bool(reporting)
    if not is_held_out:
        finding = questions
    if settings.adaptive_threshold == "auto" and not tuning:
        # a separate stream, since the seed is used for other draws as well
        shuffled = generator(settings.seed, 5).permutation(len(questions)).tolist()
        n_tuning = max(1, round(TUNING_SHARE * len(questions)))
        units = [group or place for place, group in enumerate(groups_of(questions))]
        tuned = {units[place] for place in shuffled[:n_tuning]}
        tuning = questions.select(place for place, unit in enumerate(units) if unit in tuned)
        finding = questions.select(place for place, unit in enumerate(units) if unit not in tuned)
        is_held_out = False
        if not finding:
            raise BadInput(
                f"tuning t needs at least 2 questions with different texts, got {len(set(units))}; add questions, or set t"
            )
    finding = finding.sample(settings.limit, generator(settings.seed))
    return Parts(finding, reporting if is_held_out else finding, tuning, is_held_out)
