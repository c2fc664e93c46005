"""Damage: what ablating the found neurons does to text that has nothing to do with the questions.

A model that cannot write any more answers no question either, so a fall in accuracy alone does not show that neurons carry
truth. Neurons that hardly matter one by one may damage every text together, so the loss on plain text is measured with each
neuron ablated alone, with the neurons of each site and layer, and with all of them.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any, NamedTuple

import pandas as pd
import torch

from tn_lens.core.errors import BadInput
from tn_lens.core.options import Condition
from tn_lens.core.sentences import say, say_each
from tn_lens.core.settings import DAMAGE_BOUND
from tn_lens.core.stored import Stored
from tn_lens.evaluation.evaluate import draw_sets
from tn_lens.evaluation.result import Evaluation
from tn_lens.evaluation.text import Text, encode_texts, loss_of_rows, plain_texts
from tn_lens.inference.answers import ZERO, ask
from tn_lens.inference.interventions import Intervention
from tn_lens.models import Model, backend_of, neuron_space
from tn_lens.models.isolation import isolated
from tn_lens.neurons import Neuron, NeuronSet
from tn_lens.questions.prompts import PromptSet
from tn_lens.runs.chunks import Tensors, chunk_key
from tn_lens.runs.context import map_chunks

MEASURED_CONTROLS: tuple[Condition, ...] = ("random_matched", "top_activation")
N_DRAWS = 3
"""Number of draws of each control, over which the loss and the answer mass are averaged."""
N_QUESTIONS = 16
"""Maximum number of questions on which the answer mass is measured."""
MOST_ALONE = 200
"""Maximum number of neurons that are ablated alone."""
SETS_TOGETHER = 16
"""Maximum number of sets of neurons that are measured in one chunk."""
WHOLE = "all"
"""Name of the part of a set that contains all of its neurons."""


@dataclass(frozen=True, kw_only=True)
class Ablated:
    """Measurements with a set of neurons ablated."""

    condition: str
    """ "ablated" for the found neurons, or the name of a control."""
    part: str
    """Which of them: "all", a site and a layer ("mlp 3"), or one neuron ("mlp 3:17")."""
    n_neurons: int
    text_loss: float
    """Loss on plain text in nats per token; the mean over the draws of a control."""
    answer_mass: float
    """Mean total probability of all choices, likewise."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Damage(Stored):
    """The loss on plain text and the answer mass with the found neurons, parts of them and controls ablated."""

    text_loss: float
    """Loss of the unablated model in nats per token."""
    answer_mass: float
    """Answer mass of the unablated model, in [0, 1]."""
    rows: tuple[Ablated, ...]
    """The found neurons and every control, whole, by site and layer, and the found neurons alone."""
    neurons: NeuronSet
    """The damage neurons: the found ones without which ablation raises the loss by no more than the bound."""
    rest_loss: float
    """Loss with all found neurons but the damage neurons ablated."""
    bound: float
    """Largest harmless rise of the loss, in nats per token."""
    intervention: str = "zero-ablated"
    """What was done to the neurons, see `Intervention.description`."""
    others: Evaluation | None = None
    """The evaluation of a run with only the other found neurons ablated. None if there are no damage neurons or no others, and
    if the run leaves damage neurons out."""

    def rise(self, part: str | Neuron = WHOLE, condition: str = "ablated") -> float:
        """The rise of the loss in nats per token with a part of a set ablated; NaN if it was not measured."""
        return self._losses.get((condition, str(part)), float("nan")) - self.text_loss

    @cached_property
    def _losses(self) -> dict[tuple[str, str], float]:
        return {(row.condition, row.part): row.text_loss for row in self.rows}

    @property
    def n_others(self) -> int:
        """Number of found neurons that are not damage neurons."""
        whole = (row.n_neurons for row in self.rows if (row.condition, row.part) == ("ablated", WHOLE))
        return next(whole, 0) - len(self.neurons)

    @property
    def is_damaging(self) -> bool:
        """Whether ablating all found neurons raises the loss by more than the bound."""
        return self.rise() > self.bound

    @property
    def controls(self) -> list[str]:
        """Names of the controls that were measured."""
        return [name for name in MEASURED_CONTROLS if any(row.condition == name for row in self.rows)]

    @property
    def places(self) -> list[Ablated]:
        """The found neurons by site and layer, the largest rise first."""
        rows = [r for r in self.rows if r.condition == "ablated" and r.part != WHOLE and ":" not in r.part]
        return sorted(rows, key=lambda row: -row.text_loss)

    def to_frame(self) -> pd.DataFrame:
        """One row per condition and part, with the rise of the loss (nats per token) and the answer mass."""
        rows = [(r.condition, r.part, r.n_neurons, r.text_loss - self.text_loss, r.answer_mass) for r in self.rows]
        return pd.DataFrame(rows, columns=["condition", "part", "n_neurons", "rise", "answer_mass"])

    def to_dict(self) -> dict[str, Any]:
        """The numbers for summary.json: loss and rises in nats per token, and the damage neurons."""
        return {
            "text_loss": self.text_loss,
            "rise": {name: self.rise(condition=name) for name in ("ablated", *self.controls)},
            "rise_without_damage_neurons": self.rest_loss - self.text_loss,
            "neurons": list(map(str, self.neurons)),
        }

    def explain(self) -> list[str]:
        """What the ablation does to plain text, in sentences."""
        return say_each("damage.explain", self)

    def summary(self) -> str:
        """The sentences of `explain` as one paragraph."""
        return say("damage.explain", self)

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.summary())}</p>{self.to_frame().round(3).to_html()}"


