"""Metrics of whole answers as lm-evaluation-harness computes them: acc, acc_norm, and MC1 and MC2 of TruthfulQA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import softmax

from tn_lens.core.errors import BadInput
from tn_lens.core.registry import Registry
from tn_lens.evaluation.likelihoods import log_likelihoods
from tn_lens.inference.interventions import Intervention, check_acts_on_any_text
from tn_lens.models import Model, backend_of
from tn_lens.neurons import NeuronSet
from tn_lens.questions.formats import QA
from tn_lens.questions.prompts import PromptEncoder
from tn_lens.questions.question import Question, QuestionSet
from tn_lens.questions.toy import ANSWERED
from tn_lens.runs.chunks import Tensors, chunk_key
from tn_lens.runs.context import map_chunks

PAIRS = 512
"""Answers per chunk."""

LogLikelihoods = Mapping[str, float]
"""Log-likelihood, in nats, of each answer to a question by its text."""


@dataclass(frozen=True)
class Metric:
    """A metric of one question: its value in [0, 1] from the log-likelihoods of the answers."""

    value: Callable[[Question, LogLikelihoods], float]
    needs_lists: bool = False
    """Whether it needs `Question.correct` and `Question.incorrect`."""


def acc(question: Question, values: LogLikelihoods) -> float:
    """1 if the right choice has the largest log-likelihood, else 0."""
    return float(np.argmax([values[choice] for choice in question.choices]) == question.answer)


def acc_norm(question: Question, values: LogLikelihoods) -> float:
    """1 if the right choice has the largest log-likelihood per character, else 0."""
    return float(np.argmax([values[choice] / len(choice) for choice in question.choices]) == question.answer)


def mc1(question: Question, values: LogLikelihoods) -> float:
    """1 if the right choice has a larger log-likelihood than every incorrect answer, else 0 (Lin et al. 2022)."""
    best = question.choices[question.answer]
    return float(np.argmax([values[answer] for answer in (best, *question.incorrect)]) == 0)


def mc2(question: Question, values: LogLikelihoods) -> float:
    """Probability of all correct answers, normalized over the correct and incorrect answers (Lin et al. 2022)."""
    probabilities = softmax([values[answer] for answer in (*question.correct, *question.incorrect)])
    return float(probabilities[: len(question.correct)].sum())


METRICS: Registry[Metric] = Registry("metric")
"""All metrics by name."""
for _name, _metric in {
    "acc": Metric(acc),
    "acc_norm": Metric(acc_norm),
    "mc1": Metric(mc1, needs_lists=True),
    "mc2": Metric(mc2, needs_lists=True),
}.items():
    METRICS.register(_name, _metric)


def check_metrics(questions: QuestionSet, names: Sequence[str], intervention: Intervention) -> None:
    """Check that metrics can be computed.

    Raises:
        BadInput: a metric is unknown, needs lists of answers that a question lacks, or the intervention needs prompts.
    """
    for name in names:
        lacking = [q for q in questions if METRICS[name].needs_lists and not (q.correct and q.incorrect)]
        if lacking:
            raise BadInput(
                f"{name} needs the correct and incorrect answers of every question, which {questions.name} lacks for "
                f"{lacking[0].text!r:.60}; add them, or use acc and acc_norm"
            )
    if names:
        check_acts_on_any_text(intervention, "a log-likelihood")


def answer_pairs(model: Model, questions: QuestionSet, *, has_lists: bool) -> list[dict[str, tuple[str, str]]]:
    """The context and the continuation of every answer to each question, by the text of the answer.

    The context is the prompt of the set's own template if its kind is "completion", and of the format "qa" otherwise.

    Args:
        model: model with the tokenizer and chat template to use.
        questions: questions, and solved examples that are shown before each of them.
        has_lists: whether to include the correct and incorrect answers in addition to the choices.
    """
    template = questions.template
    if template.kind != "completion":
        template = ANSWERED if backend_of(model).name == "toy" else QA  # the toy model lacks the words "Q" and "A"
    encoder = PromptEncoder(model, replace(questions, template=template))
    pairs = []
    for question in questions:
        lists = (*question.correct, *question.incorrect) if has_lists else ()
        answers = tuple(dict.fromkeys((*question.choices, *lists)))
        context = encoder.render(question, tuple(range(len(question.choices)))).text
        rendered = encoder.render(replace(question, choices=answers), tuple(range(len(answers))))
        pairs.append({answer: (context, text) for answer, text in zip(answers, rendered.answers, strict=True)})
    return pairs


def metric_values(
    model: Model,
    questions: QuestionSet,
    names: Sequence[str],
    sets: Sequence[NeuronSet],
    intervention: Intervention,
) -> dict[str, dict[NeuronSet, Float[np.ndarray, " question"]]]:
    """The metrics of every question with each set of neurons ablated: metric -> neurons -> values in [0, 1]."""
    pairs_of = answer_pairs(model, questions, has_lists=any(METRICS[name].needs_lists for name in names))
    pairs = [pair for answers in pairs_of for pair in answers.values()]
    blocks = [pairs[start : start + PAIRS] for start in range(0, len(pairs), PAIRS)]
    block_keys = [chunk_key(block) for block in blocks]
    chunks = [(neurons, place) for neurons in sets for place in range(len(blocks))]

    def compute(index: int) -> Tensors:
        neurons, place = chunks[index]
        values = log_likelihoods(model, blocks[place], neurons=neurons, intervention=intervention)
        return {"log_likelihoods": torch.tensor(values, dtype=torch.float64)}

    keys = [chunk_key("log_likelihoods", block_keys[place], neurons, intervention) for neurons, place in chunks]
    computed = iter(map_chunks("log_likelihoods", keys, compute, "answers as texts"))
    metrics: dict[str, dict[NeuronSet, np.ndarray]] = {name: {} for name in names}
    for neurons in sets:
        values = iter(torch.cat([next(computed)["log_likelihoods"] for _ in blocks]).tolist())
        by_answer = [{answer: next(values) for answer in answers} for answers in pairs_of]
        for name in names:
            scores = [METRICS[name].value(*each) for each in zip(questions, by_answer, strict=True)]
            metrics[name][neurons] = np.array(scores)
    return metrics
