"""Diagnosis of the found neurons: their scores where the model is wrong, and the scores of both labels separately.

The manipulation check keeps the questions on which the right answer is what the model chose, so a neuron that supports
whichever answer is chosen passes every later filter. Questions that the model answers incorrectly distinguish the two: a truth
neuron still supports the right answer, a choice neuron the wrong one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from tn_lens.attribution.attribute import attribute, attribution_chunks
from tn_lens.attribution.methods import METHODS
from tn_lens.attribution.result import at_neurons
from tn_lens.core.sentences import say, say_each
from tn_lens.core.stored import Stored
from tn_lens.evaluation.damage import Damage
from tn_lens.evaluation.evaluate import evaluate
from tn_lens.evaluation.result import Evaluation
from tn_lens.inference.manipulation import ManipulationCheck
from tn_lens.models import Model
from tn_lens.models.isolation import isolated
from tn_lens.neurons import Neuron, NeuronSet
from tn_lens.questions.prompts import PromptSet
from tn_lens.questions.question import QuestionSet
from tn_lens.runs.chunks import Tensors, chunk_key
from tn_lens.runs.context import in_stage, map_chunks
from tn_lens.selection.significance import Moments, half_width

Verdict = Literal["truth", "choice", "damage", "unclear"]
"""Whether the 95 % interval of mean D on wrongly answered questions lies above 0, lies below 0, or includes 0; "damage" for
damage neurons, whatever the interval."""

VERDICTS: Mapping[Verdict, str] = {
    "truth": "truth: supports the right answer, even where the model is wrong",
    "choice": "choice: supports what the model chose, right or wrong",
    "damage": "damage: ablating it damages every text, alone or together with other found neurons",
    "unclear": "unclear",
}
"""Descriptions of the verdicts."""

MOST_WRONG = 200
"""Maximum number of wrongly answered questions that are attributed."""
ROUGH = 12
"""Cost of a site and layer with found neurons if it is refined, relative to the mean that `attribution_chunks` assumes: found
neurons often lie in early layers, whose paths need many nodes."""
MOST_CASES = 64
"""Maximum number of prompts of half 2 for which both labels are attributed separately."""

CASES: Mapping[int, str] = {
    1: "supports both labels",
    2: "supports the wrong label, opposes the right one",
    3: "supports the right label, opposes the wrong one",
    4: "opposes both labels",
}
"""The cases by the signs of Attr_t and Attr_f, as in the text of section 2.2 (the fourth example of figure 2 differs)."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Diagnosis(Stored):
    """What each found neuron supports."""

    neurons: tuple[Neuron, ...]
    right: Float[np.ndarray, " neuron"]
    """Mean Attr_t over some prompts of half 2; NaN if nothing could be attributed."""
    wrong: Float[np.ndarray, " neuron"]
    """Mean Attr_f over the same prompts."""
    mistaken: Float[np.ndarray, " neuron"]
    """Mean D over wrongly answered questions; NaN if there are none."""
    mistaken_half_width: Float[np.ndarray, " neuron"]
    """Half the width of its 95 % interval; NaN for fewer than two questions."""
    n_mistaken: int
    """Number of questions answered wrong in at least one order."""
    swapped: bool = False
    """Whether every question was asked in several orders."""
    evaluation: Evaluation | None
    """The evaluation on the questions that the check dropped; None if there is none."""
    damage: Damage | None = None
    """The loss on plain text with the neurons ablated; None if it was not measured."""

    @property
    def case(self) -> Int[np.ndarray, " neuron"]:
        """The paper's case, 1 to 4, by the signs of the mean Attr_t and Attr_f."""
        return np.where(self.right > 0, np.where(self.wrong > 0, 1, 3), np.where(self.wrong > 0, 2, 4))

    @property
    def verdicts(self) -> list[Verdict]:
        """One verdict for each neuron."""
        # NaN compares false, so a neuron without an interval is unclear
        low, high = self.mistaken - self.mistaken_half_width, self.mistaken + self.mistaken_half_width
        damaging = NeuronSet() if self.damage is None else self.damage.neurons
        return [
            "damage" if neuron in damaging else "truth" if a > 0 else "choice" if b < 0 else "unclear"
            for neuron, a, b in zip(self.neurons, low, high, strict=True)
        ]

    @property
    def n_by_verdict(self) -> dict[Verdict, int]:
        """Number of neurons with each verdict."""
        verdicts = self.verdicts
        return {verdict: verdicts.count(verdict) for verdict in VERDICTS}

    @property
    def n_by_case(self) -> dict[int, int]:
        """Number of neurons in each of the paper's cases."""
        return {case: int((self.case == case).sum()) for case in CASES}

    def to_frame(self) -> pd.DataFrame:
        """One row per neuron."""
        return pd.DataFrame(
            {
                "neuron": list(map(str, self.neurons)),
                "attr_right": self.right,
                "attr_wrong": self.wrong,
                "case": self.case,
                "mean_difference_mistaken": self.mistaken,
                "mistaken_ci_low": self.mistaken - self.mistaken_half_width,
                "mistaken_ci_high": self.mistaken + self.mistaken_half_width,
                "text_loss_rise": [float("nan") if self.damage is None else self.damage.rise(n) for n in self.neurons],
                "verdict": self.verdicts,
            }
        )

    def records(self) -> dict[Neuron, dict[str, Any]]:
        """`to_frame` by neuron, as plain values."""
        rows = self.to_frame().drop(columns="neuron").to_dict("records")
        return {neuron: {str(k): v for k, v in row.items()} for neuron, row in zip(self.neurons, rows, strict=True)}

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.summary())}</p>{self.to_frame().head(20).to_html()}"

    def explain(self) -> list[str]:
        """What the neurons support, in sentences."""
        return say_each("diagnosis.explain", self)

    def summary(self) -> str:
        """The sentences of `explain` as one paragraph."""
        return say("diagnosis.explain", self)


