"""The result of a selection: candidates, their test, and the neurons that were found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats

from tn_lens.core.options import Correction, Family
from tn_lens.core.sentences import say
from tn_lens.core.stored import Stored
from tn_lens.neurons import Neuron, NeuronSet, NeuronSpace
from tn_lens.selection.significance import half_width

FEW = 20
"""Number of questions in half 2 below which a test has too little power."""
PLACE = ["site", "layer", "head", "index"]
"""Columns that identify a neuron."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The settings of a selection other than the adaptive threshold and the split."""

    share_threshold: float | None = 0.4
    alpha: float | None = 0.05
    correction: Correction = "bonferroni"
    family: Family = "candidates"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Selection(Stored):
    """The candidates of half 1, their test on half 2, and the neurons that were found."""

    candidates: tuple[Neuron, ...]
    share: Float[np.ndarray, " candidate"]
    """Fraction of the questions of half 1 in which the neuron is salient, in [0, 1]."""
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
    """Whether a candidate passed the test."""
    space: NeuronSpace
    half_1: tuple[str, ...]
    """Ids of the questions from which the candidates were chosen."""
    half_2: tuple[str, ...]
    """Ids of the questions on which the candidates were tested."""
    adaptive_threshold: float | None
    """t, a fraction of the largest D."""
    share_threshold: float | None
    """p, a fraction of the questions."""
    alpha: float | None
    correction: Correction
    family: Family
    seed: int
    largest_share: float = float("nan")
    """The largest fraction of half 1 in which any neuron is salient, candidate or not; NaN if unknown."""
    excluded: NeuronSet = field(default_factory=NeuronSet)
    """Neurons that passed the test and were left out because they are damage neurons."""
    n_tested: int | None = None
    """Number of observations in the test: questions of half 2, of which those with the same text count as one; None if unknown."""

    @property
    def rules(self) -> Rules:
        """The settings of the selection other than t and the split."""
        return Rules(**{field.name: getattr(self, field.name) for field in fields(Rules)})

    @property
    def neurons(self) -> NeuronSet:
        """The truth neurons: the candidates that passed the test, without those left out."""
        passed = (n for n, found in zip(self.candidates, self.found, strict=True) if found)
        return NeuronSet(n for n in passed if n not in self.excluded)

    def without(self, neurons: NeuronSet) -> Selection:
        """The selection without some of the found neurons, which it lists as `excluded`."""
        return replace(self, excluded=NeuronSet(self.excluded | (neurons & self.neurons)))

    @property
    def by_strength(self) -> list[Neuron]:
        """The found neurons by mean D, the highest first."""
        neurons = self.neurons
        return [self.candidates[i] for i in self._ranked() if self.candidates[i] in neurons]

    @property
    def cohens_d(self) -> Float[np.ndarray, " candidate"]:
        """Effect size: mean D over its standard deviation; NaN if D is constant."""
        return np.divide(self.mean_difference, self.std, out=np.full_like(self.std, np.nan), where=self.std > 0)

    @property
    def least_effect(self) -> float:
        """The smallest Cohen's d that passes the test, after Bonferroni's correction or in the first step of Holm's."""
        n_tests, n = len(self.candidates), self._n_tested
        if self.correction == "none":
            n_tests = 1
        elif self.family == "all":
            n_tests = self.space.n_neurons
        return float(stats.t.isf((self.alpha or 0) / n_tests, n - 1) / np.sqrt(n))

    def interval(self, level: float = 0.95) -> tuple[Float[np.ndarray, " candidate"], Float[np.ndarray, " candidate"]]:
        """Two-sided confidence interval of mean D, by Student's t over the questions of half 2."""
        half = half_width(self.std, self._n_tested, level)
        return self.mean_difference - half, self.mean_difference + half

    def to_frame(self, *, candidates: bool = False) -> pd.DataFrame:
        """One row per found neuron (or per candidate), strongest first; ci is the 95 % interval of mean D."""
        low, high = self.interval()
        places = pd.DataFrame([asdict(neuron) for neuron in self.candidates], columns=PLACE)
        # only attention neurons have a head, so the column has a nullable dtype
        frame = places.astype({"head": "Int64"}).assign(
            mean_difference=self.mean_difference,
            ci_low=low,
            ci_high=high,
            cohens_d=self.cohens_d,
            t_statistic=self.t_statistic,
            p_value=self.p_value,
            p_adjusted=self.p_adjusted,
            share=self.share,
            found=self.found,
        )
        frame = frame.iloc[self._ranked()]
        if not candidates:
            neurons = self.neurons
            is_left = np.array([self.candidates[i] in neurons for i in frame.index], dtype=bool)
            frame = frame[is_left].drop(columns="found")
        return frame.reset_index(drop=True)

    def statistics(self) -> dict[Neuron, dict[str, Any]]:
        """Every candidate's row of `to_frame(candidates=True)` without the columns that identify it, strongest first."""
        frame = self.to_frame(candidates=True).drop(columns=PLACE)
        return {self.candidates[i]: row for i, row in zip(self._ranked(), frame.to_dict("records"), strict=True)}  # pyright: ignore[reportReturnType]

    def to_records(self) -> list[dict[str, Any]]:
        """`to_frame` as plain values for JSON; the head of an MLP neuron is None."""
        statistics = self.statistics()
        rows = [asdict(neuron) | statistics[neuron] for neuron in self.by_strength]
        return [{key: value for key, value in row.items() if key != "found"} for row in rows]

    @property
    def _n_tested(self) -> int:
        return len(self.half_2) if self.n_tested is None else self.n_tested

    def _ranked(self) -> list[int]:
        """Indices of the candidates by mean D, the highest first."""
        # stable, so that ties keep the order of the candidates
        return np.argsort(-self.mean_difference, kind="stable").tolist()

    def summary(self) -> str:
        """Summary in one sentence."""
        return say("selection.summary", self)

    def nothing_found(self) -> str:
        """If no neurons were found, the filter that excluded them and what to try instead; otherwise empty."""
        return say("selection.nothing_found", self, FEW)

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.summary())}</p>{self.to_frame().head(20).to_html()}"
