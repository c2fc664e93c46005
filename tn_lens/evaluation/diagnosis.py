"""Truth, choice or format? What a found neuron does where the model is wrong, and to both labels apart.

The manipulation check keeps the questions on which "right" is what the model chose, so a neuron that supports whatever is
chosen passes every later filter. On the questions that the model gets wrong the two come apart: a truth neuron still
supports the right answer, a choice neuron the wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from tn_lens.attribution import attribute
from tn_lens.evaluation import Evaluation, evaluate
from tn_lens.inference.manipulation import ManipulationCheck, is_right
from tn_lens.models import Model
from tn_lens.neurons.neuron import SITES, Neuron, NeuronSet, Site
from tn_lens.prompts import Prompt
from tn_lens.questions.question import QuestionSet
from tn_lens.runs.units import Mapper, cut_prompts, in_memory, unit_key, within
from tn_lens.selection.significance import Moments, half_width

Verdict = Literal["truth", "choice", "unclear"]
"""Mean D on wrongly answered questions above 0, below 0, or an interval that holds 0."""

VERDICTS: Mapping[Verdict, str] = {
    "truth": "truth: the right answer, also where the model is wrong",
    "choice": "choice: what the model chose, right or wrong",
    "unclear": "unclear",
}
"""The verdicts in words."""

MOST_WRONG = 200
"""Wrongly answered questions that are attributed at most."""
MOST_CASES = 64
"""Prompts of half 2 for which both labels are attributed apart, at most."""

CASES: Mapping[int, str] = {
    1: "supports both labels",
    2: "supports the wrong label, opposes the right one",
    3: "supports the right label, opposes the wrong one",
    4: "opposes both labels",
}
"""The signs of Attr_t and Attr_f by the text of the paper's section 2.2 (figure 2's fourth example has other signs)."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Diagnosis:
    """What each found neuron supports."""

    neurons: tuple[Neuron, ...]
    right: Float[np.ndarray, " neuron"]
    """Mean Attr_t over some prompts of half 2; NaN where nothing could be attributed."""
    wrong: Float[np.ndarray, " neuron"]
    """Mean Attr_f over the same prompts."""
    mistaken: Float[np.ndarray, " neuron"]
    """Mean D over wrongly answered questions; NaN where there are none."""
    mistaken_half_width: Float[np.ndarray, " neuron"]
    """Half of its 95 % interval; NaN below two questions."""
    n_mistaken: int
    """Questions answered wrong, in one order at least."""
    swapped: bool = False
    """Whether every question was asked in several orders."""
    evaluation: Evaluation | None
    """The arms on the questions that the check dropped; None where it dropped none."""

    @property
    def case(self) -> Int[np.ndarray, " neuron"]:
        """Which of the paper's four cases, by the signs of the mean Attr_t and Attr_f."""
        return np.where(self.right > 0, np.where(self.wrong > 0, 1, 3), np.where(self.wrong > 0, 2, 4))

    @property
    def verdicts(self) -> list[Verdict]:
        """One a neuron."""
        low, high = self.mistaken - self.mistaken_half_width, self.mistaken + self.mistaken_half_width
        return ["truth" if a > 0 else "choice" if b < 0 else "unclear" for a, b in zip(low, high, strict=True)]

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
                "verdict": self.verdicts,
            }
        )

    def records(self) -> dict[Neuron, dict[str, Any]]:
        """`to_frame` by neuron, as plain values."""
        rows = self.to_frame().drop(columns="neuron").to_dict("records")
        return {neuron: {str(k): v for k, v in row.items()} for neuron, row in zip(self.neurons, rows, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Counts, for summary.json."""
        verdicts = self.verdicts
        counted: dict[str, Any] = {
            "n_mistaken": self.n_mistaken,
            "verdicts": {kind: verdicts.count(kind) for kind in VERDICTS},
            "cases": {str(case): int((self.case == case).sum()) for case in CASES},
        }
        if self.evaluation is not None:
            counted["arms_dropped"] = self.evaluation.to_dict()
        return counted

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def _repr_html_(self) -> str:
        return f"<p>{self.summary()}</p>{self.to_frame().head(20).to_html()}"

    def sentences(self) -> list[str]:
        """What the neurons support, in words."""
        if not self.neurons:
            return ["No neurons were found, so there is nothing to diagnose."]
        said = []
        n, verdicts = len(self.neurons), self.verdicts
        if self.n_mistaken < 2:
            said.append("The model gets too few of the questions wrong to tell truth from choice.")
        else:
            said.append(
                f"On {self.n_mistaken} questions that the model gets wrong{' in one order or both' if self.swapped else ''}, {verdicts.count('truth')} of {n} neurons still "
                f"support the right answer (truth), {verdicts.count('choice')} support what the model chose (choice), and "
                f"{verdicts.count('unclear')} cannot be told (95 % intervals, each for itself)."
            )
        if self.evaluation is not None:
            arms = self.evaluation.arms
            before, after = (100 * arms[a].order_averaged_accuracy for a in ("baseline", "suppressed"))
            more = f", matched random neurons {100 * arms['random_matched'].order_averaged_accuracy:.1f} %"
            than_others = [self.evaluation.compare("suppressed", arm).low for arm in ("baseline", "random_matched")]
            meaning = (
                "suppressing them helps there, more than random neurons do, as it would with choice neurons"
                if min(than_others) > 0
                else "no help beyond that of random neurons is shown there"
            )
            said.append(
                f"On the {self.evaluation.n_questions} questions that the check dropped, order-averaged accuracy is "
                f"{before:.1f} % untouched and {after:.1f} % with the neurons at zero{more}: {meaning}."
            )
        both = int((self.case == 1).sum())
        if both:
            said.append(
                f"{both} of {n} raise both labels, the right one more (the paper's case 1): suppressing such neurons costs "
                "answer mass as well; target='normalized_difference' is blind to that part."
            )
        return said

    def summary(self) -> str:
        """The sentences in one."""
        return " ".join(self.sentences())


def diagnose(
    model: Model,
    neurons: NeuronSet,
    check: ManipulationCheck,
    questions: QuestionSet | None = None,
    *,
    tested: Set[int] | None = None,
    label_means: tuple[Float[np.ndarray, " neuron"], Float[np.ndarray, " neuron"]] | None = None,
    n_repetitions: int = 10,
    seed: int = 0,
    progress: bool = False,
    mapper: Mapper = in_memory,
    **options: Any,
) -> Diagnosis:
    """Ask of every found neuron whether it supports truth, the model's choice, or the format.

    Args:
        model: the model.
        neurons: what was found.
        check: the manipulation check that came before, whose wrongly answered prompts are attributed here.
        questions: the set that the check's prompts were built from, to suppress the neurons on what the check dropped; None
            leaves that out.
        tested: the kept questions to take Attr_t and Attr_f from, half 2 of a selection; all by default.
        label_means: mean Attr_t and Attr_f where they are stored; else some prompts are attributed for them.
        n_repetitions: of the evaluation on the questions that the check dropped.
        seed: of its orders and random neurons.
        progress: show progress bars.
        mapper: computes the units of attribution and evaluation, or knows them.
        options: of `attribute`, as they were when the neurons were found.
    """
    nothing = np.full(len(neurons), np.nan)
    text = "diagnosis" if progress else None
    answered = is_right(check.probabilities, check.asked)
    mistaken = [p for p, right in zip(check.asked, answered.tolist(), strict=True) if not right]
    n_mistaken = len({p.question for p in mistaken})
    right = wrong = mean = half = nothing
    if neurons:
        apart = [p for p in check.prompts if tested is None or p.question in tested][:MOST_CASES]
        if label_means is not None:
            right, wrong = label_means
        elif apart:
            columns = attribute_columns(model, apart, neurons, separate=True, mapper=mapper, text=text, **options)
            right, wrong = (columns[of].mean(0) for of in ("right", "wrong"))
        kept = _first_questions(mistaken, MOST_WRONG)
        if kept:
            per_prompt = attribute_columns(model, kept, neurons, mapper=mapper, text=text, **options)["difference"]
            owners = np.array([p.question for p in kept])
            moments = Moments.of(np.stack([per_prompt[owners == q].mean(0) for q in dict.fromkeys(owners.tolist())]))
            mean = moments.mean
            half = half_width(moments.standard_error * np.sqrt(moments.n), moments.n)
    kept_questions = set(check.questions)
    dropped = sorted({p.question for p in check.asked} - kept_questions)
    evaluation = None
    if questions is not None and dropped and neurons:
        evaluation = evaluate(
            model,
            questions.select(dropped),
            neurons,
            n_repetitions=n_repetitions,
            arms=("baseline", "random_matched", "suppressed"),
            seed=seed,
            progress=progress,
            mapper=within(mapper, "dropped"),
        )
    return Diagnosis(
        neurons=tuple(neurons),
        right=right,
        wrong=wrong,
        mistaken=mean,
        mistaken_half_width=half,
        n_mistaken=n_mistaken,
        swapped=len(check.asked) > check.n_asked,
        evaluation=evaluation,
    )


def attribute_columns(
    model: Model,
    prompts: Sequence[Prompt],
    neurons: NeuronSet,
    *,
    separate: bool = False,
    mapper: Mapper = in_memory,
    text: str | None = None,
    **options: Any,
) -> dict[str, Float[np.ndarray, "prompt neuron"]]:
    """The scores of some neurons alone, shard by shard: D as "difference", and where they are attributed apart "right" and "wrong"."""
    sites: list[Site] = [site for site in SITES if neurons.at(site)]
    shards = cut_prompts(prompts)
    wanted = ("difference", "right", "wrong") if separate else ("difference",)

    def compute(index: int) -> dict[str, torch.Tensor]:
        scores = attribute(model, shards[index], sites=sites, separate=separate, **options)
        of = {name: getattr(scores, name) for name in wanted}
        return {
            name: torch.stack([held[n.site][:, n.layer, scores.space.flat(n)] for n in neurons], dim=1).double()
            for name, held in of.items()
        }

    keys = [unit_key("columns", neurons, separate, options, shard) for shard in shards]
    columns = list(mapper("labels" if separate else "mistaken", keys, compute, text))
    return {name: torch.cat([one[name] for one in columns]).numpy() for name in wanted}


def _first_questions(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    wanted = set(list(dict.fromkeys(p.question for p in prompts))[:most])
    return [p for p in prompts if p.question in wanted]
