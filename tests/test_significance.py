"""Statistical tests, compared with SciPy and statsmodels."""

from __future__ import annotations

import gc
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from tn_lens.core.sentences import say
from tn_lens.selection.significance import Moments, adjust, one_sided_t_test, welch

RNG = np.random.default_rng(0)


def test_the_t_test_is_scipys() -> None:
    rows = RNG.normal(0.1, 1, (40, 30))
    ours = one_sided_t_test(Moments.of(rows))
    judge = stats.ttest_1samp(rows, 0, alternative="greater")
    np.testing.assert_allclose(ours.statistic, judge.statistic, rtol=1e-12)
    np.testing.assert_allclose(ours.p_value, judge.pvalue, rtol=1e-9)


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 5))
def test_one_pass_and_any_merging_give_the_same_moments(seed: int, n: int, parts: int) -> None:
    rows = np.random.default_rng(seed).normal(5, 3, (n, 4))
    one_pass = Moments.empty(4)
    for row in rows:
        one_pass = one_pass.merge(Moments.of(row[None]))
    merged = Moments.empty(4)
    for part in np.array_split(rows, parts):
        merged = merged.merge(Moments.of(part)) if len(part) else merged
    for found in (one_pass, merged):
        assert found.n == n
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.m2, ((rows - rows.mean(0)) ** 2).sum(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.0, 1e-12])
def test_constant_columns_carry_no_evidence(constant: float) -> None:
    rows = np.full((12, 3), constant)
    rows[:, 1] = RNG.normal(10, 1, 12)
    found = one_sided_t_test(Moments.of(rows))
    assert found.p_value[[0, 2]].tolist() == [1, 1]
    assert found.p_value[1] < 1e-6


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_observations_carry_no_evidence(n: int) -> None:
    moments = Moments.of(np.ones((n, 2))) if n else Moments.empty(2)
    assert one_sided_t_test(moments).p_value.tolist() == [1, 1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_corrections_are_statsmodels(p_values: list[float]) -> None:
    p = np.array(p_values)
    for ours, theirs in (("bonferroni", "bonferroni"), ("holm", "holm"), ("benjamini-hochberg", "fdr_bh")):
        with mock.patch.object(gc, "collect"):  # statsmodels collects garbage in every call, which takes half a second
            judge = multipletests(p, method=theirs)[1]
        np.testing.assert_allclose(adjust(p, ours), judge, rtol=1e-12)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(adjust(p, "none"), p)


@pytest.mark.parametrize("correction", ["bonferroni", "holm", "benjamini-hochberg"])
def test_a_larger_family_counts_the_rest_as_one(correction: str) -> None:
    p = RNG.uniform(0, 0.2, 6)
    padded = adjust(np.concatenate([p, np.ones(94)]), correction)[:6]  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(adjust(p, correction, 100), padded)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="n_tests must be at least the number of p-values, 6; got 3"):
        adjust(p, correction, 3)  # pyright: ignore[reportArgumentType]


def test_no_tests_need_no_correction() -> None:
    for correction in ("bonferroni", "holm", "benjamini-hochberg", "none"):
        assert adjust(np.array([]), correction).tolist() == []


def test_p_values_are_uniform_under_the_null() -> None:
    found = one_sided_t_test(Moments.of(RNG.normal(size=(20, 4000)))).p_value
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_welch_is_scipys_and_survives_constant_conditions() -> None:
    low, high = RNG.normal(0.5, 0.01, 10), RNG.normal(0.6, 0.02, 10)
    assert welch(low, high) == pytest.approx(stats.ttest_ind(low, high, equal_var=False, alternative="less").pvalue)
    assert welch(high, low) > 0.99
    same = np.full(10, 0.5)
    for lower in (same, same - 0.1, same + 0.1):
        assert np.isnan(welch(lower, same)), "nothing varies, so nothing can be tested"
    assert np.isnan(welch(same[:1], same[:1]))
    assert say("evaluation.welch", 0.0213) == "one-sided Welch p = 0.021"
    assert "no Welch test" in say("evaluation.welch", float("nan"))
