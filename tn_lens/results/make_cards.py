"""Cards of some neurons: one pass over the scores, one over the prompts, and rows of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from tn_lens.core.errors import BadInput
from tn_lens.evaluation.diagnosis import Diagnosis
from tn_lens.inference.forward import Layout, prompt_logits
from tn_lens.inference.manipulation import ManipulationCheck, is_right
from tn_lens.models import Hooks, Model, backend_of, neuron_space
from tn_lens.neurons.neuron import Neuron, NeuronSet, hook_name
from tn_lens.prompts import Prompt
from tn_lens.questions.question import LETTERS, QuestionSet
from tn_lens.results.card import Activation, Card, Example, Token
from tn_lens.results.tokens import token_text, unknown_tokens
from tn_lens.runs.units import PROMPTS_ASKED, Mapper, cut_prompts, in_memory, unit_key
from tn_lens.selection.select import ScoreSource, Selection

N_CARDS = 50
"""Neurons of a run that get a card."""


def neuron_card(
    model: Model,
    neuron: Neuron | str,
    scores: ScoreSource,
    check: ManipulationCheck,
    *,
    selection: Selection | None = None,
    diagnosis: Diagnosis | None = None,
    questions: QuestionSet | None = None,
    n_examples: int = 5,
    n_tokens: int = 10,
) -> Card:
    """Look one neuron up, found or not: `neuron_card(model, "mlp 1:33", scores, check, questions=finding)`.

    Args:
        model: the model.
        neuron: or its name, as in "mlp 3:17" or "attn 2.h1:5".
        scores: an `Attribution`, or the scores of a run folder.
        check: the manipulation check before it, whose prompts are run once for the activations.
        selection: gives the statistics of candidates.
        diagnosis: gives the verdict.
        questions: the set that the prompts were built from, to show questions and answers; else what the model read.
        n_examples: questions on each side.
        n_tokens: tokens on each side.

    Raises:
        BadInput: the name is none, or the model has no such neuron.
    """
    neuron = Neuron.from_name(neuron) if isinstance(neuron, str) else neuron
    (card,) = make_cards(
        model,
        scores,
        check,
        neurons=[neuron],
        selection=selection,
        diagnosis=diagnosis,
        questions=questions,
        n_examples=n_examples,
        n_tokens=n_tokens,
    )
    return card


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
    progress: bool = False,
    mapper: Mapper = in_memory,
) -> tuple[Card, ...]:
    """Cards of several neurons in one pass over the scores and one over the prompts.

    Args:
        neurons: by default the strongest 50 of the selection, strongest first.
        progress: show a progress bar.
        mapper: computes the activations of some hundreds of prompts, or knows them.
        model, scores, check, selection, diagnosis, questions, n_examples, n_tokens: as for `neuron_card`.

    Raises:
        BadInput: neither neurons nor a selection, or neurons that the model does not have.
    """
    if neurons is None and selection is None:
        raise BadInput("expected neurons to make cards of, or a selection, whose strongest are taken; got neither")
    records = {} if selection is None else _records(selection)
    found = NeuronSet() if selection is None else selection.neurons
    chosen = [n for n in records if n in found][:N_CARDS] if neurons is None else list(dict.fromkeys(neurons))
    space = neuron_space(model)
    space.check(NeuronSet(chosen))
    if not chosen:
        return ()
    diagnosed = {} if diagnosis is None else diagnosis.records()
    asked, differences = _differences(scores, chosen)
    known = {p.question: p for p in check.asked}
    parts = cut_prompts(check.asked, PROMPTS_ASKED)
    read = mapper(
        "activations",
        [unit_key("activations", chosen, part) for part in parts],
        lambda index: {"activations": _activations(model, parts[index], chosen)},
        "cards" if progress else None,
    )
    activations = torch.cat([part["activations"] for part in read]).numpy()
    groups = _groups(check)
    logits = backend_of(model).direct_logits(chosen)
    readable = logits is not None
    logits = torch.zeros(len(chosen), 0) if logits is None else logits
    unknown = unknown_tokens(model.tokenizer, logits.shape[1])
    labels = {p.label_ids for p in check.asked}
    label_ids = [i for ids in labels.pop() for i in ids] if len(labels) == 1 and readable else []
    n_tokens = min(n_tokens, (logits.shape[1] - len(unknown)) // 2)
    cards = []
    for place, neuron in enumerate(chosen):
        of = differences[:, place]
        ranked = np.argsort(-of, kind="stable").tolist()
        most, least = ranked[:n_examples], ranked[max(n_examples, len(ranked) - n_examples) :][::-1]
        supports, opposes = (
            tuple(_example(known[asked[row]], questions, float(of[row])) for row in rows) for rows in (most, least)
        )
        raised, lowered = (
            logits[place].index_fill(0, torch.tensor(unknown, dtype=torch.long), sign * -torch.inf).mul(sign)
            for sign in (1, -1)
        )
        cards.append(
            Card(
                neuron=neuron,
                model_name=backend_of(model).name,
                n_layers=space.n_layers,
                n_beside=None if selection is None else len(found.at(neuron.site, neuron.layer) - {neuron}),
                statistics=records.get(neuron, {}),
                diagnosis=diagnosed.get(neuron, {}),
                supports=supports,
                opposes=opposes,
                n_questions=len(asked),
                share_positive=float((of > 0).mean()) if len(of) else float("nan"),
                activations={name: _activation(activations[rows, place]) for name, rows in groups.items()},
                promotes=_tokens(model, logits[place], raised.topk(n_tokens).indices.tolist()),
                demotes=_tokens(model, logits[place], lowered.topk(n_tokens).indices.tolist()),
                labels=_tokens(model, logits[place], label_ids),
            )
        )
    return tuple(cards)


def _records(selection: Selection) -> dict[Neuron, dict[str, Any]]:
    """Every candidate's statistics, strongest first."""
    place = ("site", "layer", "head", "index")
    records: dict[Neuron, dict[str, Any]] = {}
    for row in selection.to_frame(candidates=True).to_dict("records"):
        head = None if row["site"] == "mlp" else int(row["head"])
        neuron = Neuron(row["site"], int(row["layer"]), head, int(row["index"]))
        records[neuron] = {str(key): value for key, value in row.items() if key not in place}
    return records


