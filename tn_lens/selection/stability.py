"""What the thresholds and the split decide: other selections from the same scores, without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch

from tn_lens.core.errors import BadInput
from tn_lens.neurons.neuron import NeuronSet, Site
from tn_lens.selection.select import (
    ScoreSource,
    Selection,
    check_thresholds,
    count_salient,
    least_count,
    moments_of,
    select_neurons,
    split_halves,
)
from tn_lens.selection.significance import Correction, adjust, one_sided_t_test, significant
from tn_lens.selection.stored import StoredScores

T_GRID = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
P_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
"""Thresholds of a sweep; the paper's lie between 1 and 25 % (t), and at 40 % (p)."""
SPLIT_SEEDS = tuple(range(10))
"""Splits of a stability check."""


def sweep(
    scores: ScoreSource,
    *,
    ts: Sequence[float] = T_GRID,
    ps: Sequence[float] = P_GRID,
    alpha: float = 0.05,
    correction: Correction = "bonferroni",
    seed: int = 0,
) -> pd.DataFrame:
    """How many neurons every pair of thresholds finds, from two passes over the scores (paper A.3).

    Returns:
        One row per (t, p): n_candidates and n_found.

    Raises:
        BadInput: a threshold outside (0, 1], or no scores.
    """
    for t in ts:
        for p in ps:
            check_thresholds(t=t, p=p, alpha=alpha)
    if not scores.categories:
        raise BadInput("there are no scores to select from: no question was attributed")
    half_1, half_2 = split_halves(scores.categories, seed)
    counts = count_salient(scores, set(half_1), ts)
    loosest = least_count(min(ps), len(half_1))
    places: dict[Site, torch.Tensor] = {
        site: torch.stack([of_site[site] >= loosest for of_site in counts]).any(0).flatten().nonzero().flatten()
        for site in counts[0]
    }
    p_value = one_sided_t_test(moments_of(scores, set(half_2), places)).p_value
    rows = []
    for t, of_site in zip(ts, counts, strict=True):
        count = np.concatenate([of_site[site].flatten()[at].numpy() for site, at in places.items()])
        for p in ps:
            tested = p_value[count >= least_count(p, len(half_1))]
            found = significant(adjust(tested, correction), alpha)
            rows.append({"t": t, "p": p, "n_candidates": len(tested), "n_found": int(found.sum())})
    return pd.DataFrame(rows)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Stability:
    """The same selection on other splits of the questions into halves."""

    seeds: tuple[int, ...]
    sets: tuple[NeuronSet, ...]

    @property
    def jaccards(self) -> list[float]:
        """Overlap of every pair of sets, in [0, 1]."""
        return [a.jaccard(b) for a, b in combinations(self.sets, 2)]

    @property
    def core(self) -> NeuronSet:
        """The neurons that every split finds."""
        return NeuronSet(set.intersection(*map(set, self.sets)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def summary(self) -> str:
        """One sentence."""
        sizes = [len(one) for one in self.sets]
        if not max(sizes):
            return f"Over {len(self.seeds)} splits into halves no neuron is found in any."
        return (
            f"Over {len(self.seeds)} splits into halves {min(sizes)} to {max(sizes)} neurons are found, {len(self.core)} of "
            f"them every time; the mean overlap of two splits (Jaccard) is {np.mean(self.jaccards):.2f}."
        )


def stability(scores: ScoreSource, *, seeds: Sequence[int] = SPLIT_SEEDS, **settings: Any) -> Stability:
    """Select on several splits of the questions.

    Args:
        scores: an `Attribution`, or the scores of a run folder.
        seeds: of the splits, at least two.
        settings: of `select_neurons`, but for the seed.

    Raises:
        BadInput: fewer than two seeds, or see `select_neurons`.
    """
    if len(seeds) < 2:
        raise BadInput(f"stability compares splits, and needs at least two seeds; got {list(seeds)}")
    sets = tuple(select_neurons(scores, seed=seed, **settings).neurons for seed in seeds)
    return Stability(seeds=tuple(seeds), sets=sets)


def found_again(scores: StoredScores, selection: Selection, *, seed: int = 0) -> float | None:
    """Share of the neurons found with one drawn order per question that are found again with every order.

    A neuron that supports a letter can pass with one order and cannot with both. None where only one order was asked, or
    nothing is found with one.
    """
    if scores.n_orders < 2:
        return None
    once = select_neurons(
        replace(scores, drawn=seed),
        t=selection.t,
        p=selection.p,
        alpha=selection.alpha,
        correction=selection.correction,
        family=selection.family,
        seed=selection.seed,
    ).neurons
    return len(once & selection.neurons) / len(once) if once else None
