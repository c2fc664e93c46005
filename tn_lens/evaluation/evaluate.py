"""Accuracy with the found neurons ablated, compared with controls (paper 3.3, 3.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float, Int

from tn_lens.core.errors import BadInput
from tn_lens.core.options import Condition, Order
from tn_lens.core.seeds import generator
from tn_lens.evaluation.controls import CONTROLS, Activity
from tn_lens.evaluation.metrics import check_metrics, metric_values
from tn_lens.evaluation.result import Evaluation
from tn_lens.evaluation.text import Text, encode_texts, loss_of_rows
from tn_lens.inference.answers import ZERO, Asking, ask_each
from tn_lens.inference.interventions import Intervention, Mean, intervention_called
from tn_lens.inference.means import mean_activations
from tn_lens.models import Model, backend_of, neuron_space
from tn_lens.models.isolation import isolated
from tn_lens.neurons import NeuronSet, usual_sites
from tn_lens.questions.prompts import PromptSet, build_prompts, stream_of
from tn_lens.questions.question import QuestionSet
from tn_lens.runs.chunks import Tensors, chunk_key
from tn_lens.runs.context import in_stage, map_chunks

ALL_CONDITIONS: tuple[Condition, ...] = ("unablated", "random", "random_matched", "top_activation", "ablated")


@isolated
def evaluate(
    model: Model,
    questions: QuestionSet,
    neurons: NeuronSet,
    *,
    n_repetitions: int = 10,
    conditions: Sequence[str] = ALL_CONDITIONS,
    intervention: Intervention | str = ZERO,
    order: Order | None = None,
    control_orders: Literal["both", "drawn"] = "both",
    texts: Sequence[Text] | None = None,
    metrics: Sequence[str] = (),
    seed: int = 0,
    drop_long: bool = False,
) -> Evaluation:
    """Ask the questions without ablation, with each control and with the found neurons ablated (paper 3.3).

    Each repetition draws an order of the choices for every question; all conditions share the orders. Controls draw new
    neurons in each repetition, never a found one: `"random"` uniformly (the paper), `"random_matched"` as many in each
    site and layer as were found there, `"top_activation"` likewise among the most active. Every order of a question is
    asked once per set of neurons, and the repetitions sample from these answers, so that letter bias can be averaged out.

    Args:
        model: the model.
        questions: the questions to ask.
        neurons: the found set.
        n_repetitions: number of draws of orders and of control neurons.
        conditions: names of the conditions to run, `"unablated"`, `"ablated"` and names of registered controls; the first
            two are required.
        intervention: the intervention on the neurons, the same in every condition: an `Intervention`, or the name of one
            that needs no argument; zero-ablation (the paper) by default.
        order: `"both"` shows every choice at every letter, `"given"` keeps the order of the question set; by default as in
            the set's standard evaluation: `"given"` for MMLU, else `"both"`.
        control_orders: `"both"` evaluates each draw of a control in every order, `"drawn"` only in the order that its
            repetition drew, which takes half the time and gives the same accuracies (except for `Resample`, which samples
            from the prompts that are asked), but no order-averaged accuracies of the controls.
        texts: plain texts on which the loss is measured, to show how specific the effect is; see `text_loss`.
        metrics: metrics of whole answers that are computed as well: `"acc"`, `"acc_norm"`, `"mc1"`, `"mc2"`, or registered
            ones; see `tn_lens.evaluation.metrics`.
        seed: seed for orders and control neurons.
        drop_long: leave out questions beyond the context window instead of raising.

    Raises:
        BadInput: there are no repetitions or no questions, a condition is unknown or missing, the neurons are not those of
            the model, `texts` or `metrics` are given with an intervention that needs prompts, or a metric is unknown.
    """
    if isinstance(intervention, str):
        intervention = intervention_called(intervention, seed)
    order = order or ("given" if questions.fixed_order else "both")
    _check_arguments(model, questions, neurons, n_repetitions, conditions, order)
    prompts = build_prompts(model, questions, order=order, drop_long=drop_long)
    acting = with_values(model, prompts, neurons, intervention)
    check_metrics(questions, metrics, acting)
    sets = draw_sets(model, prompts, neurons, conditions, n_repetitions, seed)
    asked = draw_orders(prompts, n_repetitions, seed)
    # equal sets of neurons, such as those of several repetitions, are asked once
    rows_of: dict[NeuronSet, set[int]] = {}
    for drawn in sets.values():
        for repetition, control in enumerate(drawn):
            only_drawn = control_orders == "drawn" and len(drawn) > 1
            rows = asked[repetition].tolist() if only_drawn else range(len(prompts))
            rows_of.setdefault(control, set()).update(rows)
    answers = _answers(model, prompts, rows_of, acting)
    losses = None if texts is None else _losses(model, texts, list(rows_of), acting)
    # questions that were left out have no metrics either
    values = metric_values(model, questions.only(prompts.groups), metrics, list(rows_of), acting) if metrics else {}
    return Evaluation(
        name=questions.name,
        prompts=prompts,
        asked=asked,
        neurons=neurons,
        probabilities=_by_condition(answers, sets),
        seed=seed,
        model_name=backend_of(model).name,
        intervention=intervention.description,
        text_loss=None if losses is None else _by_condition(losses, sets),
        metrics={metric: _by_condition(by_set, sets) for metric, by_set in values.items()},
        left_out=tuple(f"row {row.row}: {row.reason}" for row in questions.dropped),
    )


def _check_arguments(
    model: Model, questions: QuestionSet, neurons: NeuronSet, n_repetitions: int, conditions: Sequence[str], order: str
) -> None:
    if not isinstance(neurons, NeuronSet):
        raise BadInput(
            f"expected a NeuronSet (selection.neurons, or NeuronSet.load(path)), got {type(neurons).__name__}"
        )
    neuron_space(model).check(neurons)
    if missing := {"unablated", "ablated"} - set(conditions):
        raise BadInput(
            f"conditions must include 'unablated' and 'ablated', which are compared; {sorted(missing)[0]!r} is missing"
        )
    if n_repetitions < 1 or not questions:
        raise BadInput(
            f"evaluate needs at least one repetition and one question; got {n_repetitions} and {len(questions)}"
        )
    if unknown := set(conditions) - {"unablated", "ablated", *CONTROLS}:
        known = ", ".join(("unablated", *CONTROLS, "ablated"))
        raise BadInput(f"unknown condition {sorted(unknown)[0]!r}: expected {known}")
    if order not in ("both", "given"):
        raise BadInput(f"expected order 'both' or 'given', got {order!r}; the repetitions draw the orders themselves")


def _by_condition(
    by_set: Mapping[NeuronSet, Any], sets: Mapping[str, Sequence[NeuronSet]]
) -> dict[str, Float[np.ndarray, "draw *_"]]:
    """The values of the sets of neurons that each condition drew."""
    return {name: np.stack([by_set[neurons] for neurons in drawn]) for name, drawn in sets.items()}


def with_values(model: Model, prompts: PromptSet, neurons: NeuronSet, intervention: Intervention) -> Intervention:
    """The intervention, with means over the prompts if it needs them: they are the same for every set of neurons."""
    if not isinstance(intervention, Mean) or not intervention.needs_prompts:
        return intervention
    sites = usual_sites(neurons.sites)
    means = in_stage("values", mean_activations, model, prompts, positions=intervention.positions, sites=sites)
    return replace(intervention, values=means)


def _answers(
    model: Model, prompts: PromptSet, rows_of: dict[NeuronSet, set[int]], intervention: Intervention
) -> dict[NeuronSet, Float[np.ndarray, "prompt choice"]]:
    """The answers with each set of neurons ablated; NaN for prompts that are not asked."""
    places = {neurons: tuple(sorted(rows)) for neurons, rows in rows_of.items()}
    # conditions that ask the same prompts share one PromptSet, which is then split and hashed only once
    subsets = {at: PromptSet(tuple(prompts[row] for row in at)) for at in set(places.values())}
    askings = [
        Asking(prompts=subsets[at], neurons=neurons, intervention=intervention) for neurons, at in places.items()
    ]
    answers: dict[NeuronSet, np.ndarray] = {}
    for (neurons, at), probabilities in zip(places.items(), ask_each(model, askings), strict=True):
        answers[neurons] = np.full((len(prompts), prompts.n_choices), np.nan)
        answers[neurons][list(at), : probabilities.shape[1]] = probabilities.double().numpy()
    return answers


def _losses(
    model: Model, texts: Sequence[Text], sets: Sequence[NeuronSet], intervention: Intervention
) -> dict[NeuronSet, float]:
    """The loss on plain text with each set of neurons ablated."""
    encoded = encode_texts(model, texts)

    def compute(index: int) -> Tensors:
        loss = loss_of_rows(model, encoded, neurons=sets[index], intervention=intervention)
        return {"loss": torch.tensor(loss, dtype=torch.float64)}

    keys = [chunk_key("loss", texts, neurons, intervention) for neurons in sets]
    computed = map_chunks("loss", keys, compute, "loss on plain text")
    return {neurons: float(chunk["loss"]) for neurons, chunk in zip(sets, computed, strict=True)}


def draw_orders(prompts: PromptSet, n_repetitions: int, seed: int) -> Int[np.ndarray, "repetition question"]:
    """The prompt of every question that each repetition asks, drawn from a stream of the seed and the question's id."""
    # a separate stream for every question, so that leaving one out does not change the draws of the others
    columns = [
        rows.start + generator(seed, 1, stream_of(question)).integers(0, len(rows), size=n_repetitions)
        for question, rows in prompts.groups.items()
    ]
    return np.stack(columns, axis=1)


def draw_sets(
    model: Model, prompts: PromptSet, neurons: NeuronSet, conditions: Sequence[str], n_repetitions: int, seed: int
) -> dict[str, list[NeuronSet]]:
    """The neurons to ablate under each condition: one set, or a new one in each repetition."""
    space = neuron_space(model, usual_sites(neurons.sites))

    @cache
    def activity() -> Activity:
        return in_stage("activity", mean_activations, model, prompts, absolute=True, sites=space.sites)

    # controls that share a stream draw from it one after the other
    streams: dict[int, np.random.Generator] = {}
    sets: dict[str, list[NeuronSet]] = {"unablated": [NeuronSet()]}
    for name in conditions:
        if name in CONTROLS:
            control = CONTROLS[name]
            stream = crc32(name.encode()) if control.stream is None else control.stream
            rng = streams.setdefault(stream, generator(seed, stream))
            sets[name] = [control.draw(space, neurons, activity, rng) for _ in range(n_repetitions)]
    # in the order of the registry, regardless of the order of the arguments
    ordered = ["unablated", *(name for name in CONTROLS if name in sets)]
    return {name: sets[name] for name in ordered} | {"ablated": [neurons]}