@isolated
def measure_damage(
    model: Model,
    neurons: NeuronSet,
    prompts: PromptSet,
    *,
    texts: Sequence[Text] | None = None,
    intervention: Intervention = ZERO,
    bound: float = DAMAGE_BOUND,
    seed: int = 0,
) -> Damage:
    """Measure the loss on plain text and the answer mass with the neurons ablated: all, by site and layer, and alone.

    Damage neurons are chosen by measured ablations. A neuron that raises the loss by more than `bound` alone is one. In
    every site and layer whose neurons raise it by more together, and then in the whole set, those with the largest rise
    alone are chosen until the others raise it by no more than `bound`. At most 200 neurons are ablated alone, those of the most
    damaging sites and layers first.

    Args:
        model: a model with a tokenizer.
        neurons: the found neurons.
        prompts: prompts on which the answer mass is measured; at most 16 of their questions are drawn.
        texts: plain texts, see `text_loss`; by default a few paragraphs on everyday topics.
        intervention: the intervention on the neurons; zero-ablation by default.
        bound: largest harmless rise of the loss, in nats per token.
        seed: seed for the control neurons and the questions.

    Raises:
        BadInput: the bound is not positive, or the intervention takes values from prompts; see also `text_loss`.
    """
    check_bound("bound", bound)
    neuron_space(model).check(neurons)
    asked = prompts.sample(N_QUESTIONS, seed)
    measured = _Measurements(model, plain_texts(model) if texts is None else texts, asked, intervention)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a control with fewer neurons; their number is in the rows
        drawn = draw_sets(model, asked, neurons, MEASURED_CONTROLS if neurons else (), N_DRAWS, seed) | {
            "ablated": [neurons]
        }
    parts = {name: [_parts(one) for one in drawn[name]] for name in ("ablated", *MEASURED_CONTROLS) if name in drawn}
    measured.add([NeuronSet(), *(part for draws in parts.values() for draw in draws for part in draw.values())])
    # neurons of the most damaging places first, since the number that is ablated alone is limited
    found = parts["ablated"][0]
    by_place = sorted(found.items(), key=lambda item: -measured[item[1]].text_loss)
    alone = [neuron for name, part in by_place if name != WHOLE for neuron in part][:MOST_ALONE]
    measured.add([NeuronSet([neuron]) for neuron in alone])
    rows = [
        _mean(condition, part, [measured[draw[part]] for draw in draws], len(draws[0][part]))
        for condition, draws in parts.items()
        for part in draws[0]
        if all(part in draw for draw in draws)
    ]
    rows += [_mean("ablated", str(neuron), [measured[NeuronSet([neuron])]], 1) for neuron in sorted(alone)]
    unablated = measured[NeuronSet()]
    damaging = _damaging(measured, found, alone, unablated.text_loss + bound)
    return Damage(
        text_loss=unablated.text_loss,
        answer_mass=unablated.answer_mass,
        rows=tuple(rows) if neurons else (),
        neurons=damaging,
        rest_loss=measured[NeuronSet(neurons - damaging)].text_loss,
        bound=bound,
        intervention=intervention.description,
    )


