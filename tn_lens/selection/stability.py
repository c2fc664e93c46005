"""Sensitivity of the selection to the thresholds and the split, from the same scores and without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd

from tn_lens.attribution.result import ScoreSource
from tn_lens.core.errors import BadInput
from tn_lens.core.options import Correction
from tn_lens.core.sentences import say
from tn_lens.core.stored import Stored
from tn_lens.neurons import NeuronSet
from tn_lens.selection.table import Rules, SelectionTable, Split, check_thresholds

T_GRID = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
P_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
"""Default thresholds of a sweep; the paper uses t from 1 to 25 %, and p = 40 %."""
SPLIT_SEEDS = tuple(range(10))
"""Default seeds of the splits in a stability check."""


def sweep(
    scores: ScoreSource,
    *,
    ts: Sequence[float] = T_GRID,
    ps: Sequence[float] = P_GRID,
    alpha: float = 0.05,
    correction: Correction = "bonferroni",
    seed: int = 0,
) -> pd.DataFrame:
    """Number of neurons found with each pair of thresholds, from two passes over the scores (paper A.3).

    Returns:
        One row per (t, p): t, p, n_candidates and n_found.

    Raises:
        BadInput: a threshold is outside (0, 1], or there are no scores.
    """
    rules = [Rules(share_threshold=p, alpha=alpha, correction=correction) for p in ps]
    pairs = list(product(ts, rules))
    for t, rule in pairs:
        check_thresholds(t, rule)
    table = SelectionTable(scores, ts=ts, splits=[Split(seed)], share_threshold=min(ps))
    rows = []
    for t, rule in pairs:
        selection = table.select(t, Split(seed), rule)
        counts = {"n_candidates": len(selection.candidates), "n_found": int(selection.found.sum())}
        rows.append({"t": t, "p": rule.share_threshold, **counts})
    return pd.DataFrame(rows)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Stability(Stored):
    """The sets selected on several splits of the questions into halves, with the same settings."""

    seeds: tuple[int, ...]
    sets: tuple[NeuronSet, ...]

    @property
    def jaccards(self) -> list[float]:
        """Overlap of every pair of sets, in [0, 1]."""
        return [a.jaccard(b) for a, b in combinations(self.sets, 2)]

    @property
    def mean_jaccard(self) -> float:
        """Mean overlap of two splits, in [0, 1]."""
        return float(np.mean(self.jaccards))

    @property
    def core(self) -> NeuronSet:
        """Neurons that are found with every split."""
        return NeuronSet(set.intersection(*map(set, self.sets)))

    def summary(self) -> str:
        """Summary in one sentence."""
        return say("selection.stability", self)


def stability(
    scores: ScoreSource, *, adaptive_threshold: float | None = 0.2, seeds: Sequence[int] = SPLIT_SEEDS, **rules: Any
) -> Stability:
    """Select on several splits of the questions, in two passes over the scores.

    Args:
        scores: an `Attribution`, or the scores of a run folder.
        adaptive_threshold: t, see `select_neurons`.
        seeds: seeds of the splits, at least two.
        rules: share_threshold, alpha, correction and family of `select_neurons`.

    Raises:
        BadInput: fewer than two seeds, or see `select_neurons`.
    """
    if len(seeds) < 2:
        raise BadInput(f"stability compares splits and needs at least two seeds; got {list(seeds)}")
    rule = Rules(**rules)
    check_thresholds(adaptive_threshold, rule)
    splits = [Split(seed) for seed in seeds]
    table = SelectionTable(scores, ts=[adaptive_threshold], splits=splits, share_threshold=rule.share_threshold)
    return stability_of(table, adaptive_threshold, rule, seeds)


def stability_of(
    table: SelectionTable, adaptive_threshold: float | None, rules: Rules, seeds: Sequence[int] = SPLIT_SEEDS
) -> Stability:
    """`stability` from existing counts and moments."""
    sets = tuple(table.select(adaptive_threshold, Split(seed), rules).neurons for seed in seeds)
    return Stability(seeds=tuple(seeds), sets=sets)


def found_again(once: NeuronSet, neurons: NeuronSet) -> float | None:
    """Fraction of the neurons found with one drawn order per question that are found again with every order.

    A neuron that supports a letter can pass the test with one order, but not with every order. None if no neurons are found
    with one order.

    Args:
        once: found with one order per question (`Split.drawn`).
        neurons: found with every order.
    """
    return len(once & neurons) / len(once) if once else None
