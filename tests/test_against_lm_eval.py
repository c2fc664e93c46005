"""lm-evaluation-harness gives the same answers for the same prompts and labels, and the same metrics of whole answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.conftest import zeroed
from tn_lens import NeuronSet, QuestionSet, build_prompts, evaluate, load_model, load_questions
from tn_lens.evaluation.likelihoods import log_likelihoods
from tn_lens.evaluation.metrics import METRICS, answer_pairs
from tn_lens.inference.answers import ask
from tn_lens.models import Model, neuron_space
from tn_lens.questions.formats import QA

N_QUESTIONS = 150
N_ANSWERED = 50
"""Number of questions whose whole answers are compared."""
N_SLOW = 2
"""The same for a model of 135M parameters, which takes seconds for every question."""
CONDITIONS = ("unablated", "ablated")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
def test_mmlu_answers_equal_the_harness(shared: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "tinystories-656k"
    model = load_model(folder, dtype="float32")
    every = load_questions("mmlu", source=shared / "data" / "mmlu")
    drawn = np.random.default_rng(0).permutation(len(every))[: 2 * N_QUESTIONS].tolist()
    prompts = build_prompts(model, every.select(drawn), order="given", drop_long=True)[:N_QUESTIONS]
    ours = ask(model, prompts)
    harness = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=32,
        device="cpu",
    )
    requests = [
        ((prompt.text, f"label {token}"), list(prompt.token_ids), [token])
        for prompt in prompts
        for ids in prompt.label_ids
        for token in ids
    ]
    said = np.array([value for value, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)])
    theirs = np.exp(said).reshape(len(prompts), 4, 2).sum(-1)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-3, atol=1e-7)
    assert (ours.numpy().argmax(-1) == theirs.argmax(-1)).all()
    assert len(prompts) == N_QUESTIONS
    assert len(set(theirs.argmax(-1).tolist())) > 1


class Tried(NamedTuple):
    """The same checkpoint in this package and in the harness."""

    model: Model
    neurons: NeuronSet
    harness: Mapping[str, Any]
    """Condition -> the harness' model: Hugging Face's, with the rows of the neurons set to zero if ablated."""


def tried(hf: Callable[[], Any], tokenizer: Any, backend: str, n_neurons: int) -> Tried:
    from lm_eval.models.huggingface import HFLM

    plain, changed = hf(), hf()
    model = load_model("checkpoint", hf_model=plain, tokenizer=tokenizer, backend=backend, device="cpu")
    space = neuron_space(model)
    drawn = np.random.default_rng(0)
    neurons = [
        space.neuron(site, layer, int(index))
        for site, width in (("mlp", space.d_mlp), ("attn", space.n_heads * space.d_head))
        for layer in range(space.n_layers)
        for index in drawn.permutation(width)[:n_neurons]
    ]
    zeroed(changed, NeuronSet(neurons), space.d_head)
    both = zip(CONDITIONS, (plain, changed), strict=True)
    options: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": 16, "device": "cpu"}
    return Tried(model, NeuronSet(neurons), {name: HFLM(pretrained=one, **options) for name, one in both})


@pytest.fixture(scope="module", params=["hooked", "bridge"])
def stories(request: pytest.FixtureRequest) -> Tried:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.conftest import SHARED

    folder = SHARED / "models" / "tinystories-656k"
    if not folder.is_dir():
        pytest.skip(f"real data not found in {SHARED}; set TN_LENS_SHARED")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tried(
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer, request.param, 100
    )


def harness_results(harness: Any, docs: Sequence[Mapping[str, Any]], **options: Any) -> tuple[list[Any], list[Any]]:
    """The log-likelihoods of the choices, and the metrics, of every document in a task of multiple choice."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config = {
        "task": "local",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(list(docs))},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "num_fewshot": 0,
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    }
    task = ConfigurableTask(config={**config, **options})
    task.build_all_requests(rank=0, world_size=1)
    responses: dict[int, list[Any]] = {}
    for request, response in zip(task.instances, harness.loglikelihood(task.instances, disable_tqdm=True), strict=True):
        responses.setdefault(request.doc_id, []).append(response)
    documents = list(task.test_docs())
    metrics = [task.process_results(documents[place], responses[place]) for place in range(len(docs))]
    return [[value for value, _ in responses[place]] for place in range(len(docs))], metrics


def truthfulqa(shared: Path, n: int) -> QuestionSet:
    every = load_questions("truthfulqa", source=shared / "data" / "TruthfulQA.csv")
    return every.select(np.random.default_rng(1).permutation(len(every))[:n].tolist())