def _differences(
    scores: ScoreSource, neurons: Sequence[Neuron]
) -> tuple[list[int], Float[np.ndarray, "question neuron"]]:
    """The questions with scores, and the neurons' D there."""
    flat = [scores.space.flat(n) for n in neurons]
    asked, rows = [], []
    for question, of in scores.per_question():
        asked.append(question)
        rows.append([float(of[n.site][n.layer, at]) for n, at in zip(neurons, flat, strict=True)])
    return asked, np.array(rows, dtype=np.float64).reshape(len(asked), len(neurons))


def _activations(
    model: Model, prompts: Sequence[Prompt], neurons: Sequence[Neuron]
) -> Float[torch.Tensor, "prompt neuron"]:
    """The neurons' activations at the last position of each prompt, in float64."""
    space = neuron_space(model)
    kept = torch.zeros(len(prompts), len(neurons), dtype=torch.float64)
    places: dict[str, list[int]] = {}
    for place, n in enumerate(neurons):
        places.setdefault(hook_name(n.site, n.layer), []).append(place)

    def hooks(layout: Layout) -> Hooks:
        last = layout.lengths - 1 - layout.first

        def keep(value: torch.Tensor, hook: Any) -> None:
            of = places[hook.name]
            columns = [space.flat(neurons[place]) for place in of]
            at = torch.arange(len(layout.rows), device=value.device)
            read = value.flatten(2)[at, last.to(value.device)][:, columns]
            kept[torch.tensor(layout.rows)[:, None], torch.tensor(of)] = read.double().cpu()

        return [(name, keep) for name in places] if layout.rows else []

    for _ in prompt_logits(model, prompts, hooks=hooks):
        pass
    return kept


def _groups(check: ManipulationCheck) -> dict[str, list[int]]:
    """Rows of the asked prompts: by whether the model answers right, and by where the right answer is shown."""
    right = is_right(check.probabilities, check.asked).tolist()
    groups = {
        "answered right": [row for row, is_so in enumerate(right) if is_so],
        "answered wrong": [row for row, is_so in enumerate(right) if not is_so],
    }
    shown = sorted({p.right for p in check.asked})
    if len(shown) > 1:
        groups |= {
            f"right answer at {LETTERS[at]}": [row for row, p in enumerate(check.asked) if p.right == at]
            for at in shown
        }
    return {name: rows for name, rows in groups.items() if rows}


def _activation(values: Float[np.ndarray, " prompt"]) -> Activation:
    std = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    return Activation(mean=float(values.mean()), std=std, n=len(values))


def _example(prompt: Prompt, questions: QuestionSet | None, difference: float) -> Example:
    """A question in words; where its set is not at hand, what the model read, or its number."""
    if questions is None:
        text, right, wrong = prompt.text or f"question {prompt.question}", "", ()
    else:
        if prompt.question >= len(questions):
            raise BadInput(
                f"expected the questions that the prompts were built from, and got {len(questions)} while a prompt belongs to "
                f"number {prompt.question}; give the same set to build_prompts and here"
            )
        one = questions[prompt.question]
        text, right = one.text, one.choices[one.answer]
        wrong = tuple(choice for index, choice in enumerate(one.choices) if index != one.answer)
    return Example(
        question=prompt.question,
        text=text,
        right=right,
        wrong=wrong,
        category=prompt.category,
        difference=difference,
    )


def _tokens(model: Model, logits: Float[torch.Tensor, " vocab"], ids: list[int]) -> tuple[Token, ...]:
    return tuple(Token(token_text(model.tokenizer, i), i, float(logits[i])) for i in ids)
