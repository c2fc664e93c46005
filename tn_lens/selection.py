"""Thresholds and a held-out test: from scores to truth neurons (paper 2.2, 2.3)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .attribution.result import Scores
from .errors import BadInput
from .neurons import SITES, Neuron, NeuronSet, NeuronSpace, Site
from .seeds import generator
from .significance import Correction, Moments, adjust, one_sided_t_test, significant

Family = Literal["candidates", "all"]
"""What the correction counts as tested: the candidates that were, or every neuron of the model."""


@runtime_checkable
class ScoreSource(Protocol):
    """Anything that hands out D question by question: an `Attribution`, or the scores stored in a run folder."""

    @property
    def space(self) -> NeuronSpace: ...
    @property
    def categories(self) -> Mapping[int, str]: ...
    def per_question(self) -> Iterator[tuple[int, Scores]]: ...


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Selection:
    """The candidates of half 1, their test on half 2, and the neurons that were found."""

    candidates: tuple[Neuron, ...]
    share: Float[np.ndarray, " candidate"]
    """Share of half 1's questions in which the neuron is salient, in [0, 1]."""
    mean_difference: Float[np.ndarray, " candidate"]
    """Mean D over half 2 (paper eq. 9)."""
    t_statistic: Float[np.ndarray, " candidate"]
    p_value: Float[np.ndarray, " candidate"]
    """One-sided, uncorrected."""
    p_adjusted: Float[np.ndarray, " candidate"]
    """Corrected for multiple comparisons."""
    found: Bool[np.ndarray, " candidate"]
    """Which candidates passed."""
    space: NeuronSpace
    half_1: tuple[int, ...]
    """Questions that chose the candidates."""
    half_2: tuple[int, ...]
    """Questions that tested them."""
    t: float | None
    """Adaptive threshold, a fraction of the largest D."""
    p: float | None
    """Share threshold, a fraction of the questions."""
    alpha: float | None
    correction: Correction
    family: Family
    seed: int

    @property
    def neurons(self) -> NeuronSet:
        """The truth neurons."""
        return NeuronSet(n for n, found in zip(self.candidates, self.found, strict=True) if found)

    def to_frame(self, *, candidates: bool = False) -> pd.DataFrame:
        """One row per found neuron (or per candidate), strongest first."""
        frame = pd.DataFrame(
            {
                "site": [n.site for n in self.candidates],
                "layer": [n.layer for n in self.candidates],
                "head": pd.array([n.head for n in self.candidates], dtype="Int64"),
                "index": [n.index for n in self.candidates],
                "mean_difference": self.mean_difference,
                "t_statistic": self.t_statistic,
                "p_value": self.p_value,
                "p_adjusted": self.p_adjusted,
                "share": self.share,
                "found": self.found,
            }
        )
        frame = frame if candidates else frame[frame["found"]].drop(columns="found")
        return frame.iloc[np.argsort(-np.asarray(frame["mean_difference"]), kind="stable")].reset_index(drop=True)

    def to_records(self) -> list[dict[str, Any]]:
        """`to_frame` as plain values for JSON: the head of an MLP neuron is None."""
        rows = self.to_frame().to_dict("records")
        return [
            {str(k): v for k, v in row.items()} | {"head": int(row["head"]) if row["site"] == "attn" else None}
            for row in rows
        ]

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def summary(self) -> str:
        """One sentence."""
        t, p = ("off" if x is None else f"{x:.0%}" if x >= 0.01 else f"{x:.2%}" for x in (self.t, self.p))
        return (
            f"{len(self.neurons)} truth neurons of {self.space.n_neurons:,} (t = {t}, p = {p}, "
            f"{len(self.candidates)} candidates from {len(self.half_1)} questions, tested on {len(self.half_2)} others)."
        )

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.summary())}</p>{self.to_frame().head(20).to_html()}"


