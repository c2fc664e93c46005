"""Counts and moments for selecting neurons with several thresholds and splits (paper 2.2, 2.3).

Which neurons are salient in a question does not depend on the split into halves, so one pass over the scores gives
the counts of all splits and thresholds, and a second pass gives the moments of all candidates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tn_lens.attribution.result import Scores, ScoreSource, drawn_order, mean_of_orders
from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.neurons import SiteName
from tn_lens.selection.result import Rules, Selection
from tn_lens.selection.significance import Moments, adjust, one_sided_t_test

Threshold: TypeAlias = float | None
Counts: TypeAlias = dict[SiteName, Int[Tensor, "layer neuron"]]
"""Number of questions in which each neuron is salient."""


@dataclass(frozen=True)
class Split:
    """A split of the questions into halves."""

    seed: int
    drawn: int | None = None
    """Seed for drawing one order of every question; None uses the mean over its orders."""


class SelectionTable:
    """Counts and moments for some adaptive thresholds and splits, from two passes over the scores.

    Args:
        scores: an `Attribution`, or the scores of a run folder.
        ts: adaptive thresholds that `select` will be called with.
        splits: splits that `select` will be called with.
        share_threshold: the smallest share threshold that `select` will be called with.

    Raises:
        BadInput: there are no scores.
    """

    def __init__(
        self, scores: ScoreSource, *, ts: Sequence[Threshold], splits: Sequence[Split], share_threshold: float | None
    ) -> None:
        self.space = scores.space
        # equal splits are counted once
        self.halves = {split: split_halves(scores.categories, split.seed, scores.equal) for split in splits}
        sizes = {site: (self.space.n_layers, self.space.width(site)) for site in self.space.sites}
        self.counts: dict[tuple[Split, Threshold], Counts] = {
            (split, t): {site: torch.zeros(size, dtype=torch.int32) for site, size in sizes.items() if size[1]}
            for split in self.halves
            for t in ts
        }
        self._count(scores, ts)
        # a neuron that is salient at a high threshold is salient at a lower one, so these candidates include all others
        loosest = min(ts, key=lambda t: 0 if t is None else t)
        self.places = {
            split: {
                site: (count >= least_count(share_threshold, len(half_1))).flatten().nonzero().flatten()
                for site, count in self.counts[split, loosest].items()
            }
            for split, (half_1, _) in self.halves.items()
        }
        """Flat indices, by site, of the candidates under the loosest thresholds, which include all other candidates."""
        self.moments = {split: Moments.empty(sum(map(len, at.values()))) for split, at in self.places.items()}
        self._gather(scores)

    def select(self, t: Threshold, split: Split, rules: Rules) -> Selection:
        """The neurons found with these thresholds on this split."""
        half_1, half_2 = self.halves[split]
        counts, places = self.counts[split, t], self.places[split]
        least = least_count(rules.share_threshold, len(half_1))
        # [layer, neuron] -> [candidate of the loosest thresholds]
        flat = {site: counts[site].flatten()[at] for site, at in places.items()}
        chosen = {site: count >= least for site, count in flat.items()}
        # the columns are independent, so those of the candidates can be selected afterwards
        moments = self.moments[split].columns(np.concatenate([is_chosen.numpy() for is_chosen in chosen.values()]))
        test = one_sided_t_test(moments)
        n_tests = None if rules.family == "candidates" else self.space.n_neurons
        adjusted = adjust(test.p_value, rules.correction, n_tests)
        shares = [(flat[site][is_chosen] / len(half_1)).double().numpy() for site, is_chosen in chosen.items()]
        most = max((int(count.max()) for count in counts.values() if count.numel()), default=0)
        return Selection(
            candidates=self.space.at({site: places[site][is_chosen] for site, is_chosen in chosen.items()}),
            share=np.concatenate(shares),
            mean_difference=moments.mean,
            std=moments.standard_error * np.sqrt(moments.n),
            t_statistic=test.statistic,
            p_value=test.p_value,
            p_adjusted=adjusted,
            found=np.ones(len(adjusted), dtype=bool) if rules.alpha is None else adjusted < rules.alpha,
            space=self.space,
            half_1=half_1,
            half_2=half_2,
            adaptive_threshold=t,
            **asdict(rules),
            seed=split.seed,
            largest_share=most / max(len(half_1), 1),
            n_tested=moments.n,
        )

    def _count(self, scores: ScoreSource, ts: Sequence[Threshold]) -> None:
        """First pass: count the questions of half 1 in which each neuron is salient."""
        members = {split: set(half_1) for split, (half_1, _) in self.halves.items()}
        for question, variants in self._variants(scores):
            for drawn, difference in variants.items():
                # salience is computed once for all splits that have the question in half 1
                splits = [s for s, half in members.items() if s.drawn == drawn and question in half]
                for t in ts if splits else ():
                    is_salient = {site: salient(difference[site], t) for site in self.space.sites}
                    for split in splits:
                        for site, count in self.counts[split, t].items():
                            count += is_salient[site]

    def _gather(self, scores: ScoreSource) -> None:
        """Second pass: moments of the candidates' D on the questions of half 2.

        Questions with the same text are one observation, their mean: copies of a question must not lower its p-value.
        """
        members = {split: set(half_2) for split, (_, half_2) in self.halves.items()}
        equal, groups = scores.equal, defaultdict(list)
        for question, variants in self._variants(scores):
            for split, half in members.items():
                if question in half:
                    difference = variants[split.drawn]
                    row = [difference[site].flatten()[at].double() for site, at in self.places[split].items()]
                    if question in equal:
                        groups[split, equal[question]].append(torch.cat(row))
                    else:
                        self._observe(split, torch.cat(row))
        for (split, _), rows in groups.items():
            self._observe(split, torch.stack(rows).mean(0))

    def _observe(self, split: Split, row: Float[Tensor, " candidate"]) -> None:
        self.moments[split] = self.moments[split].merge(Moments.of(row.numpy()[None]))  # [1, candidate]

    def _variants(self, scores: ScoreSource) -> Iterator[tuple[str, dict[int | None, Scores]]]:
        """D of each question: the mean over its orders (key None), and D in the order that each seed draws (key: the seed)."""
        seeds = {split.drawn for split in self.halves}
        for question, orders in scores.each_question():
            drawn = {seed: drawn_order(question, orders, seed) for seed in seeds if seed is not None}
            yield question, {**drawn, None: mean_of_orders(orders)}


def check_thresholds(t: Threshold, rules: Rules) -> None:
    """Check that the thresholds are in range and that the family of tests is known.

    Raises:
        BadInput: a threshold is out of range, or the family is unknown.
    """
    for name, value in (("adaptive_threshold (t)", t), ("share_threshold (p)", rules.share_threshold)):
        if value is not None and not 0 < value <= 1:
            raise BadInput(f"{name} must be a fraction in (0, 1], not a percentage; got {value}")
    if rules.alpha is not None and not 0 < rules.alpha < 1:
        raise BadInput(f"alpha must lie in (0, 1); got {rules.alpha}")
    if rules.family not in ("candidates", "all"):
        raise BadInput(f"expected family 'candidates' or 'all', got {rules.family!r}")


def split_halves(
    categories: Mapping[str, str], seed: int, equal: Mapping[str, str] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split the questions into halves, stratified by category (Vul et al.; paper 2.3).

    Args:
        categories: question id -> category.
        seed: seed of the split.
        equal: question id -> group, for questions that have an equal one. A group is not divided: otherwise neurons would be
            tested on questions that were used to choose them.

    Raises:
        BadInput: there are no questions.
    """
    if not categories:
        raise BadInput("there are no scores to select from: no question was attributed")
    units: dict[str, list[str]] = defaultdict(list)
    for question in categories:
        units[f"group {equal[question]}" if equal and question in equal else f"question {question}"].append(question)
    by_category: dict[str, list[list[str]]] = defaultdict(list)
    for unit in units.values():
        by_category[categories[unit[0]]].append(unit)
    rng = generator(seed)
    shuffled = [
        by_category[category][i]
        for category in sorted(by_category)
        for i in rng.permutation(len(by_category[category])).tolist()
    ]
    # single questions alternate, so that each category is halved; large groups come first, to be balanced by the others
    halves: tuple[set[str], set[str]] = (set(), set())
    for unit in sorted(shuffled, key=len, reverse=True):
        min(halves, key=len).update(unit)
    # restore the order of the questions
    half_1, half_2 = (tuple(question for question in categories if question in half) for half in halves)
    return half_1, half_2


def salient(difference: Float[Tensor, "layer neuron"], t: float | None) -> Bool[Tensor, "layer neuron"]:
    """True where D > t * max(D) within one question and site; nowhere if max(D) <= 0 (paper 2.3)."""
    largest = difference.max()
    if largest <= 0:
        return torch.zeros_like(difference, dtype=torch.bool)
    return difference > (0 if t is None else t) * largest


def least_count(share_threshold: float | None, n_questions: int) -> int:
    """Minimum number of questions in which a candidate must be salient."""
    return 1 if share_threshold is None else max(1, int(np.ceil(share_threshold * n_questions - 1e-9)))
