"""Metrics of whole answers: by hand, stored, by part, resumed. `test_against_lm_eval` compares them with the harness."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tn_lens import BadInput, Evaluation, NeuronSet, QuestionSet, Resample, Zero, evaluate, load_questions
from tn_lens.core.stored import dump_json
from tn_lens.evaluation.likelihoods import log_likelihoods
from tn_lens.evaluation.metrics import METRICS, answer_pairs
from tn_lens.models import Model, neuron_space
from tn_lens.questions.question import Question
from tn_lens.questions.toy import binary
from tn_lens.runs.context import Run
from tn_lens.runs.folder import RunFolder

QUESTION = Question(
    text="Who?", choices=("a dog", "me"), correct=("a dog", "dogs", "a cat"), incorrect=("me", "nobody at all")
)


def test_metrics_by_hand() -> None:
    values = {
        "a dog": np.log(0.2),
        "me": np.log(0.3),
        "dogs": np.log(0.1),
        "a cat": np.log(0.2),
        "nobody at all": np.log(0.2),
    }
    scores = {name: metric.value(QUESTION, values) for name, metric in METRICS.items()}
    # per character: log(0.2) / 5 = -0.32 > log(0.3) / 2 = -0.60
    assert scores == pytest.approx({"acc": 0, "acc_norm": 1, "mc1": 0, "mc2": 0.5})
    values["me"] = np.log(0.1)
    scores = {name: metric.value(QUESTION, values) for name, metric in METRICS.items()}
    # the right choice comes first, and a tie counts for the first one, as in the harness
    assert scores == pytest.approx({"acc": 1, "acc_norm": 1, "mc1": 1, "mc2": 0.5 / 0.8})
    far = {answer: value - 2000 for answer, value in values.items()}
    assert METRICS["mc2"].value(QUESTION, far) == pytest.approx(0.5 / 0.8), "no underflow"


def test_log_likelihoods_of_the_toy_are_sums_over_its_tokens(toy: Model) -> None:
    (pairs,) = answer_pairs(toy, binary()[:1], has_lists=False)
    question = binary()[0]
    assert pairs == {c: (f"Question : {question.text} Answer :", f" {c}") for c in question.choices}
    context, continuation = f"Question : {question.text} Answer :", f" {question.choices[0]} {question.choices[1]}"
    before, ids = (toy.tokenizer(text)["input_ids"] for text in (context, context + continuation))
    logits = toy(torch.tensor([ids]))[0].log_softmax(-1)
    by_hand = sum(float(logits[place - 1, ids[place]]) for place in range(len(before), len(ids)))
    assert len(ids) == len(before) + 2
    assert log_likelihoods(toy, [(context, continuation)]) == pytest.approx([by_hand], abs=1e-4)


def with_lists(questions: QuestionSet) -> QuestionSet:
    """The same questions with lists of answers."""
    return replace(
        questions,
        questions=tuple(
            replace(q, correct=(q.choices[0], "red"), incorrect=(q.choices[1], "blue", "iron")) for q in questions
        ),
    )


@pytest.fixture(scope="module")
def neurons(toy: Model) -> NeuronSet:
    space = neuron_space(toy)
    return NeuronSet(space.neuron("mlp", layer, i) for layer in range(space.n_layers) for i in range(0, space.d_mlp, 2))


@pytest.fixture(scope="module")
def evaluation(toy: Model, neurons: NeuronSet) -> Evaluation:
    conditions = ("unablated", "random", "ablated")
    questions = with_lists(binary().part("report")[:24])
    return evaluate(toy, questions, neurons, n_repetitions=2, conditions=conditions, metrics=tuple(METRICS))


def test_every_condition_has_every_metric(evaluation: Evaluation, toy: Model, neurons: NeuronSet) -> None:
    assert list(evaluation.metrics) == list(METRICS)
    shapes = {name: values.shape for name, values in evaluation.metrics["mc2"].items()}
    assert shapes == {"unablated": (1, 24), "random": (2, 24), "ablated": (1, 24)}
    questions = with_lists(binary().part("report")[:24])
    for name, acting in (("unablated", NeuronSet()), ("ablated", neurons)):
        for row, (question, pairs) in enumerate(
            zip(questions, answer_pairs(toy, questions, has_lists=True), strict=True)
        ):
            values = dict(zip(pairs, log_likelihoods(toy, list(pairs.values()), neurons=acting), strict=True))
            for metric, by_condition in evaluation.metrics.items():
                expected = METRICS[metric].value(question, values)
                assert by_condition[name][0, row] == pytest.approx(expected, abs=1e-4)
    frame = evaluation.to_frame()
    assert frame.loc["ablated", "mc2"] == pytest.approx(100 * evaluation.metrics["mc2"]["ablated"].mean())
    assert abs(frame.loc["ablated", "mc2"] - frame.loc["unablated", "mc2"]) > 1
    assert evaluation.to_dict()["conditions"]["random"]["mc1"] == pytest.approx(frame.loc["random", "mc1"])
    assert any(
        line.startswith(f"mc2: {frame.loc['unablated', 'mc2']:.1f} % unablated") for line in evaluation.explain()
    )


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
def test_stored_metrics_are_the_same(evaluation: Evaluation, ending: str, tmp_path: Path) -> None:
    evaluation.save(tmp_path / f"e{ending}")
    loaded = Evaluation.load(tmp_path / f"e{ending}")
    np.testing.assert_equal(loaded.metrics, evaluation.metrics)
    some = list(evaluation.prompts.groups)[3:7]
    part = loaded.only(some)
    np.testing.assert_equal(part.metrics["acc"]["random"], evaluation.metrics["acc"]["random"][:, 3:7])
    frame = loaded.by_part({"some": some})
    assert frame["mc2"].tolist() == part.to_frame()["mc2"].tolist()


def test_files_without_metrics_can_be_loaded(evaluation: Evaluation, tmp_path: Path) -> None:
    payload = json.loads(evaluation.to_bytes(".json"))
    del payload["metrics"]
    loaded = Evaluation.from_bytes(dump_json(payload), ".json")
    assert loaded.metrics == {}
    assert "acc" not in loaded.to_frame()
    assert loaded.to_frame()["accuracy_mean"].tolist() == evaluation.to_frame()["accuracy_mean"].tolist()


def test_finished_chunks_are_not_computed_again(
    toy: Model, neurons: NeuronSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(model: Model, pairs: list, **options: object) -> list[float]:
        calls.append(len(pairs))
        return log_likelihoods(model, pairs, **options)

    monkeypatch.setattr("tn_lens.evaluation.metrics.log_likelihoods", counted)
    monkeypatch.setattr("tn_lens.evaluation.metrics.PAIRS", 10)
    options = {"n_repetitions": 1, "conditions": ("unablated", "ablated"), "metrics": ("acc",)}
    questions = binary().part("report")[:12]
    results = []
    for _ in range(2):
        with RunFolder(tmp_path / "run") as folder, Run(folder, "basis", progress=False):
            results.append(evaluate(toy, questions, neurons, **options))
    assert calls == [10, 10, 4] * 2, "24 choices, without and with ablation, once"
    np.testing.assert_equal(results[0].metrics, results[1].metrics)


def test_metrics_that_cannot_be_computed(toy: Model, neurons: NeuronSet) -> None:
    questions = binary().part("report")[:4]
    for said, options in {
        "unknown metric 'f1': expected acc, acc_norm, mc1, mc2": {"metrics": ["f1"]},
        "mc2 needs the correct and incorrect answers of every question, which toy lacks": {"metrics": ["acc", "mc2"]},
        "a log-likelihood needs an intervention at all positions": {"metrics": ["acc"], "intervention": Resample()},
        "takes no values from prompts": {"metrics": ["acc"], "intervention": Zero(positions="last")},
    }.items():
        with pytest.raises(BadInput, match=said):
            evaluate(toy, questions, neurons, n_repetitions=1, **options)
    mean = evaluate(toy, questions, neurons, n_repetitions=1, metrics=["acc"], intervention="mean")
    assert set(mean.metrics) == {"acc"}, "the means over the prompts are known by then"
    with pytest.raises(
        BadInput, match=r"expected a continuation of 1 to 64 tokens \(the context window\), but '' after"
    ):
        log_likelihoods(toy, [("Question :", "")])
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than the context window of 64 tokens"):
        log_likelihoods(toy, [("Question :", " red"), ("Answer " * 80, " red")])


def test_lists_of_answers_are_read(tmp_path: Path, shared: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(
        "question,right,wrong,correct_answers,incorrect_answers\n"
        "Who?,a dog,me, a dog;dogs; ;a dog,me; nobody at all\n"
        "When?,now,never,,\n"
    )
    first, second = load_questions(path)
    assert (first.correct, first.incorrect) == (("a dog", "dogs"), ("me", "nobody at all"))
    assert (second.correct, second.incorrect) == ((), ())
    rows = [{"question": "Who?", "right": "a", "wrong": "b", "correct_answers": ["a; c"], "incorrect_answers": ["b"]}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_questions(tmp_path / "mine.jsonl")[0].correct == ("a; c",)
    every = load_questions("truthfulqa", source=shared / "data" / "TruthfulQA.csv")
    assert all(q.choices[q.answer] in q.correct and q.incorrect for q in every)
    assert every[0].correct[:2] == ("Nothing happens", "You eat watermelon seeds")
    bare = replace(every, questions=tuple(replace(q, correct=(), incorrect=()) for q in every))
    assert bare.digest == every.digest


def test_the_command_computes_metrics(whole: Path, run: Callable, tmp_path: Path) -> None:
    code, said, error = run(
        *("evaluate", whole, "--on", "toy", "--limit", "6", "--repetitions", "1", "--out", tmp_path / "out"),
        *("--conditions", "unablated", "ablated", "--metrics", "acc", "acc_norm"),
    )
    assert (code, error) == (0, "")
    stored = Evaluation.load(tmp_path / "out" / "toy.safetensors")
    assert set(stored.metrics) == {"acc", "acc_norm"}
    assert f"acc_norm: {100 * stored.metrics['acc_norm']['unablated'].mean():.1f} % unablated" in " ".join(said.split())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["toy"]["conditions"]["ablated"]["acc"] == 100 * stored.metrics["acc"]["ablated"].mean()
