"""Thresholds and halves, compared with values computed by hand."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tn_lens import Neuron, NeuronSet, Selection, select_neurons
from tn_lens.attribution.result import OfOrders, ScoreSource
from tn_lens.neurons import NeuronSpace
from tn_lens.selection.table import salient, split_halves

SPACE = NeuronSpace(n_layers=2, d_mlp=2, n_heads=1, d_head=1)


@dataclass(frozen=True)
class Table(ScoreSource):
    """Scores given as a table: question x (layer x neuron) of the MLP."""

    rows: torch.Tensor
    space: NeuronSpace = SPACE

    @property
    def categories(self) -> dict[str, str]:
        return one_category(len(self.rows))

    def each_question(self, questions: Collection[str] | None = None) -> Iterator[tuple[str, OfOrders]]:
        for question, row in zip(self.categories, self.rows, strict=True):
            if questions is None or question in questions:
                yield question, self.scores_of(row)

    def scores_of(self, row: torch.Tensor) -> OfOrders:
        return {"mlp": row.reshape(1, 2, 2), "attn": torch.zeros(1, 2, 1)}

    def at(self, neurons: Iterable[Neuron]) -> torch.Tensor:
        raise NotImplementedError


def one_category(n_questions: int) -> dict[str, str]:
    return {str(question): "all" for question in range(n_questions)}


def rows_of(half: tuple[str, ...]) -> list[int]:
    return list(map(int, half))


def neurons(*flat: int) -> NeuronSet:
    return NeuronSet(Neuron("mlp", i // 2, None, i % 2) for i in flat)


def test_a_table_by_hand() -> None:
    """3 questions of half 1 by 4 neurons; t = 0.5, so salient is D > half of the row's largest."""
    half_1 = torch.tensor(
        [
            [1.0, 0.6, 0.5, -1.0],  # threshold 0.5: neurons 0 and 1; 2 is at it, not above
            [0.2, 2.0, 1.1, 0.1],  # threshold 1: neurons 1 and 2
            [0.9, 0.1, -0.2, 0.8],  # threshold 0.45: neurons 0 and 3
        ]
    )
    rows = torch.zeros(6, 4)
    first, second = split_halves(one_category(6), 0)
    rows[rows_of(first)] = half_1
    rows[rows_of(second)] = half_1.flip(0)
    found = select_neurons(Table(rows), adaptive_threshold=0.5, share_threshold=0.5, alpha=None)
    assert NeuronSet(found.candidates) == neurons(0, 1)
    np.testing.assert_allclose(found.share, [2 / 3, 2 / 3])
    assert NeuronSet(
        select_neurons(Table(rows), adaptive_threshold=0.5, share_threshold=1 / 3, alpha=None).candidates
    ) == neurons(0, 1, 2, 3)
    assert (
        NeuronSet(select_neurons(Table(rows), adaptive_threshold=0.5, share_threshold=1.0, alpha=None).candidates)
        == neurons()
    )
    assert found.half_1 == first
    np.testing.assert_allclose(found.mean_difference, half_1.mean(0)[:2], rtol=1e-6)


def test_a_share_exactly_at_p_is_enough() -> None:
    """2 of 5 questions are 40 %, and 0.4 * 5 is 2 also in floating point."""
    rows = torch.zeros(10, 4)
    first, _ = split_halves(one_category(10), 0)
    rows[:, 3] = 1.0
    rows[rows_of(first[:2]), 0] = 0.9
    assert neurons(0) <= NeuronSet(
        select_neurons(Table(rows), adaptive_threshold=0.5, share_threshold=0.4, alpha=None).candidates
    )
    assert not neurons(0) <= NeuronSet(
        select_neurons(Table(rows), adaptive_threshold=0.5, share_threshold=0.41, alpha=None).candidates
    )


def test_nothing_is_salient_where_the_largest_is_not_positive() -> None:
    assert not salient(torch.tensor([[-1.0, -2.0]]), 0.2).any()
    assert not salient(torch.tensor([[0.0, -2.0]]), 0.2).any()
    assert not salient(torch.zeros(2, 2), None).any()
    assert salient(torch.tensor([[1.0, 0.1, -1.0]]), None).tolist() == [[True, True, False]]


