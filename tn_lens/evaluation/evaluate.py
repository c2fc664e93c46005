"""Does it matter? Accuracy with the found neurons suppressed, beside every control (paper 3.3, 3.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.evaluation.condition import ARMS, ArmName
from tn_lens.evaluation.controls import active_neurons, matched_neurons, random_neurons
from tn_lens.evaluation.result import Evaluation
from tn_lens.evaluation.text import Text, text_loss
from tn_lens.inference.answers import ask_each
from tn_lens.inference.forward import Where
from tn_lens.inference.interventions import Intervention, Mode, mean_activations
from tn_lens.models import Model, backend_of, neuron_space
from tn_lens.neurons.neuron import NeuronSet, NeuronSpace, Site
from tn_lens.prompts import Order, Prompt, build_prompts, by_question
from tn_lens.questions.question import QuestionSet
from tn_lens.runs.units import Mapper, in_memory, unit_key, within


def evaluate(
    model: Model,
    questions: QuestionSet,
    neurons: NeuronSet,
    *,
    n_repetitions: int = 10,
    arms: Sequence[ArmName] = ARMS,
    mode: Mode = "zero",
    factor: float | int | None = None,
    positions: Where = "all",
    order: Order | None = None,
    control_orders: Literal["both", "drawn"] = "both",
    texts: Sequence[Text] | None = None,
    seed: int = 0,
    progress: bool = False,
    drop_long: bool = False,
    mapper: Mapper = in_memory,
) -> Evaluation:
    """Ask the questions untouched, with each control and with the found neurons suppressed (paper 3.3).

    Each repetition draws an order of the choices for every question; all arms share the orders. Control arms draw new
    neurons in each repetition, never a found one: `"random"` uniformly (the paper), `"random_matched"` as many in each
    site and layer as were found there, `"top_activation"` likewise among the most active. Every order of a question is asked
    once per set of neurons, and the repetitions draw from the answers, so that the letters can be averaged out.

    Args:
        model: the model.
        questions: what to ask.
        neurons: the found set.
        n_repetitions: draws of orders and of control neurons.
        arms: conditions to run; `"baseline"` and `"suppressed"` are needed.
        mode: what is done to the neurons, the same in every arm: `"zero"` (the paper), `"scale"`, `"mean"`, `"resample"`;
            see `Intervention`.
        factor: of `"scale"`.
        positions: where it is done: `"all"` (the paper), `"last"`, or from the `"question"` on.
        order: `"both"` asks every choice at every letter, `"given"` keeps the choices where they stand; by default what the
            set's standard evaluation does: `"given"` for MMLU, else `"both"`.
        control_orders: ask each draw of a control in every order, or only in the one that its repetition drew: half the
            time, the same accuracies (but for `"resample"`, which draws among what is asked), and no order-averaged ones
            for the controls.
        texts: plain texts to measure the loss on, as a sign of how specific the effect is; a pair counts its second part.
        seed: of orders and control neurons.
        progress: show a progress bar.
        drop_long: leave out questions beyond the context window instead of refusing.
        mapper: computes the answers under each set of neurons, or knows them.

    Raises:
        BadInput: no repetitions, an unknown arm, a set that does not fit the model, or texts with an intervention that needs
            prompts.
    """
    if not isinstance(neurons, NeuronSet):
        raise BadInput(
            f"expected a NeuronSet (selection.neurons, or NeuronSet.load(path)), got {type(neurons).__name__}"
        )
    space = neuron_space(model)
    space.check(neurons)
    if missing := {"baseline", "suppressed"} - set(arms):
        raise BadInput(f"arms must hold 'baseline' and 'suppressed' to be compared; {sorted(missing)[0]!r} is missing")
    if n_repetitions < 1 or not questions:
        raise BadInput(f"evaluate needs a repetition and a question; got {n_repetitions} and {len(questions)}")
    if unknown := set(arms) - set(ARMS):
        raise BadInput(f"unknown arm {sorted(unknown)[0]!r}: expected {', '.join(ARMS)}")
    order = order or ("given" if questions.fixed_order else "both")
    if order not in ("both", "given"):
        raise BadInput(f"expected order 'both' or 'given', got {order!r}; the repetitions draw the orders themselves")
    whole = Intervention(neurons=neurons, mode=mode, factor=factor, positions=positions, seed=seed)  # refuses early
    prompts = build_prompts(model, questions, order=order, drop_long=drop_long)
    values = None
    if mode == "mean":
        values = mean_activations(model, prompts, positions=positions, mapper=within(mapper, "values"))
    activity = None
    if "top_activation" in arms:
        activity = mean_activations(model, prompts, positions="last", absolute=True, mapper=within(mapper, "activity"))
    sets = draw_sets(space, neurons, arms, n_repetitions, activity, seed)
    asked = draw_orders(prompts, n_repetitions, seed)
    wanted: dict[NeuronSet, set[int]] = {}
    for drawn in sets.values():
        for repetition, one in enumerate(drawn):
            only = control_orders == "drawn" and len(drawn) > 1
            wanted.setdefault(one, set()).update(asked[repetition].tolist() if only else range(len(prompts)))
    done = [
        Intervention(neurons=touched, mode=mode, factor=factor, positions=positions, values=values, seed=seed)
        if touched
        else None
        for touched in wanted
    ]
    places = [tuple(sorted(rows)) for rows in wanted.values()]
    chosen = {at: [prompts[row] for row in at] for at in set(places)}
    text = f"evaluation on {questions.name}" if progress else None
    asked_each = [(intervention, chosen[at]) for intervention, at in zip(done, places, strict=True)]
    held = ask_each(model, asked_each, mapper=mapper, progress=text)
    answers: dict[NeuronSet, np.ndarray] = {}
    for touched, at, found in zip(wanted, places, held, strict=True):
        answers[touched] = np.full((len(prompts), max(p.n_choices for p in prompts)), np.nan)
        answers[touched][list(at), : found.shape[1]] = found.double().numpy()
    losses: dict[NeuronSet, float] = {}
    if texts is not None:
        keys = [unit_key("loss", texts, intervention) for intervention in done]
        measured = mapper(
            "loss", keys, lambda i: {"loss": torch.tensor(text_loss(model, texts, done[i]), dtype=torch.float64)}, text
        )
        losses = {touched: float(one["loss"]) for touched, one in zip(wanted, measured, strict=True)}
    return Evaluation(
        name=questions.name,
        prompts=tuple(prompts),
        asked=asked,
        neurons=neurons,
        probabilities={arm: np.stack([answers[one] for one in drawn]) for arm, drawn in sets.items()},
        seed=seed,
        model_name=backend_of(model).name,
        intervention=describe_intervention(whole),
        text_loss=None
        if texts is None
        else {arm: np.array([losses[one] for one in drawn]) for arm, drawn in sets.items()},
    )


def draw_orders(prompts: Sequence[Prompt], n_repetitions: int, seed: int) -> np.ndarray:
    """Which prompt of every question each repetition asks."""
    n_orders = np.array([len(group) for _, group in by_question(prompts)])
    first = np.cumsum(n_orders) - n_orders
    coins = generator(seed, 1)
    return first + np.stack([coins.integers(0, n_orders) for _ in range(n_repetitions)])


def draw_sets(
    space: NeuronSpace,
    neurons: NeuronSet,
    arms: Sequence[ArmName],
    n_repetitions: int,
    activity: Mapping[Site, Float[Tensor, "layer _"]] | None,
    seed: int,
) -> dict[str, list[NeuronSet]]:
    """Per arm the neurons that are touched: one set, or a new one in each repetition."""
    rng, more = generator(seed, 2), generator(seed, 9)
    sets: dict[str, list[NeuronSet]] = {}
    for arm in arms:
        match arm:
            case "baseline":
                sets[arm] = [NeuronSet()]
            case "random":
                sets[arm] = [random_neurons(space, len(neurons), neurons, rng) for _ in range(n_repetitions)]
            case "random_matched":
                sets[arm] = [matched_neurons(space, neurons, rng) for _ in range(n_repetitions)]
            case "top_activation":
                assert activity is not None, "taken when the arm was asked for"
                sets[arm] = [active_neurons(space, neurons, activity, more) for _ in range(n_repetitions)]
            case "suppressed":
                sets[arm] = [neurons]
    return {arm: sets[arm] for arm in get_args(ArmName) if arm in sets}


def describe_intervention(intervention: Intervention) -> str:
    """What was done, in words that follow "the neurons"."""
    words = {
        "zero": "at zero",
        "mean": "at their mean",
        "resample": "resampled from other prompts",
        "scale": f"times {intervention.factor:g}" if intervention.factor is not None else "",
    }
    places = {"all": "", "last": " at the last position", "question": " from the question on"}
    return words[intervention.mode] + places[intervention.positions]
