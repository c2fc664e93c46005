"""Answers, the manipulation check, and the effect of ablation on accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pandas.testing import assert_frame_equal
from scipy import stats

from tests.conftest import PAPER_MODELS, needs_hooked
from tn_lens import (
    Intervention,
    Mean,
    NeuronSet,
    Prompt,
    PromptSet,
    Resample,
    Scale,
    Zero,
    build_prompts,
    dose_response,
    evaluate,
    load_model,
    load_questions,
    manipulation_check,
)
from tn_lens.evaluation.controls import random_neurons
from tn_lens.evaluation.evaluate import ALL_CONDITIONS
from tn_lens.evaluation.reference import PAPER
from tn_lens.evaluation.result import Evaluation
from tn_lens.evaluation.tables import group_means, table1, table2
from tn_lens.evaluation.text import plain_texts, text_loss
from tn_lens.inference.answers import Asking, ask, ask_each, ask_with
from tn_lens.inference.forward import LEAST_TOKENS, PADDING, batches
from tn_lens.inference.interventions import INTERVENTIONS
from tn_lens.inference.manipulation import is_right
from tn_lens.inference.trees import PASS_TOKENS, Grove, groves
from tn_lens.models import Model, backend_of, build_model, neuron_space
from tn_lens.questions.question import Question, QuestionSet
from tn_lens.questions.toy import binary, four_choice


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_batches_equal_one_by_one(name: str, tiny: Callable[..., Model]) -> None:
    model = tiny(name, torch.float32)
    prompts = build_prompts(model, binary()[:12], order="both")
    assert len({len(p.token_ids) for p in prompts}) > 1, "lengths differ, so that rows are padded"
    together = ask(model, prompts)
    alone = torch.cat([ask(model, [prompt]) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    for prompt, row in zip(prompts, together, strict=True):
        logits = model(torch.tensor([prompt.token_ids]))[0, -1]
        by_hand = [float(logits.softmax(-1)[list(ids)].sum()) for ids in prompt.label_ids]
        np.testing.assert_allclose(row.tolist(), by_hand, atol=1e-4)


def test_padding_on_the_wrong_side_would_be_seen(tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Llama-3.1-8B-Instruct", torch.float32)
    prompts = build_prompts(model, binary()[:12], order="both")
    right = ask(model, prompts)

    def left(rows: list[tuple[int, ...]]) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])

    monkeypatch.setattr("tn_lens.inference.forward.pad_right", left)
    assert (ask(model, prompts) - right).abs().max() > 1e-3


SHAPED = [pytest.param(name, marks=needs_hooked) for name in ("gpt2", "neo", "neox", "gemma2")]


@pytest.mark.parametrize("name", [*PAPER_MODELS, *SHAPED])
def test_a_shared_prefix_equals_whole_prompts(
    name: str, tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name, torch.float32) if name in PAPER_MODELS else shaped(name)
    rows = torch.randint(4, 280, (32, 30), generator=torch.Generator().manual_seed(3)).tolist()
    openings = [rows[0][:12], rows[1][:20], rows[2][:12]]
    tokens = [[*openings[i % 3], *row[: 5 + i % 9]] for i, row in enumerate(rows)]
    prompts = [
        Prompt(token_ids=tuple(ids), label_ids=((5, 6), (7,)), right=0, question=str(i), start=len(ids) - 4)
        for i, ids in enumerate(tokens)
    ]
    # if a further pass costs little, the openings are run before the trees that share them
    monkeypatch.setitem(PASS_TOKENS, "cpu", 4)
    assert sorted(len(grove.prefix) for grove in groves(tuple(prompts), "cpu", 39)) == [12, 12, 20]
    neurons = random_neurons(neuron_space(model), 40, NeuronSet(), np.random.default_rng(1))
    interventions: list[tuple[NeuronSet, Intervention]] = [
        (NeuronSet(), Zero()),
        (neurons, Zero()),
        (neurons, Scale(factor=3.0, positions="last")),
        (neurons, Mean(positions="question")),
    ]
    for acted_on, intervention in interventions:
        how: dict[str, Any] = {"neurons": acted_on, "intervention": intervention}
        shared = ask(model, prompts, **how)
        whole = ask(model, prompts, share_prefix=False, **how)
        torch.testing.assert_close(shared, whole, atol=1e-4, rtol=0)
        small = ask(model, prompts, max_tokens=39, **how)
        torch.testing.assert_close(shared, small, atol=1e-4, rtol=0)


def shaped(name: str) -> Model:
    """A random model with another kind of attention: learned positions, local windows, parallel blocks."""
    common = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_head": 8, "d_vocab": 283, "n_ctx": 64, "device": "cpu"}
    styles: dict[str, dict] = {
        "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN"},
        "neo": {
            "act_fn": "gelu_new",
            "normalization_type": "LN",
            "use_local_attn": True,
            "attn_types": ["global", "local"],
            "window_size": 6,
        },
        "neox": {
            "act_fn": "gelu",
            "normalization_type": "LN",
            "positional_embedding_type": "rotary",
            "rotary_dim": 4,
            "parallel_attn_mlp": True,
        },
        "gemma2": {
            "act_fn": "gelu_pytorch_tanh",
            "normalization_type": "RMS",
            "positional_embedding_type": "rotary",
            "rotary_dim": 8,
            "gated_mlp": True,
            "use_normalization_before_and_after": True,
            "attn_scores_soft_cap": 50.0,
            "output_logits_soft_cap": 30.0,
            "use_local_attn": True,
            "attn_types": ["local", "global"],
            "window_size": 5,
        },
    }
    return build_model({**common, "init_weights": True, "d_mlp": 48, **styles[name]})


def test_prompts_with_nothing_in_common_are_run_whole() -> None:
    prompts = [Prompt(token_ids=(i, 1, 2), label_ids=((5,), (7,)), right=0, question=str(i)) for i in range(40)]
    (grove,) = groves(tuple(prompts))
    assert (grove.prefix, grove.n_tokens) == ((), 120)
    assert groves(()) == ()


def test_every_beginning_is_run_once() -> None:
    """Completions of several templates: a template is run once, and nothing is padded."""
    templates = [(1, 10 + n, 20 + n, *range(30, 30 + n % 2)) for n in range(6)]
    rows = [(*template, 100 + subject, 2) for template in templates for subject in range(3)]
    prompts = tuple(replace(prompt(n, 0), token_ids=ids) for n, ids in enumerate(rows))
    (grove,) = groves(prompts)
    (tree,) = grove.trees
    assert len(tree) == 1 + sum(len(template) - 1 for template in templates) + 2 * 18
    # the last position of a prompt is not shared with a longer prompt
    (tree,) = groves((replace(prompt(0, 0), token_ids=(1, 2)), replace(prompt(1, 0), token_ids=(1, 2, 3))))[0].trees
    assert [column.token for column in tree.columns] == [1, 2, 3, 2]
    assert tree.visible.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    assert tree.positions == (0, 1, 2, 1)
    assert tree.ends == {1: 2, 0: 3}


def test_few_shot_examples_of_a_subject_are_run_once(tiny: Callable[..., Model], passes: list) -> None:
    model = tiny("Llama-3.1-8B-Instruct", torch.float32)
    rows = torch.randint(4, 280, (12, 110), generator=torch.Generator().manual_seed(4)).tolist()
    shots = [rows[0][:100], rows[1][:100]]
    ids = [(*shots[i % 2], *row[-8:]) for i, row in enumerate(rows)]
    prompts = [replace(prompt(i, 0), token_ids=each, label_ids=((5,), (7,))) for i, each in enumerate(ids)]
    together = ask(model, prompts, max_tokens=108)
    assert [n_before for _, n_before in passes] == [100, 100]
    torch.testing.assert_close(together, ask(model, prompts, share_prefix=False), atol=1e-4, rtol=0)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The number of rows and of cached positions of every pass over trees."""
    seen: list[tuple[int, int]] = []

    def count(run: Callable) -> Callable:
        return lambda self, rows, *rest: (seen.append((len(rows.tokens), rows.n_before)), run(self, rows, *rest))[1]

    for backend in {type(backend_of(load_model("toy")))}:
        monkeypatch.setattr(backend, "packed_logits", count(backend.packed_logits))
    return seen


