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
    mean D is then tested against 0 on half 2 only, so that no neuron is tested on the questions used to choose it.

    Args:
        scores: an `Attribution`, or the scores of a run folder. For questions asked in several orders, D is averaged.
        adaptive_threshold: t in (0, 1]; None requires only D > 0.
        share_threshold: p in (0, 1]; None requires only one question in which the neuron is salient.
        alpha: significance level in (0, 1); None skips the test, so that every candidate is found.
        correction: correction for multiple comparisons, see `adjust`.
        family: tests that the correction counts: the `"candidates"`, or `"all"` neurons of the model.
        seed: seed for the split into halves, which is stratified by category.

    Raises:
        BadInput: a threshold is out of range, or there are no scores.
    """
    rules = Rules(share_threshold=share_threshold, alpha=alpha, correction=correction, family=family)
    check_thresholds(adaptive_threshold, rules)
    table = SelectionTable(scores, ts=[adaptive_threshold], splits=[Split(seed)], share_threshold=share_threshold)
    return table.select(adaptive_threshold, Split(seed), rules)
