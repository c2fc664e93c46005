"""Paired comparisons of conditions, with the question as the unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from tn_lens.core.seeds import generator
from tn_lens.core.sentences import say
from tn_lens.core.stored import Stored
from tn_lens.evaluation.condition import ConditionResult

MASS_KEPT = 0.95
"""Answer mass below which a fall in accuracy may be lost instruction following."""
LETTER_SHIFT = 0.15
"""Change in the fraction of "A" from which a fall in accuracy may be letter bias."""
FOLLOWED = 0.5
"""Answer mass below which a prompt counts as not answered at all."""
N_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Stored):
    """Order-averaged accuracy under one condition minus that under another, on the same questions.

    Plain accuracy over the repetitions if a condition was not asked in every order.
    """

    condition: str
    other: str
    difference: float
    """In percentage points."""
    low: float
    """2.5 % quantile of the bootstrap over questions, and over draws if a condition has several; in points."""
    high: float
    """97.5 % quantile."""
    mcnemar_p: float
    """Exact two-sided McNemar test over questions; NaN if a condition has several draws."""
    draws_p: float
    """(1 + draws of the other condition with an accuracy that is not higher) / (1 + draws); NaN for a single draw."""
    n_draws: int
    """Draws of the other condition."""

    def summary(self) -> str:
        """Summary in one sentence, including whether the interval excludes zero."""
        return say("evaluation.comparison", self)


def compare(results: Mapping[str, ConditionResult], condition: str, other: str, seed: int) -> Comparison:
    """See `Evaluation.compare`."""
    pair = [results[name] for name in (condition, other)]
    averaged = all(result.is_complete for result in pair)
    # [draw, question]
    ours, theirs = (result.order_averaged if averaged else result.drawn(result.right) for result in pair)
    rng = generator(seed, 8)
    # [draw, question] -> [draw, unit]: questions with the same text are not independent, so they are resampled together
    prompts = pair[0].prompts
    index: dict[str, int] = {}
    units = [index.setdefault(prompts.equal.get(question, question), len(index)) for question in prompts.groups]
    sizes = np.bincount(units)
    sums = [np.zeros((len(right), len(sizes))) for right in (ours, theirs)]
    for total, right in zip(sums, (ours, theirs), strict=True):
        np.add.at(total.T, units, right.T)
    resampled = _resampled(sums[0], sums[1], sizes, N_RESAMPLES, rng)
    low, high = np.percentile(resampled, [2.5, 97.5])
    mcnemar = draws_p = float("nan")
    if len(ours) == len(theirs) == 1:
        won, lost = int((sums[0] > sums[1]).sum()), int((sums[0] < sums[1]).sum())
        # exact test on the questions that are answered right under only one of the two conditions
        mcnemar = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    if len(theirs) > 1:
        n_as_bad = int((theirs.mean(-1) <= ours.mean()).sum())
        draws_p = (1 + n_as_bad) / (1 + len(theirs))
    return Comparison(
        condition=condition,
        other=other,
        difference=100 * float(ours.mean() - theirs.mean()),
        low=100 * float(low),
        high=100 * float(high),
        mcnemar_p=mcnemar,
        draws_p=draws_p,
        n_draws=len(theirs),
    )


def _resampled(
    ours: Float[np.ndarray, "draw unit"],
    theirs: Float[np.ndarray, "other unit"],
    sizes: Int[np.ndarray, " unit"],
    n: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, " n"]:
    """`n` differences on questions drawn with replacement, and on draws drawn with replacement.

    Args:
        ours: number of right answers of each unit: a question, or all questions with the same text.
        theirs: that of the other condition.
        sizes: number of questions of each unit.
        n: number of differences.
        rng: source of the draws.
    """
    differences = np.empty(n)
    for place in range(n):
        # the same questions for both conditions: the comparison is paired
        units = rng.integers(len(sizes), size=len(sizes))
        n_questions = sizes[units].sum()
        means = []
        for right in (ours, theirs):
            drawn = right[rng.integers(len(right), size=len(right))].mean(0) if len(right) > 1 else right[0]
            means.append(drawn[units].sum() / n_questions)
        differences[place] = means[0] - means[1]
    return differences