@pytest.mark.parametrize("name", ["Llama-3.1-8B-Instruct", "OLMo-2-1124-7B-Instruct"])
def test_sets_of_neurons_share_passes(name: str, tiny: Callable[..., Model], passes: list) -> None:
    model = tiny(name, torch.float32)
    prompts = PromptSet(tuple(build_prompts(model, binary()[:6], order="both")))
    rng = np.random.default_rng(2)
    sets = [NeuronSet(), *(random_neurons(neuron_space(model), n, NeuronSet(), rng) for n in (40, 40, 1))]
    for intervention in (Zero(), Scale(factor=2.0, positions="last"), Mean(), Resample(seed=1)):
        passes.clear()
        together = ask_with(model, prompts, sets, intervention=intervention)
        assert len(passes) < len(sets) or not intervention.keeps_prefix
        one_by_one = [ask(model, prompts, neurons=each, intervention=intervention) for each in sets]
        torch.testing.assert_close(together, torch.stack(one_by_one), atol=1e-5, rtol=0)
        askings = [Asking(prompts=prompts, neurons=each, intervention=intervention) for each in sets]
        torch.testing.assert_close(torch.stack(ask_each(model, askings)), together, atol=1e-5, rtol=0)
        assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(20))
def test_trees_hold_every_prompt(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = []
    for n in range(60):
        ids = tuple(rng.integers(0, 2, size=rng.integers(1, 14)).tolist())
        prompts.append(replace(prompt(n, 0), token_ids=ids, start=int(rng.integers(0, len(ids)))))
    for start, most_columns in ((None, 512), (3, 512), (3, 30)):  # questions that begin anywhere, or at one position
        rows = tuple(prompts if start is None else [replace(each, start=start) for each in prompts])
        planned = groves(rows, "cpu", most_columns)
        assert sorted(row for grove in planned for tree in grove.trees for row in tree.ends) == list(range(60))
        assert sum(grove.n_tokens for grove in planned) <= sum(len(each.token_ids) for each in rows)
        for grove in planned:
            for tree in grove.trees:
                assert len(tree) <= most_columns
                for row, end in tree.ends.items():
                    assert_is_path(rows[row], grove, tree.visible[end], tree)


def assert_is_path(one: Prompt, grove: Grove, visible: np.ndarray, tree: Any) -> None:
    """The columns that the end of a prompt attends to are its tokens, in order."""
    seen = np.flatnonzero(visible)
    path = (*grove.prefix, *(tree.columns[column] for column in seen))
    assert tuple(column.token for column in path) == one.token_ids
    assert [tree.positions[column] for column in seen] == list(range(len(grove.prefix), len(path)))
    assert [column.in_question for column in path] == [at >= one.start for at in range(len(path))]
    assert [column.is_last for column in path] == [False] * (len(path) - 1) + [True]


def test_the_question_begins_where_it_begins(toy: Model, shared: Path) -> None:
    (first, _) = build_prompts(toy, binary()[:1], order="both")
    assert toy.tokenizer.decode(first.token_ids[first.start :]).startswith(binary()[0].text[:8])
    real = load_model(shared / "models" / "tinystories-656k")
    for name, options in (("TruthfulQA.csv", {}), ("mmlu", {"n_shots": 1})):
        source = shared / "data" / name
        questions = load_questions(source) if name != "mmlu" else load_questions("mmlu", source=source, **options)
        for prompt, question in zip(build_prompts(real, questions[:5], order="given"), questions[:5], strict=True):
            rest = real.tokenizer.decode(prompt.token_ids[prompt.start :])
            assert question.text.split()[0] in rest[: len(question.text.split()[0]) + 8]
            assert len(rest) < len(prompt.text) - len(question.context)


def test_batches_hold_every_prompt_once(toy: Model) -> None:
    prompts = build_prompts(toy, binary()[:30], order="both")
    cut = list(batches(prompts, 100))
    assert sorted(i for batch in cut for i in batch) == list(range(60))
    assert all(len(b) * max(len(prompts[i].token_ids) for i in b) <= 100 for b in cut)
    assert all(len(b) == 1 for b in batches(prompts, 1))


def test_batches_are_cut_rather_than_padded() -> None:
    lengths = [30] * 20 + [60] * 20 + [61] * 3
    prompts = [replace(prompt(n, 0), token_ids=(1,) * length) for n, length in enumerate(lengths)]
    for n_shared in (0, 20):
        cut = [[lengths[i] - n_shared for i in batch] for batch in batches(prompts, 4096, n_shared)]
        assert sum(map(len, cut)) == len(prompts)
        for batch in cut[:-1]:
            assert sum(batch) >= LEAST_TOKENS or len(cut) == 1
        assert all(len(batch) * max(batch) <= PADDING * sum(batch) or sum(batch[:-1]) < LEAST_TOKENS for batch in cut)
    assert len(list(batches(prompts, 4096))) == 2
    assert len(list(batches(prompts[:3] + prompts[-3:], 4096))) == 1, "a few prompts are not worth cutting"


def prompt(question: int, right: int) -> Prompt:
    return Prompt(
        token_ids=(1,),
        label_ids=((2,), (3,)),
        right=right,
        question=str(question),
        order=(right, 1 - right),
        labels=("A", "B"),
    )


def test_right_is_strictly_more_probable() -> None:
    probabilities = torch.tensor([[0.6, 0.3], [0.6, 0.3], [0.4, 0.4]])
    assert is_right(probabilities, [prompt(0, 0), prompt(1, 1), prompt(2, 0)]).tolist() == [True, False, False]


def test_a_question_passes_only_if_right_in_both_orders(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.9, 0.1], [0.7, 0.2]])
    monkeypatch.setattr("tn_lens.inference.answers.ask_with", lambda *_, **__: answers[None])
    prompts = [prompt(0, 0), prompt(0, 1), prompt(1, 0), prompt(1, 1)]
    check = manipulation_check(toy, prompts)
    assert check.passed.tolist() == [True, True, False, False]
    assert check.questions == ["0"]
    assert check.says_a == 0.75
    assert check.answer_mass == pytest.approx(0.975)
    assert check.right_at_a_before == check.right_at_a_after == 0.5
    assert not check.is_lopsided
    assert len(check.to_frame()) == 4