def check_equal(subject: Tried, questions: QuestionSet, **options: Any) -> Mapping[str, Mapping[str, np.ndarray]]:
    """Compare every log-likelihood and metric with those of the harness, in both conditions."""
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    model, neurons, harness = subject
    few: dict[str, Any] = {"n_repetitions": 1, "conditions": CONDITIONS, "order": "given"}
    result = evaluate(model, questions, neurons, metrics=tuple(METRICS), **few)
    pairs = answer_pairs(model, questions, has_lists=True)
    for condition in CONDITIONS:
        acting = neurons if condition == "ablated" else NeuronSet()
        flat = [pair for answers in pairs for pair in answers.values()]
        values = iter(log_likelihoods(model, flat, neurons=acting))
        ours = [{answer: next(values) for answer in answers} for answers in pairs]
        docs = [{"question": q.text, "choices": list(q.choices), "gold": q.answer} for q in questions]
        lists = {"mc1": [(q.choices[q.answer], *q.incorrect) for q in questions]}
        lists["mc2"] = [(*q.correct, *q.incorrect) for q in questions]
        tasks: dict[str, tuple[Any, dict[str, Any]]] = {
            "choices": (docs, {"doc_to_choice": "choices", "doc_to_target": "gold"}),
            "mc1": (
                [{"question": q.text, "all": a} for q, a in zip(questions, lists["mc1"], strict=True)],
                {"doc_to_choice": "all", "doc_to_target": 0},
            ),
            "mc2": (
                [
                    {
                        "question": q.text,
                        "all": a,
                        "mc2_targets": {"labels": [int(x < len(q.correct)) for x in range(len(a))]},
                    }
                    for q, a in zip(questions, lists["mc2"], strict=True)
                ],
                {"doc_to_choice": "all", "doc_to_target": 0, "process_results": process_results_mc2},
            ),
        }
        for name, (documents, task) in tasks.items():
            theirs, scores = harness_results(harness[condition], documents, **task, **options)
            for answers, expected, document in zip(ours, theirs, documents, strict=True):
                texts = document["choices"] if name == "choices" else document["all"]
                np.testing.assert_allclose([answers[text] for text in texts], expected, atol=1e-4, rtol=1e-5)
            for metric in ("acc", "acc_norm") if name == "choices" else (name,):
                wanted = [score["acc" if metric == name else metric] for score in scores]
                np.testing.assert_allclose(result.metrics[metric][condition][0], wanted, atol=1e-4, rtol=0)
    return result.metrics


def test_whole_answers_equal_the_harness(stories: Tried, shared: Path) -> None:
    metrics = check_equal(stories, truthfulqa(shared, N_ANSWERED))
    effects = [np.abs(values["ablated"] - values["unablated"]).max() for values in metrics.values()]
    assert min(effects) > 0.01, "the neurons have an effect on every metric"
    for values in metrics.values():
        assert len(np.unique(values["unablated"])) > 1, "the questions have different results"


def test_solved_examples_before_the_question_equal_the_harness(stories: Tried, shared: Path) -> None:
    """A text before every question is the system text of a template; `n_shots` gives solved examples of the set itself."""
    examples = "Q: Is the sky blue?\nA: Yes, it is.\n\nQ: Is snow green?\nA: No, it is white."
    questions = replace(truthfulqa(shared, 10), template=replace(QA, system=examples))
    context = examples + "\n\nQ: {{question}}\nA:"
    check_equal(stories, questions, doc_to_text=context)
    with pytest.raises(AssertionError):
        check_equal(stories, questions)


PAIRS = {
    "a space at the end of the context": ("Once upon a time there was ", "a dog that ran away"),
    "two spaces and a line break": ("Lily said: \n  ", "Hello"),
    "a word that continues": ("The little g", "irl was happy and"),
    "no space": ("She was very", "happy."),
    "no context": ("", "Once upon a time"),
    "a context that begins with the BOS token": ("<|start_story|>Once upon", " a time there was"),
    "no context, and a text that begins with the BOS token": ("", "<|start_story|>Once"),
    "longer than the context window": ("The dog ran to the big park. " * 80, "He was happy."),
    "other scripts": ("Café “Zoë” \u00a0", "été 北京"),
}


def test_tokens_of_contexts_and_continuations_equal_the_harness(stories: Tried) -> None:
    from lm_eval.api.instance import Instance

    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=place)
        for place, pair in enumerate(PAIRS.values())
    ]
    for condition, harness in stories.harness.items():
        theirs = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
        acting = stories.neurons if condition == "ablated" else NeuronSet()
        ours = log_likelihoods(stories.model, list(PAIRS.values()), neurons=acting)
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_whole_answers_of_smollm2_equal_the_harness(plain_smollm2: Any, shared: Path) -> None:
    model, tokenizer = plain_smollm2
    check_equal(tried(lambda: copy.deepcopy(model), tokenizer, "hooked", 20), truthfulqa(shared, N_SLOW))