@isolated
def diagnose(
    model: Model,
    neurons: NeuronSet,
    check: ManipulationCheck,
    questions: QuestionSet | None = None,
    *,
    tested: Collection[str] | None = None,
    label_means: tuple[Float[np.ndarray, " neuron"], Float[np.ndarray, " neuron"]] | None = None,
    damage: Damage | None = None,
    n_repetitions: int = 10,
    seed: int = 0,
    **options: Any,
) -> Diagnosis:
    """Test for every found neuron whether it supports truth, the model's choice or the format, and whether it damages every text.

    Args:
        model: the model.
        neurons: the found neurons.
        check: the manipulation check, whose wrongly answered prompts are attributed here.
        questions: the set that the check's prompts were built from, to evaluate the neurons on questions that the check
            dropped; None skips this.
        tested: ids of the kept questions to take Attr_t and Attr_f from, half 2 of a selection; all by default.
        label_means: mean Attr_t and Attr_f if they have been stored; otherwise they are computed from at most 64 prompts.
        damage: the loss on plain text with the neurons ablated, from `measure_damage`.
        n_repetitions: repetitions of the evaluation on the questions that the check dropped.
        seed: seed for the orders and controls of that evaluation.
        options: keyword arguments of `attribute`, the same as when the neurons were found.
    """
    # four separate arrays, since a file cannot hold the same array several times
    right, wrong, mean, half = (np.full(len(neurons), np.nan) for _ in range(4))
    mistaken = PromptSet(tuple(p for p, right in zip(check.asked, check.right.tolist(), strict=True) if not right))
    if neurons:
        # Attr_t and Attr_f come from questions that were not used to choose the candidates
        kept = check.prompts if tested is None else check.prompts.only(tested)
        if label_means is not None:
            right, wrong = label_means
        elif kept:
            apart = attribute_columns(model, kept.chunks(MOST_CASES)[0], neurons, separate=True, **options)
            right, wrong = apart["right"].mean(0), apart["wrong"].mean(0)
        attributed = mistaken.only(list(mistaken.groups)[:MOST_WRONG])
        if attributed:
            # a method that compares the orders of a question needs the correctly answered ones as well
            paired = METHODS[options.get("method", "riemann_right")].uses_counterparts
            asked = check.asked.only(attributed.groups) if paired else attributed
            columns = attribute_columns(model, asked, neurons, **options)["difference"]
            wanted = set(attributed)
            columns = columns[[prompt in wanted for prompt in asked]]
            # the question is the unit of the interval: mean over its orders first
            rows = [columns[rows.start : rows.stop].mean(0) for rows in attributed.groups.values()]
            moments = Moments.of(np.stack(rows))
            mean = moments.mean
            half = half_width(moments.standard_error * np.sqrt(moments.n), moments.n)
    evaluation = None
    if questions is not None and check.dropped and neurons:
        evaluation = in_stage(
            "dropped",
            evaluate,
            model,
            questions.only(check.dropped),
            neurons,
            n_repetitions=n_repetitions,
            conditions=("unablated", "random_matched", "ablated"),
            seed=seed,
        )
    return Diagnosis(
        neurons=tuple(neurons),
        right=right,
        wrong=wrong,
        mistaken=mean,
        mistaken_half_width=half,
        n_mistaken=len(mistaken.groups),
        swapped=check.is_swapped,
        evaluation=evaluation,
        damage=damage,
    )


def attribute_columns(
    model: Model, prompts: PromptSet, neurons: NeuronSet, *, separate: bool = False, **options: Any
) -> dict[str, Float[np.ndarray, "prompt neuron"]]:
    """The scores of the given neurons only: D as "difference", and with `separate` also "right" and "wrong"."""
    wanted = ("difference", "right", "wrong") if separate else ("difference",)
    is_refined = bool(METHODS[options.get("method", "riemann_right")].tolerance)
    sites = {
        site: sorted({neuron.layer for neuron in neurons.at(site)})
        for site in options.pop("sites", neurons.sites)
        if neurons.at(site)
    }
    n_places = sum(map(len, sites.values())) * len(wanted) * (ROUGH if is_refined else 1)
    chunks = attribution_chunks(model, prompts, n_places)

    def compute(index: int) -> Tensors:
        scores = attribute(model, chunks[index], sites=sites, separate=separate, **options)
        return {name: at_neurons(getattr(scores, name), scores.space, neurons).double() for name in wanted}

    keys = [chunk_key("columns", neurons, separate, options, chunk) for chunk in chunks]
    columns = list(map_chunks("labels" if separate else "mistaken", keys, compute, "diagnosis"))
    return {name: torch.cat([chunk[name] for chunk in columns]).numpy() for name in wanted}
