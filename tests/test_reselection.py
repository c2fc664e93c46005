"""Other thresholds, splits and orders from the same scores, and the search for t."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tn_lens import (
    Attribution,
    NeuronSet,
    PromptSet,
    QuestionSet,
    Settings,
    attribute,
    build_prompts,
    evaluate,
    manipulation_check,
    select_neurons,
)
from tn_lens.evaluation import tuning as tuning_module
from tn_lens.evaluation.tuning import Tuning, tune_threshold
from tn_lens.figures import plot_sweep
from tn_lens.models import Model
from tn_lens.pipeline.run import again_with_every_order, selection_table
from tn_lens.runs.chunks import PROMPTS_ATTRIBUTED, chunk_key
from tn_lens.runs.context import Run
from tn_lens.runs.folder import SCORES, RunFolder
from tn_lens.selection.stability import found_again, stability, sweep
from tn_lens.selection.stored import StoredScores, pack_scores
from tn_lens.selection.table import Split
from tn_lens.toy.plant import planted


@pytest.fixture(scope="module")
def scores() -> Attribution:
    world = planted(seed=0)
    return attribute(world.model, manipulation_check(world.model, world.prompts).prompts, n_steps=5)


@pytest.fixture(scope="module")
def stored(scores: Attribution, tmp_path_factory: pytest.TempPathFactory) -> StoredScores:
    """The same scores in a run folder."""
    folder = RunFolder.open(tmp_path_factory.mktemp("stored") / "run", {"model": "planted"})
    chunks = scores.prompts.chunks(PROMPTS_ATTRIBUTED)
    assert len(chunks) > 1
    stored = StoredScores(folder, scores.space, chunks, tuple(map(key_of, range(len(chunks)))))
    stored.save_index()
    first = 0
    for index, chunk in enumerate(chunks):
        part = replace(
            scores,
            prompts=chunk,
            difference={s: d[first : first + len(chunk)] for s, d in scores.difference.items()},
            change={s: c[first : first + len(chunk)] for s, c in scores.change.items()},
            n_nodes=None,
        )
        folder.write_chunk(SCORES, index, pack_scores(part), key_of(index))
        first += len(chunk)
    return stored


def key_of(index: int) -> str:
    return chunk_key("scores", index)


def in_one_chunk(scores: Attribution, path: Path) -> StoredScores:
    """Scores as they are stored in a run folder with a single chunk."""
    folder = RunFolder.open(path, {})
    folder.write_chunk(SCORES, 0, pack_scores(scores), key_of(0))
    return StoredScores(folder, scores.space, (scores.prompts,), (key_of(0),))


def test_stored_scores_are_half_precision_of_the_prompts_largest(stored: StoredScores, scores: Attribution) -> None:
    again = StoredScores.load(stored.folder.path)
    assert again.space == scores.space
    assert again.categories == scores.categories
    for (question, rounded), (expected, exact) in zip(again.per_question(), scores.per_question(), strict=True):
        assert question == expected
        for site, values in exact.items():
            torch.testing.assert_close(rounded[site], values, atol=2**-11 * float(values.abs().max()), rtol=0)
    sizes = [stored.folder.chunk(SCORES, i).stat().st_size for i in range(len(stored.chunks))]
    per_score = (sum(sizes) - 8000) / (len(scores) * scores.space.n_neurons)
    assert per_score <= 2 + 8 * 4 * scores.space.n_layers / scores.space.n_neurons, "2 bytes a score and the sums"


def test_tiny_scores_do_not_vanish(scores: Attribution, tmp_path: Path) -> None:
    small = replace(scores, difference={s: d * 1e-9 for s, d in scores.difference.items()})
    stored = in_one_chunk(small, tmp_path / "run")
    expected = select_neurons(scores, adaptive_threshold=0.1).neurons
    assert expected
    assert select_neurons(stored, adaptive_threshold=0.1).neurons == expected


def test_selections_from_disk_are_those_from_memory(stored: StoredScores, scores: Attribution) -> None:
    loaded = StoredScores.load(stored.folder.path)
    for settings in (
        {"adaptive_threshold": 0.1},
        {"adaptive_threshold": 0.3, "share_threshold": 0.6},
        {"adaptive_threshold": 0.02, "correction": "holm"},
        {"family": "all", "seed": 3},
    ):
        assert select_neurons(loaded, **settings).neurons == select_neurons(scores, **settings).neurons


def test_a_sweep_is_every_selection(scores: Attribution) -> None:
    ts, ps = (0.03, 0.1, 0.3), (0.1, 0.4, 0.8)
    table = sweep(scores, ts=ts, ps=ps, seed=4).set_index(["t", "p"])
    for t in ts:
        for p in ps:
            one = select_neurons(scores, adaptive_threshold=t, share_threshold=p, seed=4)
            assert tuple(table.loc[(t, p)]) == (len(one.candidates), len(one.neurons))
    figure = plot_sweep(table.reset_index())
    assert np.array(figure.data[0].text).tolist() == table["n_found"].unstack().to_numpy().tolist()
    with pytest.raises(ValueError, match="'n_found' is missing"):
        plot_sweep(table.reset_index().drop(columns="n_found"))
    with pytest.raises(ValueError, match="not a percentage"):
        sweep(scores, ts=(20.0,))


def test_stability_compares_the_splits(scores: Attribution) -> None:
    stable = stability(scores, seeds=(0, 1, 2), adaptive_threshold=0.1)
    assert stable.jaccards == [1.0] * 3
    assert stable.core == planted(seed=0).truth
    loose = stability(scores, seeds=range(4), adaptive_threshold=0.001, share_threshold=0.1, alpha=None)
    assert 0 < np.mean(loose.jaccards) < 1
    assert loose.core == NeuronSet(set.intersection(*map(set, loose.sets)))
    assert "With 4 splits into halves" in repr(loose)
    with pytest.raises(ValueError, match="at least two seeds"):
        stability(scores, seeds=(1,))


def test_effect_sizes_and_intervals_by_scipy(scores: Attribution) -> None:
    from scipy import stats

    found = select_neurons(scores, adaptive_threshold=0.1)
    half_2 = [i for i, p in enumerate(scores.prompts) if p.question in found.half_2]
    low, high = found.interval()
    for place, neuron in enumerate(found.candidates):
        column = scores.difference[neuron.site][half_2, neuron.layer, scores.space.flat(neuron)].double().numpy()
        assert found.cohens_d[place] == pytest.approx(column.mean() / column.std(ddof=1))
        expected = stats.t.interval(0.95, len(column) - 1, column.mean(), stats.sem(column))
        assert (low[place], high[place]) == pytest.approx(expected)


def test_neurons_of_one_letter_are_not_found_again_in_both_orders(
    toy: Model, toy_questions: QuestionSet, tmp_path: Path
) -> None:
    prompts = build_prompts(toy, toy_questions.part("find").select(range(80)), order="both")
    kept = manipulation_check(toy, prompts).prompts
    scores = attribute(toy, kept, n_steps=3)
    # A neuron that supports A: twice as much as it is weakened by B at its place.
    letters = torch.tensor([1.0 if p.right == 0 else -0.9 for p in kept])
    scores.difference["mlp"][:, 0, 0] = letters * scores.difference["mlp"].amax((1, 2))
    stored = in_one_chunk(scores, tmp_path / "run")
    settings = Settings(adaptive_threshold=0.05)
    selection = select_neurons(stored, adaptive_threshold=0.05)
    table = selection_table(stored, settings)
    assert table.select(0.05, Split(0), selection.rules).neurons == selection.neurons
    once = table.select(0.05, Split(0, drawn=0), selection.rules).neurons
    again = again_with_every_order(table, selection)
    assert again == found_again(once, selection.neurons) == len(once & selection.neurons) / len(once)
    assert again is not None
    assert 0.3 < again <= 1
    assert found_again(NeuronSet(), selection.neurons) is None
    at_a = [row for row, prompt in enumerate(kept) if prompt.right == 0]
    single = replace(
        scores,
        prompts=PromptSet(tuple(kept[row] for row in at_a)),
        difference={site: values[at_a] for site, values in scores.difference.items()},
        change={site: values[at_a] for site, values in scores.change.items()},
        n_nodes=None,
    )
    one_order = selection_table(in_one_chunk(single, tmp_path / "single"), settings)
    assert again_with_every_order(one_order, selection) is None


@pytest.fixture(scope="module")
def ask_once() -> Callable[..., list[torch.Tensor]]:
    """`ask_each` of the search, which asks the tuning questions once for each set of neurons, in all tests together."""
    known: dict[NeuronSet, list[torch.Tensor]] = {}
    real = tuning_module.ask_each

    def ask(model: Model, askings: Any, **options: Any) -> list[torch.Tensor]:
        (asking,) = askings
        if asking.neurons not in known:
            known[asking.neurons] = real(model, askings, **options)
        return known[asking.neurons]

    return ask


@pytest.fixture(scope="module")
def tuned(
    toy: Model, toy_questions: QuestionSet, ask_once: Callable[..., list[torch.Tensor]]
) -> tuple[Tuning, Attribution]:
    check = manipulation_check(toy, build_prompts(toy, toy_questions.part("find"), order="both"))
    scores = attribute(toy, check.prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning_module, "ask_each", ask_once)
        return tune_threshold(toy, scores, toy_questions.part("tune")), scores


def test_the_tuned_t_is_nearly_the_best_on_unseen_questions(
    tuned: tuple[Tuning, Attribution], toy: Model, toy_questions: QuestionSet, tmp_path: Path
) -> None:
    tuning, scores = tuned
    unseen = toy_questions.part("report")

    def ablated(t: float) -> Any:
        neurons = select_neurons(scores, adaptive_threshold=t).neurons
        evaluation = evaluate(toy, unseen, neurons, n_repetitions=2, conditions=("unablated", "ablated"))
        return evaluation.conditions["ablated"]

    with Run(RunFolder.open(tmp_path / "run", {}), progress=False):  # the unablated model is asked once
        chosen, *results = map(ablated, (tuning.t, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3))
    best = min(result.order_averaged_accuracy for result in results if result.answer_mass >= 0.95)
    assert chosen.order_averaged_accuracy <= best + 0.03
    assert len({result.order_averaged_accuracy for result in results}) > 3, "the choice of t matters"


def test_the_search_is_written_down(tuned: tuple[Tuning, Attribution], toy: Model, toy_questions: QuestionSet) -> None:
    tuning, scores = tuned
    assert tuning.steps[0].t == 0.2
    assert tuning.n_questions == len(toy_questions.part("tune"))
    step = next(s for s in tuning.steps if s.t == tuning.t)
    neurons = select_neurons(scores, adaptive_threshold=tuning.t).neurons
    part, names = toy_questions.part("tune"), ("unablated", "ablated")
    conditions = evaluate(toy, part, neurons, n_repetitions=1, conditions=names).conditions
    assert step.order_averaged_accuracy == pytest.approx(conditions["ablated"].order_averaged_accuracy)
    assert tuning.unablated.order_averaged_accuracy == pytest.approx(conditions["unablated"].order_averaged_accuracy)
    assert step.n_found == len(neurons)
    assert Tuning.from_bytes(tuning.to_bytes(".json"), ".json") == tuning
    assert list(tuning.to_frame()["t"]) == sorted((s.t for s in tuning.steps), reverse=True)


def test_thresholds_that_lose_the_instruction_are_not_chosen(
    tuned: tuple[Tuning, Attribution],
    toy: Model,
    toy_questions: QuestionSet,
    ask_once: Callable[..., list[torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If sets of more than 60 neurons lose the answer mass, the best of the other sets is chosen, and the search downwards stops."""
    free, scores = tuned
    most = 60

    def watching(model: Model, askings: Any, **options: Any) -> list[torch.Tensor]:
        (asking,) = askings
        factor = 0.5 if len(asking.neurons) > most else 1.0
        return [answers * factor for answers in ask_once(model, askings, **options)]

    monkeypatch.setattr(tuning_module, "ask_each", watching)
    bound = tune_threshold(toy, scores, toy_questions.part("tune"))
    assert {s.holds for s in bound.steps if s.n_found > 60} == {False}
    chosen = next(s for s in bound.steps if s.t == bound.t)
    assert chosen.n_found <= 60
    assert len(bound.steps) < len(free.steps), "two thresholds in a row without the instruction end the walk down"
    most = 0
    with pytest.raises(ValueError, match="no threshold keeps instruction following"):
        tune_threshold(toy, scores, toy_questions.part("tune"))