def select_neurons(
    scores: ScoreSource,
    *,
    t: float | None = 0.2,
    p: float | None = 0.4,
    alpha: float | None = 0.05,
    correction: Correction = "bonferroni",
    family: Family = "candidates",
    seed: int = 0,
) -> Selection:
    """Find the neurons that support truth across questions (paper 2.3, then the test of 2.2).

    On the questions of half 1 a neuron is salient where D > t * max(D), the maximum over all layers of its site in that
    question (nowhere if the maximum is not positive). Candidates are salient in at least a share p of half 1. Their
    mean D is then tested against 0 on half 2 alone, so that nothing is tested on what it was chosen by.

    Args:
        scores: an `Attribution`, or the scores of a run folder. Questions asked in both orders count by their mean D.
        t: adaptive threshold in (0, 1]; None asks only for D > 0.
        p: share threshold in (0, 1]; None asks only to be salient once.
        alpha: level of the test in (0, 1); None finds every candidate.
        correction: for multiple comparisons.
        family: what the correction counts.
        seed: of the split into halves, which is stratified by category.

    Raises:
        BadInput: a threshold outside its range, or no scores.
    """
    for name, value in (("t", t), ("p", p)):
        if value is not None and not 0 < value <= 1:
            raise BadInput(f"the threshold {name} must lie in (0, 1], a fraction and not a percentage; got {value}")
    if alpha is not None and not 0 < alpha < 1:
        raise BadInput(f"alpha must lie in (0, 1); got {alpha}")
    if family not in ("candidates", "all"):
        raise BadInput(f"expected family 'candidates' or 'all', got {family!r}")
    if not scores.categories:
        raise BadInput("there are no scores to select from: no question was attributed")
    half_1, half_2 = split_halves(scores.categories, seed)
    counts = _count_salient(scores, set(half_1), t)
    least = 1 if p is None else max(1, int(np.ceil(p * len(half_1) - 1e-9)))
    chosen = {site: count >= least for site, count in counts.items()}
    places: list[tuple[Site, int, int]] = [
        (site, layer, flat) for site in SITES if site in chosen for layer, flat in chosen[site].nonzero().tolist()
    ]
    moments = Moments.empty(len(places))
    for question, difference in scores.per_question():
        if question in half_2:
            row = [difference[site][chosen[site]].double() for site in SITES if site in chosen]
            moments = moments.add(torch.cat(row).numpy())
    test = one_sided_t_test(moments)
    adjusted = adjust(test.p_value, correction, None if family == "candidates" else scores.space.n_neurons)
    share = [counts[site][layer, flat].item() / len(half_1) for site, layer, flat in places]
    return Selection(
        candidates=tuple(scores.space.neuron(site, layer, flat) for site, layer, flat in places),
        share=np.array(share, dtype=np.float64),
        mean_difference=moments.mean,
        t_statistic=test.statistic,
        p_value=test.p_value,
        p_adjusted=adjusted,
        found=np.ones(len(places), dtype=bool) if alpha is None else significant(adjusted, alpha),
        space=scores.space,
        half_1=half_1,
        half_2=half_2,
        t=t,
        p=p,
        alpha=alpha,
        correction=correction,
        family=family,
        seed=seed,
    )


def split_halves(categories: Mapping[int, str], seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two halves of the questions, each with half of every category (Vul et al.; paper 2.3)."""
    of_category: dict[str, list[int]] = defaultdict(list)
    for question in sorted(categories):
        of_category[categories[question]].append(question)
    coins = generator(seed)
    shuffled = [q for category in sorted(of_category) for q in coins.permutation(of_category[category]).tolist()]
    return tuple(sorted(shuffled[0::2])), tuple(sorted(shuffled[1::2]))


def salient(difference: Float[Tensor, "layer neuron"], t: float | None) -> Bool[Tensor, "layer neuron"]:
    """Where D > t * max(D) within one question and site; nowhere if max(D) <= 0 (paper 2.3)."""
    largest = difference.max()
    return difference > (0 if t is None else t) * largest.clamp(min=0) if largest > 0 else difference.isnan()


def _count_salient(scores: ScoreSource, questions: set[int], t: float | None) -> dict[Site, Tensor]:
    counts: dict[Site, Tensor] = {}
    for question, difference in scores.per_question():
        for site, values in difference.items():
            count = counts.setdefault(site, torch.zeros(values.shape, dtype=torch.int32))
            if question in questions:
                count += salient(values, t)
    return counts