def test_all_p_values_one_and_no_candidates_find_nothing() -> None:
    constant = torch.ones(8, 4)
    found = select_neurons(Table(constant))
    assert found.p_value.tolist() == [1] * 4
    assert not found.neurons
    empty = select_neurons(Table(-constant))
    assert empty.candidates == ()
    assert not empty.neurons
    assert len(empty.to_frame()) == 0
    assert "0 truth neurons" in empty.summary()


def test_one_question_cannot_be_tested() -> None:
    found = select_neurons(Table(torch.tensor([[1.0, 0.0, 0.0, 0.0]])))
    assert NeuronSet(found.candidates) == neurons(0)
    assert not found.neurons


def test_where_nothing_is_found_the_filter_that_stopped_it_is_named() -> None:
    rows = torch.eye(4).repeat(4, 1)  # every neuron is the largest in a quarter of the questions
    generator = torch.Generator().manual_seed(0)

    def said(t: float, p: float, table: torch.Tensor = rows) -> str:
        found = select_neurons(Table(table), adaptive_threshold=t, share_threshold=p)
        again = Selection.from_bytes(found.to_bytes(".json"), ".json")
        assert again.nothing_found() == found.nothing_found()
        return found.nothing_found()

    by_t = said(1.0, 0.4)
    assert "no candidates: in no question of half 1 does any neuron's D exceed t = 100 % of the largest" in by_t
    first, _ = split_halves(one_category(16), 0)
    most = max(sum(question % 4 == neuron for question in rows_of(first)) for neuron in range(4))
    by_p = said(0.5, 0.9)
    assert f"the neuron that is salient most often (t = 50 %) is salient in {100 * most / 8:.0f} % of" in by_p
    assert "p requires 90 %. Try a lower p or a lower t." in by_p
    noise = torch.randn(16, 4, generator=generator)
    by_test = said(0.01, 0.1, noise)
    assert "none of 4 candidates passed the test on 8 questions of half 2" in by_test
    assert "with so few questions the test has little power" in by_test
    few = said(0.01, 0.1, torch.ones(2, 4))
    assert "only 2 questions passed the check, so half 2 has 1, and the test needs at least two" in few
    assert "lower" not in few
    assert (
        select_neurons(Table(torch.ones(40, 4) + 0.1 * torch.randn(40, 4, generator=generator))).nothing_found() == ""
    )


def test_a_selection_of_an_older_file_does_not_know_the_largest_share() -> None:
    found = select_neurons(Table(torch.eye(4).repeat(4, 1)), adaptive_threshold=0.5, share_threshold=0.9)
    stored = json.loads(found.to_bytes(".json"))
    del stored["largest_share"]
    older = Selection.from_bytes(json.dumps(stored).encode(), ".json")
    assert (
        "no neuron is salient (t = 50 %) in as many questions of half 1 as p = 90 % requires" in older.nothing_found()
    )


def test_a_model_of_one_neuron() -> None:
    @dataclass(frozen=True)
    class One(Table):
        def scores_of(self, row: torch.Tensor) -> OfOrders:
            return {"mlp": row[None, None]}

    rows = torch.tensor([[0.9], [1.0], [1.1], [1.2], [0.8], [1.05]])
    only = NeuronSpace(n_layers=1, d_mlp=1, n_heads=0, d_head=1, sites=("mlp",))
    assert select_neurons(One(rows, only)).neurons == NeuronSet([Neuron("mlp", 0, None, 0)])
    assert not select_neurons(One(-rows, only)).neurons


def test_ties_are_all_salient() -> None:
    assert salient(torch.tensor([[3.0, 3.0, 3.0]]), 0.99).all()
    assert not salient(torch.tensor([[3.0, 3.0, 3.0]]), 1.0).any(), "strictly above t * max(D)"


def test_a_consistent_neuron_is_found_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 4, generator=generator)
    rows[:, 2] = 1 + 0.3 * torch.randn(200, generator=generator)
    assert select_neurons(Table(rows), adaptive_threshold=0.2, share_threshold=0.4).neurons == neurons(2)
    assert select_neurons(Table(rows), adaptive_threshold=0.2, share_threshold=0.4, family="all").neurons == neurons(2)
    assert len(select_neurons(Table(rows), adaptive_threshold=0.2, share_threshold=0.3, alpha=None).neurons) > 1


