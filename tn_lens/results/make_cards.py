"""Make neuron cards, with one pass over the scores and one over the prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.attribution.result import ScoreSource, mean_by_question
from tn_lens.core.errors import BadInput
from tn_lens.core.tokens import token_text, unknown_tokens
from tn_lens.evaluation.diagnosis import Diagnosis
from tn_lens.inference.forward import Layout, asked_chunks, prompt_logits
from tn_lens.inference.manipulation import ManipulationCheck
from tn_lens.models import Hooks, Model, backend_of, neuron_space
from tn_lens.models.isolation import isolated
from tn_lens.neurons import Neuron, NeuronSet, hook_name
from tn_lens.questions.formats import VERDICTS
from tn_lens.questions.prompts import Prompt, PromptSet
from tn_lens.questions.question import Question, QuestionSet
from tn_lens.results.card import Activation, Card, Example, Token
from tn_lens.runs.chunks import Tensors, chunk_key
from tn_lens.runs.context import map_chunks
from tn_lens.selection.result import Selection

N_CARDS = 50
"""Maximum number of neurons of a run that get a card."""


@isolated
def neuron_card(
    model: Model, neuron: Neuron | str, scores: ScoreSource, check: ManipulationCheck, **about: Any
) -> Card:
    """The card of any neuron, found or not: `neuron_card(model, "mlp 1:33", scores, check, questions=questions)`.

    Args:
        model: the model.
        neuron: the neuron, or its name, for example "mlp 3:17" or "attn 2.h1:5".
        scores: an `Attribution`, or the scores of a run folder.
        check: the manipulation check before the attribution; its prompts are run once to read the activations.
        about: selection, diagnosis, questions, n_examples and n_tokens of `make_cards`.

    Raises:
        BadInput: the text is not the name of a neuron, or the model has no such neuron.
    """
    neuron = Neuron.from_name(neuron) if isinstance(neuron, str) else neuron
    (card,) = make_cards(model, scores, check, neurons=[neuron], **about)
    return card


@isolated
def make_cards(
    model: Model,
    scores: ScoreSource,
    check: ManipulationCheck,
    *,
    neurons: Iterable[Neuron] | None = None,
    selection: Selection | None = None,
    diagnosis: Diagnosis | None = None,
    questions: QuestionSet | None = None,
    n_examples: int = 5,
    n_tokens: int = 10,
    columns: Float[Tensor, "prompt neuron"] | None = None,
) -> tuple[Card, ...]:
    """Cards of several neurons in one pass over the scores and one over the prompts.

    Args:
        model: the model.
        scores: an `Attribution`, or the scores of a run folder.
        check: the manipulation check before the attribution; its prompts are run once to read the activations.
        neurons: neurons to make cards of; by default the strongest 50 of the selection, strongest first.
        selection: selection with the statistics of candidates.
        diagnosis: diagnosis with the verdicts.
        questions: the set that the prompts were built from, to show questions and answers; otherwise cards show prompts.
        n_examples: number of questions with the highest, and with the lowest, D.
        n_tokens: number of tokens with the highest, and with the lowest, direct logit attribution.
        columns: D of the neurons, in the order of `neurons` (of `selection.neurons` by default), if already read.

    Raises:
        BadInput: neither neurons nor a selection are given, or the model does not have the neurons.
    """
    if neurons is None and selection is None:
        raise BadInput("expected neurons, or a selection, whose strongest neurons get a card; got neither")
    found = NeuronSet() if selection is None else selection.neurons
    given = list(found if neurons is None else dict.fromkeys(neurons))
    chosen = given if neurons is not None or selection is None else selection.by_strength[:N_CARDS]
    neuron_space(model).check(NeuronSet(chosen))
    if not chosen:
        return ()
    columns = scores.at(chosen) if columns is None else columns[:, [given.index(n) for n in chosen]].float()
    differences = mean_by_question(columns, scores.prompts).double().numpy()
    activations = _activations(model, check.asked, chosen)
    statistics = {} if selection is None else selection.statistics()
    diagnosed = {} if diagnosis is None else diagnosis.records()
    attributions = _direct_logits(model, chosen, check, n_tokens)
    texts = _texts(scores.prompts, check.asked, questions)
    groups = _groups(check)
    convergence = scores.convergence()
    unconverged = {} if convergence is None else {(u.site, u.layer): u for u in convergence.unconverged()}
    return tuple(
        Card(
            neuron=neuron,
            model_name=backend_of(model).name,
            n_layers=neuron_space(model).n_layers,
            n_beside=None if selection is None else len(found.at(neuron.site, neuron.layer) - {neuron}),
            statistics=statistics.get(neuron, {}),
            diagnosis=diagnosed.get(neuron, {}),
            **_examples(texts, differences[:, place], n_examples),
            n_questions=len(texts),
            share_positive=float((differences[:, place] > 0).mean()) if texts else float("nan"),
            activations={name: _activation(activations[rows, place]) for name, rows in groups.items()},
            **attributions[place],
            unconverged=unconverged.get((neuron.site, neuron.layer)),
        )
        for place, neuron in enumerate(chosen)
    )


def _activations(model: Model, prompts: PromptSet, neurons: Sequence[Neuron]) -> Float[np.ndarray, "prompt neuron"]:
    """The neurons' activations at the last position of each prompt, in float64."""
    chunks = asked_chunks(model, prompts)
    keys = [chunk_key("activations", neurons, chunk) for chunk in chunks]
    computed = map_chunks("activations", keys, lambda index: _read(model, chunks[index], neurons), "cards")
    return torch.cat([chunk["activations"] for chunk in computed]).numpy()


