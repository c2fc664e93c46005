"""Find the neurons that support truth across questions (paper 2.3, then the test of 2.2)."""

from __future__ import annotations

from tn_lens.attribution.result import ScoreSource
from tn_lens.core.options import Correction, Family
from tn_lens.selection.result import Selection
from tn_lens.selection.table import Rules, SelectionTable, Split, check_thresholds


def select_neurons(
    scores: ScoreSource,
    *,
    adaptive_threshold: float | None = 0.2,
    share_threshold: float | None = 0.4,
    alpha: float | None = 0.05,
    correction: Correction = "bonferroni",
    family: Family = "candidates",
    seed: int = 0,
) -> Selection:
    """Find the neurons that support truth across questions (paper 2.3, then the test of 2.2).

    On the questions of half 1 a neuron is salient if D > t * max(D), the maximum over all layers of its site in that
    question (nowhere if the maximum is not positive). Candidates are salient in at least a fraction p of half 1. Their
    mean D is then tested against 0 on half 2 alone, so that no neuron is tested on the questions that chose it.

    Args:
        scores: an `Attribution`, or the scores of a run folder. Questions asked in several orders count by their mean D.
        adaptive_threshold: t in (0, 1]; None asks only for D > 0.
        share_threshold: p in (0, 1]; None asks only for one question in which the neuron is salient.
        alpha: significance level in (0, 1); None skips the test and finds every candidate.
        correction: for multiple comparisons.
        family: what the correction counts.
        seed: seed for the split into halves, which is stratified by category.

    Raises:
        BadInput: a threshold outside its range, or no scores.
    """
    rules = Rules(share_threshold=share_threshold, alpha=alpha, correction=correction, family=family)
    check_thresholds(adaptive_threshold, rules)
    table = SelectionTable(scores, ts=[adaptive_threshold], splits=[Split(seed)], share_threshold=share_threshold)
    return table.select(adaptive_threshold, Split(seed), rules)
