"""Thresholds and a held-out test: from scores to truth neurons (paper 2.2, 2.3)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tn_lens.attribution.result import Scores
from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.core.wording import plural
from tn_lens.neurons.neuron import SITES, Neuron, NeuronSet, NeuronSpace, Site
from tn_lens.selection.significance import Correction, Moments, adjust, half_width, one_sided_t_test, significant

Family = Literal["candidates", "all"]
"""What the correction counts as tested: the candidates that were, or every neuron of the model."""

COLUMNS = ("share", "mean_difference", "std", "t_statistic", "p_value", "p_adjusted", "found")
"""What is known of every candidate."""
SETTINGS = ("t", "p", "alpha", "correction", "family", "seed")
"""What a selection was made with."""
FEW = 20
"""Questions of half 2 below which a test says little."""


@runtime_checkable
class ScoreSource(Protocol):
    """Anything that hands out D question by question: an `Attribution`, or the scores stored in a run folder."""

    @property
    def space(self) -> NeuronSpace: ...
    @property
    def categories(self) -> Mapping[int, str]: ...
    def per_question(self, questions: Set[int] | None = None) -> Iterator[tuple[int, Scores]]: ...


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Selection:
    """The candidates of half 1, their test on half 2, and the neurons that were found."""

    candidates: tuple[Neuron, ...]
    share: Float[np.ndarray, " candidate"]
    """Share of half 1's questions in which the neuron is salient, in [0, 1]."""
    mean_difference: Float[np.ndarray, " candidate"]
    """Mean D over half 2 (paper eq. 9)."""
    std: Float[np.ndarray, " candidate"]
    """Standard deviation of D over half 2 (ddof 1)."""
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
    largest_share: float = float("nan")
    """The largest share of half 1's questions in which any neuron is salient, candidate or not; NaN where not known."""

    @property
    def neurons(self) -> NeuronSet:
        """The truth neurons."""
        return NeuronSet(n for n, found in zip(self.candidates, self.found, strict=True) if found)

    @property
    def cohens_d(self) -> Float[np.ndarray, " candidate"]:
        """Effect size: mean D over its standard deviation; NaN for a constant."""
        return np.divide(self.mean_difference, self.std, out=np.full_like(self.std, np.nan), where=self.std > 0)

    def interval(self, level: float = 0.95) -> tuple[Float[np.ndarray, " candidate"], Float[np.ndarray, " candidate"]]:
        """Two-sided confidence interval of mean D, by Student's t over the questions of half 2."""
        half = half_width(self.std, len(self.half_2), level)
        return self.mean_difference - half, self.mean_difference + half

    def to_frame(self, *, candidates: bool = False) -> pd.DataFrame:
        """One row per found neuron (or per candidate), strongest first; ci is the 95 % interval of mean D."""
        low, high = self.interval()
        frame = pd.DataFrame(
            {
                "site": [n.site for n in self.candidates],
                "layer": [n.layer for n in self.candidates],
                "head": pd.array([n.head for n in self.candidates], dtype="Int64"),
                "index": [n.index for n in self.candidates],
                "mean_difference": self.mean_difference,
                "ci_low": low,
                "ci_high": high,
                "cohens_d": self.cohens_d,
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

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON: one list a column of the candidates."""
        columns = {name: getattr(self, name).tolist() for name in COLUMNS}
        places = {name: [getattr(n, name) for n in self.candidates] for name in ("site", "layer", "head", "index")}
        settings = {name: getattr(self, name) for name in SETTINGS}
        halves = {"half_1": list(self.half_1), "half_2": list(self.half_2)}
        return {
            "space": asdict(self.space),
            **settings,
            **halves,
            "largest_share": self.largest_share,
            "candidates": {**places, **columns},
        }

    @classmethod
    def from_dict(cls, held: Mapping[str, Any]) -> Selection:
        """The inverse of `to_dict`, also after JSON.

        Raises:
            BadInput: a field is missing or does not fit.
        """
        nan = float("nan")
        try:
            columns = held["candidates"]
            places = zip(*(columns[name] for name in ("site", "layer", "head", "index")), strict=True)
            return cls(
                space=NeuronSpace(**held["space"]),
                candidates=tuple(Neuron(*place) for place in places),
                **{name: np.array(columns[name], dtype=np.float64) for name in COLUMNS if name != "found"},
                found=np.array(columns["found"], dtype=bool),
                half_1=tuple(held["half_1"]),
                half_2=tuple(held["half_2"]),
                **{name: held[name] for name in SETTINGS},
                largest_share=nan if (share := held.get("largest_share")) is None else float(share),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"expected a selection as tn_lens writes it, and {error} is missing or of another kind; run the same "
                "command again to write it anew"
            ) from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def summary(self) -> str:
        """One sentence."""
        n, n_candidates, n_1, n_2 = map(len, (self.neurons, self.candidates, self.half_1, self.half_2))
        return (
            f"{n} truth {plural('neuron', n)} of {self.space.n_neurons:,} (t = {_percent(self.t)}, p = {_percent(self.p)}, "
            f"{n_candidates} {plural('candidate', n_candidates)} from {n_1} {plural('question', n_1)}, tested on {n_2} {plural('other', n_2)})."
        )

    def nothing_found(self) -> str:
        """Where nothing was found, which filter stopped it and what to try, in two sentences; empty elsewhere."""
        if self.neurons:
            return ""
        n, n_1, n_2 = map(len, (self.candidates, self.half_1, self.half_2))
        said = "No truth neurons were found"
        if self.alpha is not None and n_2 < 2:
            return (
                f"{said}: only {n_1 + n_2} {plural('question', n_1 + n_2)} passed the check, so that half 2 has {n_2 or 'none'}, and a "
                "test needs two at least. Ask more questions (no --limit, or a larger one)."
            )
        if not n and self.largest_share == 0:
            then = "" if self.p is None else f" (p then asks for it in {_percent(self.p)} of the questions)"
            return (
                f"{said}: t stopped all, as no neuron's D exceeds t = {_percent(self.t)} of the largest in any question of "
                f"half 1. Try a lower t{then}."
            )
        if not n:
            most = (
                f"the most frequent neuron is salient (t = {_percent(self.t)}) in {100 * self.largest_share:.0f} %"
                if self.largest_share == self.largest_share
                else f"no neuron is salient (t = {_percent(self.t)}) in as many"
            )
            return (
                f"{said}: p stopped all, as {most} of the questions of half 1, and p asks for {_percent(self.p)}. "
                "Try a lower p, or a lower t."
            )
        few = f", and {n_2} {plural('question', n_2)} are few" if n_2 < FEW else ""
        return (
            f"{said}: the test stopped all, as of {n} {plural('candidate', n)} none passed it on the {n_2} questions of half 2 "
            f"(smallest corrected p {self.p_adjusted.min():.2g}, alpha {self.alpha:g}{few}). A model that does not know the "
            "answers has none to find; otherwise try more questions, or a lower t or p, which let in other candidates."
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
    check_thresholds(t=t, p=p, alpha=alpha, family=family)
    if not scores.categories:
        raise BadInput("there are no scores to select from: no question was attributed")
    half_1, half_2 = split_halves(scores.categories, seed)
    (counts,) = count_salient(scores, set(half_1), [t])
    least = least_count(p, len(half_1))
    chosen: dict[Site, Tensor] = {
        site: (count >= least).flatten().nonzero().flatten() for site, count in counts.items()
    }
    most = max((int(count.max()) for count in counts.values() if count.numel()), default=0)
    moments = moments_of(scores, set(half_2), chosen)
    test = one_sided_t_test(moments)
    adjusted = adjust(test.p_value, correction, None if family == "candidates" else scores.space.n_neurons)
    return Selection(
        candidates=neurons_at(scores.space, chosen),
        share=np.concatenate([(counts[s].flatten()[at] / len(half_1)).double().numpy() for s, at in chosen.items()]),
        mean_difference=moments.mean,
        std=moments.standard_error * np.sqrt(moments.n),
        t_statistic=test.statistic,
        p_value=test.p_value,
        p_adjusted=adjusted,
        found=np.ones(len(adjusted), dtype=bool) if alpha is None else significant(adjusted, alpha),
        space=scores.space,
        half_1=half_1,
        half_2=half_2,
        t=t,
        p=p,
        alpha=alpha,
        correction=correction,
        family=family,
        seed=seed,
        largest_share=most / max(len(half_1), 1),
    )


def check_thresholds(*, t: float | None, p: float | None, alpha: float | None, family: str = "candidates") -> None:
    """Refuse what no selection can be made with.

    Raises:
        BadInput: a threshold outside its range, or an unknown family.
    """
    for name, value in (("t", t), ("p", p)):
        if value is not None and not 0 < value <= 1:
            raise BadInput(f"the threshold {name} must lie in (0, 1], a fraction and not a percentage; got {value}")
    if alpha is not None and not 0 < alpha < 1:
        raise BadInput(f"alpha must lie in (0, 1); got {alpha}")
    if family not in get_args(Family):
        raise BadInput(f"expected family 'candidates' or 'all', got {family!r}")


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


def least_count(p: float | None, n_questions: int) -> int:
    """In how many of the questions a candidate is salient at least."""
    return 1 if p is None else max(1, int(np.ceil(p * n_questions - 1e-9)))


def count_salient(
    scores: ScoreSource, questions: Set[int], ts: Sequence[float | None]
) -> list[dict[Site, Int[Tensor, "layer neuron"]]]:
    """In how many of the questions every neuron is salient, for each threshold, in one pass over the scores."""
    counts: list[dict[Site, Tensor]] = [
        {s: torch.zeros(scores.space.n_layers, w, dtype=torch.int32) for s in SITES if (w := scores.space.width(s))}
        for _ in ts
    ]
    for _, difference in scores.per_question(questions):
        for t, of_site in zip(ts, counts, strict=True):
            for site in of_site:
                of_site[site] += salient(difference[site], t)
    return counts


def moments_of(scores: ScoreSource, questions: Set[int], places: Mapping[Site, Int[Tensor, " _"]]) -> Moments:
    """Mean and spread of D of some neurons (flat places, layer after layer) over the questions."""
    moments = Moments.empty(sum(map(len, places.values())))
    for _, difference in scores.per_question(questions):
        row = [difference[site].flatten()[at].double() for site, at in places.items()]
        moments = moments.add(torch.cat(row).numpy())
    return moments


def neurons_at(space: NeuronSpace, places: Mapping[Site, Int[Tensor, " _"]]) -> tuple[Neuron, ...]:
    """The neurons at flat places."""
    return tuple(space.neuron(s, *divmod(flat, space.width(s))) for s, at in places.items() for flat in at.tolist())


def _percent(threshold: float | None) -> str:
    return "off" if threshold is None else f"{100 * threshold:.{0 if threshold >= 0.01 else 2}f} %"