def test_a_model_that_always_says_a_is_called_lopsided(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tn_lens.inference.answers.ask_with", lambda _, prompts, *__, **___: torch.tensor([[[0.9, 0.1]] * len(prompts)])
    )
    check = manipulation_check(toy, [prompt(i, i % 2) for i in range(20)])
    assert check.questions == list(map(str, range(0, 20, 2)))
    assert check.right_at_a_after == 1
    assert "unbalanced" in check.summary()


@pytest.fixture(scope="module")
def evaluation(toy: Model) -> Evaluation:
    space = neuron_space(toy)
    neurons = random_neurons(space, 60, NeuronSet(), np.random.default_rng(5))
    return evaluate(toy, binary().part("report")[:60], neurons, n_repetitions=4)


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use few bootstrap resamples, for tests that only check that two results are equal."""
    monkeypatch.setattr("tn_lens.evaluation.comparison.N_RESAMPLES", 50)


def test_all_conditions_share_the_orders_and_random_ones_draw_anew(evaluation: Evaluation) -> None:
    assert evaluation.asked.shape == (4, 60)
    assert set(evaluation.conditions) == set(ALL_CONDITIONS)
    assert [len(evaluation.probabilities[name]) for name in ALL_CONDITIONS] == [1, 4, 4, 4, 1]
    random = evaluation.probabilities["random"]
    assert all((random[0] != random[i]).any() for i in range(1, 4))
    per_question = np.stack([[evaluation.prompts[i].question for i in row] for row in evaluation.asked.tolist()])
    assert (per_question == [question.id for question in binary().part("report")[:60]]).all()
    share_swapped = np.mean([[evaluation.prompts[i].order == (1, 0) for i in row] for row in evaluation.asked.tolist()])
    assert 0.35 < share_swapped < 0.65


def test_accuracies_by_hand(evaluation: Evaluation) -> None:
    for name, result in evaluation.conditions.items():
        p = evaluation.probabilities[name]
        for repetition, row in enumerate(evaluation.asked.tolist()):
            draw = repetition if len(p) > 1 else 0
            hits = [p[draw, i, evaluation.prompts[i].right] > p[draw, i, 1 - evaluation.prompts[i].right] for i in row]
            assert result.accuracies[repetition] == pytest.approx(np.mean(hits))
        averaged = []
        for rows in evaluation.prompts.groups.values():
            first, second = rows
            by_choice = p[:, first] + p[:, second][:, ::-1]  # the second prompt shows the choices the other way round
            averaged.append(by_choice[:, 0] > by_choice[:, 1])
        assert result.order_averaged_accuracy == pytest.approx(np.mean(averaged))
        assert result.answer_mass == pytest.approx(np.mean(p.sum(-1)), abs=0.02)
    conditions = evaluation.conditions
    expected = stats.ttest_ind(
        conditions["ablated"].accuracies, conditions["unablated"].accuracies, equal_var=False, alternative="less"
    ).pvalue
    assert evaluation.welch_p == pytest.approx(expected)
    table = evaluation.to_frame()
    assert table.loc["unablated", "accuracy_mean"] == pytest.approx(100 * conditions["unablated"].accuracies.mean())
    assert table.loc["unablated", "accuracy_std"] == pytest.approx(100 * conditions["unablated"].accuracies.std(ddof=1))


def test_equation_11_by_hand(evaluation: Evaluation) -> None:
    before, after = (evaluation.probabilities[name][0] for name in ("unablated", "ablated"))
    changes = [
        (before[i, right] - after[i, right]) / before[i, right]
        for row in evaluation.asked.tolist()
        for i in row
        for right in [evaluation.prompts[i].right]
    ]
    assert evaluation.probability_change == pytest.approx(np.mean(changes))


def test_some_of_the_questions(evaluation: Evaluation) -> None:
    ids = list(evaluation.prompts.groups)[10:30]
    part = evaluation.only(ids)
    assert part.n_questions == 20
    assert list(part.prompts.groups) == ids
    for name in ALL_CONDITIONS:
        whole = evaluation.conditions[name]
        expected = whole.drawn(whole.right)[:, 10:30].mean(-1)
        np.testing.assert_allclose(part.conditions[name].accuracies, expected)


@pytest.mark.parametrize("made", [Zero(), Mean(), Resample()], ids=lambda made: made.label)
def test_interventions_by_name(made: Intervention, toy: Model, evaluation: Evaluation) -> None:
    name = next(name for name, kind in INTERVENTIONS.items() if type(made) is kind)
    questions, how = (
        binary().part("report")[:10],
        {"n_repetitions": 2, "conditions": ("unablated", "random", "ablated")},
    )
    by_name, given = (evaluate(toy, questions, evaluation.neurons, intervention=i, **how) for i in (name, made))
    for condition in how["conditions"]:
        np.testing.assert_array_equal(by_name.probabilities[condition], given.probabilities[condition])
    assert by_name.intervention == given.intervention == made.label
    assert (by_name.probabilities["ablated"] != by_name.probabilities["unablated"]).any()


def test_four_choices_average_over_their_rotations(toy: Model) -> None:
    found = evaluate(toy, four_choice().part("report")[:20], NeuronSet(), n_repetitions=2)
    assert found.probabilities["unablated"].shape == (1, 80, 4)
    assert found.conditions["unablated"].order_averaged_accuracy > 0.5
    assert np.isnan(found.welch_p) or found.conditions["unablated"].accuracy_std > 0


def test_no_neurons_change_nothing_and_it_says_so(toy: Model) -> None:
    found = evaluate(toy, binary().part("report")[:20], NeuronSet(), n_repetitions=3)
    for name in ALL_CONDITIONS:
        assert (found.probabilities[name] == found.probabilities["unablated"]).all()
    assert found.probability_change == 0
    assert "No neurons were ablated" in found.summary()


def made(before: list[list[float]], after: list[list[float]]) -> Evaluation:
    prompts = PromptSet(tuple(prompt(q, r) for q in range(len(before) // 2) for r in (0, 1)))
    asked = np.arange(0, len(before), 2)[None].repeat(2, 0) + np.array([[0], [1]])
    return Evaluation(
        name="made",
        prompts=prompts,
        asked=asked,
        neurons=NeuronSet(),
        probabilities={"unablated": np.array([before]), "ablated": np.array([after])},
        seed=0,
    )


def test_a_fall_by_letter_bias_alone_is_called_that() -> None:
    knows = [[0.9, 0.1], [0.1, 0.9]] * 10
    says_a = [[0.9, 0.1], [0.6, 0.4]] * 10
    found = made(knows, says_a)
    assert found.conditions["ablated"].accuracy == 0.5
    assert found.conditions["ablated"].order_averaged_accuracy == 1, (
        "the letters cancel and the knowledge is still there"
    )
    assert (
        "letter bias explains part of the fall of 50.0 points; averaged over the orders of the answers, the fall is 0.0 points"
        in found.summary()
    )


def test_lost_mass_and_inverted_answers_are_called_that() -> None:
    knows = [[0.9, 0.1], [0.1, 0.9]] * 10
    assert "lost instruction following" in made(knows, [[0.3, 0.2], [0.2, 0.3]] * 10).summary()
    assert "below chance" in made(knows, [[0.1, 0.9], [0.9, 0.1]] * 10).summary()
    assert "hardly follows" in made([[0.01, 0.0], [0.0, 0.01]] * 10, knows).summary()


def test_conditions_that_cannot_be_compared_are_refused(toy: Model) -> None:
    with pytest.raises(ValueError, match="'ablated' is missing"):
        evaluate(toy, binary()[:4], NeuronSet(), conditions=("unablated",))
    with pytest.raises(ValueError, match="expected at least one prompt, got none"):
        manipulation_check(toy, [])


def test_even_letters_are_not_lopsided_with_four_choices(toy: Model) -> None:
    check = manipulation_check(toy, build_prompts(toy, four_choice()[:40], order="both"))
    assert check.right_at_a_before == 0.25
    assert not check.is_lopsided


def test_a_question_that_occurs_twice_is_refused(toy: Model) -> None:
    twice = [*build_prompts(toy, binary()[:3]), *build_prompts(toy, binary()[:3])]
    with pytest.raises(ValueError, match=f"question '{binary()[0].id}' occurs twice"):
        manipulation_check(toy, twice)
    with pytest.raises(ValueError, match="question '0' occurs twice"):
        manipulation_check(toy, [prompt(0, 0), prompt(0, 0)])


@pytest.mark.parametrize("bad", [{"n_repetitions": 0}, {"questions": []}])
def test_nothing_to_evaluate_is_refused(bad: dict, toy: Model) -> None:
    questions = binary()[:0] if "questions" in bad else binary()[:4]
    with pytest.raises(ValueError, match="needs at least one repetition and one question"):
        evaluate(toy, questions, NeuronSet(), n_repetitions=bad.get("n_repetitions", 1))


def test_auc_and_shares_by_hand(evaluation: Evaluation) -> None:
    for name, result in evaluation.conditions.items():
        areas = []
        for p in evaluation.probabilities[name]:
            rights, wrongs = [], []
            for rows in evaluation.prompts.groups.values():
                first, second = rows
                by_choice = (p[first] + p[second][::-1]) / 2
                share = by_choice / by_choice.sum()
                rights.append(share[0])
                wrongs.append(share[1])
            pairs = [float(r > w) + 0.5 * float(r == w) for r in rights for w in wrongs]
            areas.append(np.mean(pairs))
        assert result.auc == pytest.approx(np.mean(areas))
        assert result.shares.sum() == pytest.approx(1)
        assert result.shares[0] == result.share_a


def test_changes_of_probability_under_their_own_names() -> None:
    before = [[1e-9, 0.9], [0.9, 1e-9]] + [[0.8, 0.2], [0.2, 0.8]] * 4
    after = [[0.5, 0.5], [0.5, 0.5]] + [[0.6, 0.4], [0.4, 0.6]] * 4
    found = made(before, after)
    assert found.probability_change < -1e6, "one question with hardly any probability rules the paper's mean"
    assert found.probability_change_median == pytest.approx(0.25)
    assert found.probability_change_floored == pytest.approx((4 * 0.25 - 50) / 5, rel=1e-3)
    assert found.reduction == 0


def test_what_a_fall_is_made_of() -> None:
    knows = [[0.9, 0.1], [0.1, 0.9]] * 10
    letters = made(knows, [[0.9, 0.1], [0.6, 0.4]] * 10)
    assert letters.fall() == pytest.approx({"total": 50, "content": 0, "letter": 50, "mass": 0})
    assert "0.0 are due to content (order-averaged) and 50.0 to letter bias" in letters.explain()[0]
    content = made(knows, [[0.1, 0.9], [0.9, 0.1]] * 5 + knows[:10])
    assert content.fall() == pytest.approx({"total": 50, "content": 50, "letter": 0, "mass": 0})
    mass = made(knows, [[0.3, 0.1], [0.1, 0.3]] * 10)
    assert mass.fall() == pytest.approx({"total": 0, "content": 0, "letter": 0, "mass": 100})
    assert "does not change" in mass.explain()[0]


def test_questions_are_the_unit_of_the_paired_test() -> None:
    knows = [[0.9, 0.1], [0.1, 0.9]] * 40
    after = [[0.1, 0.9], [0.9, 0.1]] * 10 + knows[:60]
    compared = made(knows, after).compare()
    assert compared.difference == pytest.approx(-25)
    assert compared.mcnemar_p == pytest.approx(stats.binomtest(0, 10).pvalue)
    se = 100 * np.sqrt(0.25 * 0.75 / 40)
    assert compared.low == pytest.approx(-25 - 1.96 * se, abs=3)
    assert compared.high == pytest.approx(-25 + 1.96 * se, abs=3)
    assert "no difference is shown" not in compared.summary()
    assert (
        "25.0 points below the accuracy of the unablated model "
        f"(95 % interval {-compared.high:.1f} to {-compared.low:.1f};" in compared.summary()
    )
    same = made(knows, knows).compare()
    assert (same.difference, same.low, same.high, same.mcnemar_p) == (0, 0, 0, 1)
    assert "the same accuracy as the unablated model" in same.summary()
    unclear = made(knows, [*knows[:2], [0.1, 0.9], *knows[3:]]).compare()
    assert "no difference is shown" in unclear.summary()
    with pytest.raises(ValueError, match="'random' was not run"):
        made(knows, knows).compare("ablated", "random")


def test_copies_of_a_question_do_not_narrow_the_interval() -> None:
    """Ten questions in four copies each, of which three are answered right only without ablation."""
    knows = [[0.9, 0.1], [0.1, 0.9]]
    once, four_times = [[0.1, 0.9], [0.9, 0.1]] * 3 + knows * 7, [[0.1, 0.9], [0.9, 0.1]] * 12 + knows * 28
    single, copied = made(knows * 10, once), made(knows * 40, four_times)
    assert copied.compare().low > single.compare().low, "as 40 questions, they would give a narrower interval"
    grouped = PromptSet(tuple(replace(p, group=f"group {int(p.question) // 4}") for p in copied.prompts))
    together = replace(copied, prompts=PromptSet.from_plain(grouped.to_plain()))
    np.testing.assert_equal(vars(together.compare()), vars(single.compare()))


def test_draws_of_a_control_count(evaluation: Evaluation) -> None:
    compared = evaluation.compare("ablated", "random_matched")
    own = evaluation.conditions["ablated"].order_averaged.mean()
    theirs = evaluation.conditions["random_matched"].order_averaged.mean(-1)
    assert compared.difference == pytest.approx(100 * (own - theirs.mean()))
    assert compared.draws_p == pytest.approx((1 + (theirs <= own).sum()) / 5)
    assert compared.low <= compared.difference <= compared.high
    assert compared.mcnemar_p != compared.mcnemar_p


def test_categories_like_figure_4(evaluation: Evaluation) -> None:
    frame = evaluation.by_category(1)
    assert frame.n_questions.sum() == 60
    unablated, ablated = (evaluation.conditions[name] for name in ("unablated", "ablated"))
    before, after = unablated.drawn(unablated.p_right), ablated.drawn(ablated.p_right)
    for row in frame.itertuples():
        own = [i for i, c in enumerate(evaluation.categories) if c == row.category]
        assert row.share_hurt == pytest.approx((after[:, own] < before[:, own]).mean())
    few = evaluation.by_category(15)
    assert few.attrs["hidden"] == len(frame) - len(few)
    ids = list(evaluation.prompts.groups)
    parts = evaluation.by_part({"first": ids[:20], "rest": ids[20:], "none": []})
    assert parts.part.unique().tolist() == ["first", "rest"]
    assert parts[parts.part == "first"].n_questions.unique().tolist() == [20]


@pytest.mark.usefixtures("few_resamples")
def test_tables_explain_a_star_where_there_is_one_and_say_what_was_not_run(evaluation: Evaluation) -> None:
    same = replace(
        evaluation, probabilities={**evaluation.probabilities, "ablated": evaluation.probabilities["unablated"]}
    )
    once = replace(same, asked=same.asked[:1])
    worse = replace(
        evaluation, probabilities={**evaluation.probabilities, "ablated": 1 - evaluation.probabilities["unablated"]}
    )
    for make in (table1, table2):
        for one in (same, once, worse):
            table = make([one])
            assert ("* below" in table.caption) == any(" *" in cell for cell in table.frame["ablated"])
    assert "* below" in table1([worse]).caption
    assert "* below" in table2([worse]).caption
    assert "Ablated is not below unablated (one-sided Welch test, p at least 0.05)." in table1([same]).caption
    assert "from one repetition" in table1([once]).caption
    assert "No Welch test: no two repetitions differ." in table1([once]).caption
    fewer = {name: p for name, p in same.probabilities.items() if name != "random_matched"}
    both = table2([same, replace(same, name="other", probabilities=fewer)]).frame
    assert both["matched"].tolist()[-2:] == ["not run", "not run"]
    assert "not run" not in both["matched"].tolist()[:2]


@pytest.mark.usefixtures("few_resamples")
def test_tables_in_every_form(evaluation: Evaluation, tmp_path: Path) -> None:
    paper = replace(evaluation, name="truthfulqa", model_name="Qwen2.5-3B-Instruct")
    table = paper.table1()
    assert table.frame.model.tolist() == ["Qwen2.5-3B-Instruct", "  order-averaged", "  in the paper"]
    assert table.frame.ablated.tolist()[2] == "58.59 ± 0.68"
    assert table.frame["most active"].tolist()[2] == "-"
    ablated = paper.conditions["ablated"]
    assert f"{100 * ablated.accuracy:.2f} ± {100 * ablated.accuracy_std:.2f}" in table.to_markdown()
    assert r"$\pm$" in table.to_latex()
    assert r"7\_b" in replace(paper, model_name="7_b").table1().to_latex()
    assert r"on a\_b \& c," in replace(evaluation, name="a_b & c").table1().to_latex(), "the caption, too"
    second = table2([evaluation, replace(paper, name="mmlu"), replace(paper, name="triviaqa")])
    assert second.frame.questions.tolist() == ["mmlu", "", "", "triviaqa", "", "", "toy", ""]
    theirs = second.frame[second.frame.model == "  in the paper"]
    assert theirs.ablated.tolist() == ["62.70", "62.90"]
    assert theirs.unablated.tolist() == ["62.10", "63.51"]
    assert "questions,unablated,random" in second.to_csv()
    for ending in (".md", ".tex", ".csv"):
        second.save(tmp_path / f"table{ending}")
        assert (tmp_path / f"table{ending}").read_text()
    with pytest.raises(ValueError, match=r"ends in \.md"):
        second.save(tmp_path / "table.doc")
    with pytest.raises(ValueError, match="one question set"):
        table1([evaluation, paper])
    with pytest.raises(ValueError, match="needs at least one evaluation"):
        table2([])


def test_group_means_are_those_of_the_paper() -> None:
    means = group_means({name: (row.baseline[0], row.suppressed[0]) for name, row in PAPER.items()})
    assert means.ablated.tolist() == pytest.approx([54.25, 46.35, 49.70], abs=0.006), "section 3.3"
    assert means.relative_reduction.tolist() == pytest.approx([10.49, 17.90, 17.13], abs=0.02), "section 3.3"
    assert means.models.tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match=r"expected models of the paper .*; got 'toy'"):
        group_means({"toy": (90.0, 80.0)})


def test_loss_on_plain_text_by_hand(toy: Model) -> None:
    texts = plain_texts(toy)[:40]
    tokenizer, losses = toy.tokenizer, []
    for text in texts:
        ids = torch.tensor([tokenizer("".join(text))["input_ids"]])
        losses.append(float(-toy(ids)[0, -2].log_softmax(-1)[ids[0, -1]]))
    assert text_loss(toy, texts) == pytest.approx(np.mean(losses), rel=1e-4)
    every = NeuronSet(neuron_space(toy).neuron("mlp", 0, i) for i in range(neuron_space(toy).d_mlp))
    assert text_loss(toy, texts, neurons=every) > text_loss(toy, texts) + 0.1
    for bad in (Resample(), Mean(), Zero(positions="last")):
        with pytest.raises(ValueError, match="takes no values from prompts"):
            text_loss(toy, texts, neurons=every, intervention=bad)
    with pytest.raises(ValueError, match="at least two tokens"):
        text_loss(toy, [""])


def test_ordinary_text_for_ordinary_models(shared: Path) -> None:
    model = load_model(shared / "models" / "tinystories-656k")
    texts = plain_texts(model)
    assert len(texts) >= 8
    ids = torch.tensor([model.tokenizer(texts[0])["input_ids"]])[:, :512]
    expected = float(torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]))
    assert text_loss(model, texts[:1]) == pytest.approx(expected, rel=1e-4)


def test_factor_one_is_the_middle_of_a_dose_curve(toy: Model) -> None:
    neurons = random_neurons(neuron_space(toy), 60, NeuronSet(), np.random.default_rng(5))
    questions = binary().part("report")[:20]
    curve = dose_response(toy, questions, neurons, factors=(0, 1, 2), n_repetitions=2)
    plain = evaluate(toy, questions, neurons, n_repetitions=2, conditions=("unablated", "random_matched", "ablated"))
    at = curve.set_index(["condition", "factor"])
    for name in ("ablated", "random_matched"):
        assert at.loc[(name, 1)].accuracy == pytest.approx(100 * plain.conditions["unablated"].accuracy)
        assert at.loc[(name, 0)].accuracy == pytest.approx(100 * plain.conditions[name].accuracy)
    assert at.loc[("ablated", 2)].p_right != at.loc[("ablated", 1)].p_right
    with pytest.raises(ValueError, match="needs at least one factor"):
        dose_response(toy, questions, neurons, factors=())


def test_sets_with_a_fixed_order_are_asked_once(toy: Model) -> None:
    fixed = replace(four_choice().part("report")[:12], fixed_order=True)
    found = evaluate(toy, fixed, NeuronSet(), n_repetitions=3, conditions=("unablated", "ablated"))
    assert len(found.prompts) == 12
    assert found.n_orders == 1
    assert found.conditions["unablated"].accuracy_std == 0
    assert "order-averaged" not in found.summary()
    assert len(evaluate(toy, fixed, NeuronSet(), order="both", conditions=("unablated", "ablated")).prompts) == 48
    with pytest.raises(ValueError, match="the repetitions draw the orders"):
        evaluate(toy, fixed, NeuronSet(), order="random")


def test_controls_may_be_asked_only_what_was_drawn(toy: Model) -> None:
    neurons = random_neurons(neuron_space(toy), 60, NeuronSet(), np.random.default_rng(5))
    questions = binary().part("report")[:20]
    every = evaluate(toy, questions, neurons, n_repetitions=3)
    drawn = evaluate(toy, questions, neurons, n_repetitions=3, control_orders="drawn")
    for name in ALL_CONDITIONS:
        fixed = name in ("unablated", "ablated")
        np.testing.assert_allclose(drawn.conditions[name].accuracies, every.conditions[name].accuracies)
        np.testing.assert_allclose(drawn.conditions[name].shares, every.conditions[name].shares)
        assert drawn.conditions[name].answer_mass == pytest.approx(every.conditions[name].answer_mass)
        assert drawn.conditions[name].is_complete == fixed
        assert (drawn.conditions[name].auc == drawn.conditions[name].auc) == fixed
        assert np.isnan(drawn.probabilities[name]).sum() == (0 if fixed else 3 * 20 * 2)
    assert drawn.table1().frame.iloc[1]["random"] == "-"
    compared = drawn.compare("ablated", "random")
    plain = [drawn.conditions[name].accuracy for name in ("ablated", "random")]
    assert compared.difference == pytest.approx(100 * (plain[0] - plain[1]))


def assert_same(loaded: Evaluation, live: Evaluation) -> None:
    """Every number, sentence and table of a stored evaluation equals that of the evaluation in memory."""
    assert set(loaded.probabilities) == set(live.probabilities)
    for name, probabilities in live.probabilities.items():
        np.testing.assert_array_equal(loaded.probabilities[name], probabilities)
        ours, theirs = loaded.conditions[name], live.conditions[name]
        np.testing.assert_array_equal(ours.accuracies, theirs.accuracies)
        np.testing.assert_array_equal(ours.order_averaged, theirs.order_averaged)
        np.testing.assert_array_equal(ours.shares, theirs.shares)
        np.testing.assert_array_equal(ours.mass, theirs.mass)
    np.testing.assert_array_equal(loaded.asked, live.asked)
    for name in ("name", "neurons", "seed", "model_name", "intervention", "parts", "left_out"):
        assert getattr(loaded, name) == getattr(live, name), name
    for name in ("categories", "n_orders", "n_questions", "n_neurons", "n_repetitions"):
        assert getattr(loaded, name) == getattr(live, name), name
    for name in ("welch_p", "reduction", "relative_reduction", "probability_change", "probability_change_median"):
        np.testing.assert_equal(getattr(loaded, name), getattr(live, name))
    np.testing.assert_equal(loaded.to_dict(), live.to_dict())
    np.testing.assert_equal(loaded.fall(), live.fall())
    for frame in (lambda e: e.to_frame(), lambda e: e.by_category(1), lambda e: e.by_part()):
        assert_frame_equal(frame(loaded), frame(live))
    for sentences in (
        lambda e: e.explain(),
        lambda e: e.warnings(),
        lambda e: e.summary(),
        repr,
        Evaluation._repr_html_,
    ):
        assert sentences(loaded) == sentences(live)
    for other in set(live.conditions) - {"ablated"}:
        np.testing.assert_equal(vars(loaded.compare("ablated", other)), vars(live.compare("ablated", other)))
    for ours, theirs in ((loaded.table1(), live.table1()), (loaded.table2(), live.table2())):
        assert ours.files() == theirs.files()


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("ending", [".safetensors", ".json"])
def test_a_stored_evaluation_is_the_one_in_memory(
    ending: str, evaluation: Evaluation, toy: Model, tmp_path: Path
) -> None:
    ids = list(evaluation.prompts.groups)
    losses = {name: np.arange(len(p)) / 7 for name, p in evaluation.probabilities.items()}
    whole = replace(
        evaluation,
        text_loss=losses,
        parts={"first": tuple(ids[:20]), "rest": tuple(ids[20:])},
        left_out=("row 3: empty",),
    )
    neurons, few = whole.neurons, ("unablated", "random", "ablated")
    drawn = evaluate(toy, binary().part("report")[:12], neurons, n_repetitions=2, control_orders="drawn")
    mixed = evaluate(toy, of_several_widths(), neurons, n_repetitions=2, intervention="mean", conditions=few)
    for number, live in enumerate((whole, drawn, mixed)):
        path = tmp_path / f"{number}{ending}"
        live.save(path)
        loaded = Evaluation.load(path)
        assert type(loaded) is Evaluation
        assert_same(loaded, live)
        some = list(live.prompts.groups)[:7]
        np.testing.assert_equal(loaded.only(some).to_dict(), live.only(some).to_dict())
        assert loaded.to_bytes(ending) == live.to_bytes(ending) == path.read_bytes()
    np.testing.assert_equal(Evaluation.load(tmp_path / f"0{ending}").text_loss, losses)


def of_several_widths() -> QuestionSet:
    """Questions with two choices and with four, whose answers are padded."""
    two, four = binary().part("report")[:6], four_choice().part("report")[6:12]
    questions: tuple[Question, ...] = (*two, *four)
    return replace(two, questions=questions)


def test_a_stored_evaluation_that_is_altered_is_noticed(evaluation: Evaluation, tmp_path: Path) -> None:
    """The comparison of stored and live evaluations can fail."""
    before = evaluation.probabilities["unablated"].copy()
    before[0, 0] = before[0, 0][::-1]
    altered = replace(evaluation, probabilities={**evaluation.probabilities, "unablated": before})
    altered.save(tmp_path / "e.json")
    with pytest.raises(AssertionError):
        assert_same(Evaluation.load(tmp_path / "e.json"), evaluation)
