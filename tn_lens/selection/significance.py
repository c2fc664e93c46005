"""Statistical tests and moments of NumPy arrays, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from tn_lens.core.errors import BadInput
from tn_lens.core.options import Correction

LEVEL = 0.05
"""Significance level of the tests between conditions; accuracies whose p-value is below it are marked with a star."""

Array = np.ndarray


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of each column, computed in one pass and mergeable."""

    n: int
    mean: Float[Array, " column"]
    m2: Float[Array, " column"]

    @classmethod
    def empty(cls, n_columns: int) -> Moments:
        """The moments of no observations."""
        return cls(0, np.zeros(n_columns), np.zeros(n_columns))

    @classmethod
    def of(cls, rows: Float[Array, "row column"]) -> Moments:
        """The moments of the given rows."""
        mean = rows.mean(0, dtype=np.float64)
        return cls(len(rows), mean, ((rows - mean) ** 2).sum(0))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows together (Chan et al. 1979)."""
        n = self.n + other.n
        if not self.n or not other.n:
            return other if not self.n else self
        delta = other.mean - self.mean
        mean = self.mean + delta * other.n / n
        return type(self)(n, mean, self.m2 + other.m2 + delta**2 * self.n * other.n / n)

    def columns(self, chosen: Bool[Array, " column"]) -> Moments:
        """The moments of the chosen columns."""
        return type(self)(self.n, self.mean[chosen], self.m2[chosen])

    @property
    def standard_error(self) -> Float[Array, " column"]:
        """Standard error of the mean; NaN for fewer than two observations."""
        if self.n < 2:
            return np.full_like(self.mean, np.nan)
        return np.sqrt(self.m2 / (self.n - 1) / self.n)


class TTest(NamedTuple):
    """The results of one test per column."""

    statistic: Float[Array, " column"]
    p_value: Float[Array, " column"]


def one_sided_t_test(moments: Moments) -> TTest:
    """Student's t-test of each column's mean against 0, alternative "greater" (paper eq. 10).

    For constant columns, and for fewer than two observations, t = 0 and p = 1.
    """
    error = moments.standard_error
    # rounding errors of a constant column must not count as variance
    scale = np.abs(moments.mean) * np.finfo(np.float64).eps * 8
    usable = np.isfinite(error) & (error * np.sqrt(max(moments.n, 1)) > scale)
    statistic = np.divide(moments.mean, error, out=np.zeros_like(moments.mean), where=usable)
    p_value = np.where(usable, stats.t.sf(statistic, max(moments.n - 1, 1)), 1.0)
    return TTest(statistic, p_value)


def adjust(p_value: Float[Array, " test"], correction: Correction, n_tests: int | None = None) -> Float[Array, " test"]:
    """Adjusted p-values, to be compared directly with alpha.

    Args:
        p_value: uncorrected p-values of the tests that were made.
        correction: `"bonferroni"` (paper 2.2), `"holm"`, `"benjamini-hochberg"` or `"none"`.
        n_tests: size of the family if it is larger than the number of p-values; the remaining tests count as p = 1.

    Raises:
        BadInput: the correction is unknown, or n_tests is smaller than the number of p-values.
    """
    n = len(p_value) if n_tests is None else n_tests
    if n < len(p_value):
        raise BadInput(f"n_tests must be at least the number of p-values, {len(p_value)}; got {n}")
    order = np.argsort(p_value, kind="stable")
    rank = np.arange(1, len(p_value) + 1)
    match correction:
        case "none":
            return p_value.copy()
        case "bonferroni":
            return np.minimum(p_value * n, 1.0)
        case "holm":
            # step down: no adjusted p-value is smaller than that of a smaller p-value
            ordered = np.maximum.accumulate(p_value[order] * (n - rank + 1))
        case "benjamini-hochberg":
            # step up, from the largest p-value
            ordered = np.minimum.accumulate((p_value[order] * n / rank)[::-1])[::-1]
        case _:
            raise BadInput(f"unknown correction {correction!r}: expected {', '.join(get_args(Correction))}")
    adjusted = np.empty_like(p_value)
    adjusted[order] = np.minimum(ordered, 1.0)
    return adjusted


def welch(lower: Float[Array, " repetition"], higher: Float[Array, " repetition"]) -> float:
    """p-value of the one-sided Welch t-test that the mean of `lower` is below that of `higher` (paper 3.3).

    With fewer than two repetitions, or if all repetitions are equal, there is no variance to compare: p is NaN.
    """
    if min(len(lower), len(higher)) < 2:
        return float("nan")
    if np.ptp(lower) == 0 and np.ptp(higher) == 0:
        return float("nan")
    moments = [moment for sample in (lower, higher) for moment in (sample.mean(), sample.std(ddof=1), len(sample))]
    _, p_value = stats.ttest_ind_from_stats(*moments, equal_var=False, alternative="less")
    return float(np.asarray(p_value))


def half_width(std: Float[Array, " column"], n: int, level: float = 0.95) -> Float[Array, " column"]:
    """Half the width of a confidence interval of a mean, by Student's t; NaN for fewer than two observations."""
    return stats.t.ppf((1 + level) / 2, max(n - 1, 1)) * std / np.sqrt(n) if n > 1 else np.full_like(std, np.nan)