@pytest.mark.parametrize(
    "bad",
    [
        {"adaptive_threshold": 0.0},
        {"adaptive_threshold": 20},
        {"adaptive_threshold": float("nan")},
        {"share_threshold": -0.1},
        {"share_threshold": 1.01},
        {"alpha": 0.0},
        {"alpha": 1.0},
    ],
)
def test_thresholds_outside_their_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(bad))}.* must (lie|be a fraction) in \(0, 1"):
        select_neurons(Table(torch.ones(4, 4)), **{key: float(value) for key, value in bad.items()})


def test_no_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="no scores"):
        select_neurons(Table(torch.ones(0, 4)))


@given(st.dictionaries(st.integers(0, 300).map(str), st.sampled_from("abcdef"), min_size=1), st.integers(0, 1000))
def test_halves_are_disjoint_stratified_and_replayable(categories: dict[str, str], seed: int) -> None:
    first, second = split_halves(categories, seed)
    assert set(first) | set(second) == set(categories)
    assert not set(first) & set(second)
    assert 0 <= len(first) - len(second) <= 1
    for name in set(categories.values()):
        sizes = [sum(categories[q] == name for q in half) for half in (first, second)]
        assert abs(sizes[0] - sizes[1]) <= 1
    assert split_halves(categories, seed) == (first, second)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60), st.integers(0, 100))
def test_equal_questions_are_in_one_half(groups: list[str], seed: int) -> None:
    categories = {str(place): "xy"[place % 2] for place in range(len(groups))}
    equal = {str(place): group for place, group in enumerate(groups) if groups.count(group) > 1}
    first, second = split_halves(categories, seed, equal)
    assert not {equal.get(q, q) for q in first} & {equal.get(q, q) for q in second}
    assert sorted([*first, *second], key=int) == list(categories)
    assert abs(len(first) - len(second)) <= max(map(groups.count, groups))
    assert list(first) == sorted(first, key=int)


def test_the_halves_of_different_questions_have_not_changed() -> None:
    """Drawn when groups of equal questions were not known yet."""
    categories = {str(place): "cab"[place % 3] for place in range(11)}
    halves = (("0", "2", "4", "8", "9", "10"), ("1", "3", "5", "6", "7"))
    assert split_halves(categories, 3) == split_halves(categories, 3, {}) == halves


def test_one_question_asked_many_times_makes_no_neuron_significant() -> None:
    """Four questions of noise, 30 times each: copies are neither in both halves nor several observations."""
    noise = 0.01 * torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).repeat(30, 1) + noise
    groups = [f"{row % 4}" for row in range(120)]

    @dataclass(frozen=True)
    class Repeated(Table):
        @property
        def equal(self) -> dict[str, str]:
            return dict(zip(self.categories, groups, strict=True))

    assert select_neurons(Table(rows), adaptive_threshold=0.2).neurons, "as 120 questions, some would pass"
    found = select_neurons(Repeated(rows), adaptive_threshold=0.2, share_threshold=None)
    assert found.candidates
    assert not found.neurons
    assert not {int(q) % 4 for q in found.half_1} & {int(q) % 4 for q in found.half_2}
    assert (len(found.half_2), found.n_tested) == (60, 2)
    means = rows.reshape(30, 4, 4).mean(0)[sorted({int(q) % 4 for q in found.half_2})]
    columns = [2 * neuron.layer + neuron.index for neuron in found.candidates]
    expected = stats.ttest_1samp(means.double().numpy()[:, columns], 0, alternative="greater")
    np.testing.assert_allclose(found.p_value, expected.pvalue, rtol=1e-4)
    low, _ = found.interval(0.9)
    np.testing.assert_allclose(low, expected.confidence_interval(0.95).low, rtol=1e-4)
    groups[:] = ["same"] * 120
    found = select_neurons(Repeated(rows), adaptive_threshold=0.2)
    assert not found.neurons
    assert "120 questions that passed the check have too few different texts" in found.nothing_found()