def check_bound(name: str, bound: Any) -> None:
    """Check the bound that an argument or a setting of this name gives.

    Raises:
        BadInput: it is not a positive number.
    """
    if not isinstance(bound, int | float) or isinstance(bound, bool) or not 0 < bound < float("inf"):
        raise BadInput(f"{name} must be a positive number of nats per token; got {bound!r}")


class _Measured(NamedTuple):
    text_loss: float
    answer_mass: float


class _Measurements(dict[NeuronSet, _Measured]):
    """Loss and answer mass by the set of neurons that is ablated, each measured once."""

    def __init__(self, model: Model, texts: Sequence[Text], prompts: PromptSet, intervention: Intervention) -> None:
        super().__init__()
        self.model, self.texts, self.prompts, self.intervention = model, texts, prompts, intervention
        self.encoded = encode_texts(model, texts)
        rows = [*(ids for _, ids in self.encoded), *(prompt.token_ids for prompt in prompts)]
        self.n_tokens = sum(map(len, rows))
        self.n_calls = 0

    def __missing__(self, neurons: NeuronSet) -> _Measured:
        self.add([neurons])
        return self[neurons]

    def add(self, sets: Iterable[NeuronSet]) -> None:
        """Measure those sets that are new."""
        new = [one for one in dict.fromkeys(sets) if one not in self]
        size = backend_of(self.model).chunk_size(SETS_TOGETHER, 2 * self.n_tokens)
        groups = [new[first : first + size] for first in range(0, len(new), size)]

        def compute(index: int) -> Tensors:
            numbers = [self._measure(one) for one in groups[index]]
            return {"measured": torch.tensor(numbers, dtype=torch.float64).reshape(-1, 2)}

        keys = [chunk_key("damage", self.texts, self.prompts, self.intervention, group) for group in groups]
        chunks = map_chunks(f"sets-{self.n_calls}", keys, compute, "loss on plain text")
        self.n_calls += 1
        for group, chunk in zip(groups, chunks, strict=True):
            self |= {one: _Measured(*numbers) for one, numbers in zip(group, chunk["measured"].tolist(), strict=True)}

    def _measure(self, neurons: NeuronSet) -> _Measured:
        acting = {"neurons": neurons, "intervention": self.intervention}
        answers = ask(self.model, self.prompts, **acting)
        return _Measured(loss_of_rows(self.model, self.encoded, **acting), float(answers.sum(-1).double().mean()))


def _parts(neurons: NeuronSet) -> dict[str, NeuronSet]:
    """The whole set, and its neurons by site and layer, named as in `Ablated.part`."""
    places = dict.fromkeys((neuron.site, neuron.layer) for neuron in neurons)
    return {WHOLE: neurons} | {f"{site} {layer}": neurons.at(site, layer) for site, layer in places}


def _mean(condition: str, part: str, measured: Sequence[_Measured], n_neurons: int) -> Ablated:
    """The mean over the draws of a control."""
    losses, masses = zip(*measured, strict=True)
    loss, mass = (sum(values) / len(values) for values in (losses, masses))
    return Ablated(condition=condition, part=part, n_neurons=n_neurons, text_loss=loss, answer_mass=mass)


def _damaging(
    measured: _Measurements, parts: Mapping[str, NeuronSet], alone: Sequence[Neuron], limit: float
) -> NeuronSet:
    """The damage neurons: without them, ablating the neurons of a place, and all of them, keeps the loss within the limit."""
    rise = {neuron: measured[NeuronSet([neuron])].text_loss for neuron in alone}
    chosen = NeuronSet(neuron for neuron, loss in rise.items() if loss > limit)
    # the whole set is the first part, and comes last
    for part in (*list(parts.values())[1:], parts[WHOLE]):
        if measured[NeuronSet(part - chosen)].text_loss <= limit:
            continue
        # neurons that were not ablated alone come last
        ranked = sorted(part - chosen, key=lambda neuron: -rise.get(neuron, 0.0))
        n = bisect_left(range(len(ranked)), True, key=lambda k: measured[NeuronSet(ranked[k:])].text_loss <= limit)
        chosen = NeuronSet([*chosen, *ranked[:n]])
    return chosen