def _read(model: Model, prompts: Sequence[Prompt], neurons: Sequence[Neuron]) -> Tensors:
    """The activations of one chunk of prompts, by the name "activations"."""
    space = neuron_space(model)
    activations = torch.zeros(len(prompts), len(neurons), dtype=torch.float64)
    places: dict[str, list[int]] = {}
    for place, neuron in enumerate(neurons):
        places.setdefault(hook_name(neuron.site, neuron.layer), []).append(place)

    def hooks(layout: Layout) -> Hooks:
        def keep(value: Tensor, hook: Any) -> None:
            last = (layout.lengths - 1).to(value.device)
            # [row, column, ...] -> [row, neuron of the site]
            read = value.flatten(2)[torch.arange(len(last), device=value.device), last].double().cpu()
            for place in places[hook.name]:
                activations[list(layout.rows), place] = read[:, space.flat(neurons[place])]

        return [(name, keep) for name in places]

    for _ in prompt_logits(model, prompts, hooks=hooks):
        pass
    return {"activations": activations}


def _groups(check: ManipulationCheck) -> dict[str, list[int]]:
    """Rows of the asked prompts by whether the model answers correctly, and by the position of the right answer."""
    answered = ["answered right" if is_right else "answered wrong" for is_right in check.right.tolist()]
    shown = [f"right answer {_at(prompt.labels[prompt.right])}" if prompt.labels else "" for prompt in check.asked]
    # if the right answer always has the same label, that group would contain all prompts
    groupings = [answered, shown] if len(set(shown)) > 1 else [answered]
    return {
        name: [row for row, group in enumerate(groups) if group == name]
        for groups in groupings
        for name in sorted(set(groups))
    }


def _at(label: str) -> str:
    """The label of the right answer, after "right answer"."""
    return f"is {label}" if label in VERDICTS else f"at {label}"


def _activation(values: Float[np.ndarray, " prompt"]) -> Activation:
    std = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    return Activation(mean=float(values.mean()), std=std, n=len(values))


def _direct_logits(
    model: Model, neurons: Sequence[Neuron], check: ManipulationCheck, n_tokens: int
) -> list[dict[str, Any]]:
    """For each neuron the tokens that it promotes and demotes, and the labels if all prompts share them."""
    logits = backend_of(model).direct_logits(neurons)
    if logits is None:
        return [{"promotes": (), "demotes": (), "labels": ()} for _ in neurons]
    labels = {prompt.label_ids for prompt in check.asked}
    label_ids = [i for ids in labels.pop() for i in ids] if len(labels) == 1 else []
    # ids that pad the vocabulary must not be in either list
    unknown = torch.tensor(unknown_tokens(model.tokenizer, logits.shape[1]), dtype=torch.long)
    n_tokens = min(n_tokens, (logits.shape[1] - len(unknown)) // 2)
    lists = []
    for row in logits:
        highest, lowest = (
            row.index_fill(0, unknown, sign * -torch.inf).mul(sign).topk(n_tokens).indices.tolist() for sign in (1, -1)
        )
        chosen = {"promotes": highest, "demotes": lowest, "labels": label_ids}
        lists.append(
            {
                name: tuple(Token(token_text(model.tokenizer, i), i, float(row[i])) for i in ids)
                for name, ids in chosen.items()
            }
        )
    return lists


def _texts(prompts: PromptSet, asked: PromptSet, questions: QuestionSet | None) -> list[dict[str, Any]]:
    """For each question its id, category, text and answers; without the question set, the text of the prompt.

    Raises:
        BadInput: the prompts were built from another question set.
    """
    shown = {prompt.question: prompt for prompt in asked}
    by_id: Mapping[str, Question] = {question.id: question for question in questions or ()}
    texts = []
    for question in prompts.groups:
        about = {"question": question, "category": shown[question].category}
        if questions is None:
            texts.append({**about, "text": shown[question].text or f"question {question}", "right": "", "wrong": ()})
            continue
        if question not in by_id:
            raise BadInput(
                f"the question set has no question {question!r}, which a prompt was built from; give the "
                "question set that was passed to build_prompts"
            )
        choices, answer = by_id[question].choices, by_id[question].answer
        wrong = tuple(choice for index, choice in enumerate(choices) if index != answer)
        texts.append({**about, "text": by_id[question].text, "right": choices[answer], "wrong": wrong})
    return texts


def _examples(
    texts: Sequence[Mapping[str, Any]], differences: Float[np.ndarray, " question"], n: int
) -> dict[str, Any]:
    """The questions with the highest D, highest first, and those with the lowest, lowest first."""
    ranked = np.argsort(-differences, kind="stable").tolist()
    places = {"supports": ranked[:n], "opposes": ranked[max(n, len(ranked) - n) :][::-1]}
    return {
        name: tuple(Example(**texts[place], difference=float(differences[place])) for place in at)
        for name, at in places.items()
    }
