"""Choose the threshold t by what it does to questions that serve nothing else (paper A.3, made explicit)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from tn_lens.core.errors import BadInput
from tn_lens.evaluation import LETTER_SHIFT, MASS_KEPT, Evaluation
from tn_lens.inference.answers import ask_each
from tn_lens.inference.interventions import Intervention
from tn_lens.models import Model
from tn_lens.neurons.neuron import NeuronSet
from tn_lens.prompts import build_prompts, by_question
from tn_lens.questions.question import QuestionSet
from tn_lens.runs.progress import track
from tn_lens.runs.units import Mapper, in_memory
from tn_lens.selection.select import ScoreSource, select_neurons

START = 0.2
"""Where the search begins (paper A.3)."""
LOWER = (0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
HIGHER = (0.25, 0.3, 0.4)
"""Thresholds tried from there on, in this order."""


@dataclass(frozen=True, kw_only=True)
class TuningStep:
    """One threshold on the tuning questions; everything in [0, 1] but the count."""

    t: float
    n_found: int
    order_averaged_accuracy: float
    answer_mass: float
    share_a: float
    holds: bool
    """Whether the model still follows the instruction: answer mass and the balance of the letters are kept."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Tuning:
    """The search for t, and what it chose."""

    t: float
    steps: tuple[TuningStep, ...]
    """In the order of the search."""
    untouched: TuningStep
    """The same numbers with nothing suppressed."""
    n_questions: int

    def to_frame(self) -> pd.DataFrame:
        """One row per threshold, the highest first."""
        return pd.DataFrame([asdict(step) for step in self.steps]).sort_values("t", ascending=False, ignore_index=True)

    def to_dict(self) -> dict[str, Any]:
        """For summary.json, rounded to six decimals."""

        def rounded(step: TuningStep) -> dict[str, Any]:
            return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(step).items()}

        untouched = {k: v for k, v in rounded(self.untouched).items() if k not in ("t", "n_found", "holds")}
        steps = [rounded(step) for step in self.steps]
        return {"t": self.t, "n_questions": self.n_questions, "untouched": untouched, "steps": steps}

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def summary(self) -> str:
        """One sentence."""
        chosen = next(step for step in self.steps if step.t == self.t)
        return (
            f"Of {len(self.steps)} thresholds t = {100 * self.t:g} % lowers order-averaged accuracy most on {self.n_questions} "
            f"tuning questions, from {100 * self.untouched.order_averaged_accuracy:.1f} to "
            f"{100 * chosen.order_averaged_accuracy:.1f} %, while the instruction is still followed (answer mass "
            f'{chosen.answer_mass:.2f}, share of "A" {self.untouched.share_a:.2f} -> {chosen.share_a:.2f}).'
        )


def tune_threshold(
    model: Model,
    scores: ScoreSource,
    questions: QuestionSet,
    *,
    least_mass: float = MASS_KEPT,
    letter_shift: float = LETTER_SHIFT,
    drop_long: bool = False,
    progress: bool = False,
    mapper: Mapper = in_memory,
    **settings: Any,
) -> Tuning:
    """Search the t whose neurons, at zero, lower order-averaged accuracy most while the instruction is still followed.

    The search starts at 20 %, goes down until instruction following is lost twice in a row, and tries the thresholds above.
    The instruction is followed where the answer mass stays at `least_mass` (of the untouched model's, where that is below
    one) and the share of the first letter moves by `letter_shift` at most. Among equals the highest t, and so the smallest
    set, wins. Report on other questions than these.

    Args:
        model: the model the scores are of.
        scores: an `Attribution`, or the scores of a run folder.
        questions: to tune on; asked in every order.
        least_mass: fraction of the answer mass that must be left.
        letter_shift: by how much the share of "A" may move.
        drop_long: leave out questions beyond the context window instead of refusing.
        progress: show a progress bar.
        mapper: computes the answers under each set of neurons, or knows them.
        settings: of `select_neurons`, but for t.

    Raises:
        BadInput: no question, or no threshold under which the instruction is followed.
    """
    if not questions:
        raise BadInput("tuning needs questions; got none")
    prompts = build_prompts(model, questions, order="both", drop_long=drop_long)
    first = np.cumsum([0] + [len(group) for _, group in by_question(prompts)])[:-1]
    known: dict[NeuronSet, Mapping[str, float]] = {}

    def look(neurons: NeuronSet) -> Mapping[str, float]:
        if neurons not in known:
            intervention = Intervention(neurons=neurons) if neurons else None
            (answers,) = ask_each(model, [(intervention, prompts)], mapper=mapper, name=f"set-{len(known)}")
            after = answers.double().numpy()
            arms = Evaluation(
                name=questions.name,
                prompts=tuple(prompts),
                asked=first[None],
                neurons=neurons,
                probabilities={"suppressed": after[None]},
                seed=0,
            ).arms
            known[neurons] = {
                "order_averaged_accuracy": arms["suppressed"].order_averaged_accuracy,
                "answer_mass": float(after.sum(-1).mean()),
                "share_a": float((after.argmax(-1) == 0).mean()),
            }
        return known[neurons]

    untouched = look(NeuronSet())

    def step(t: float) -> TuningStep:
        neurons = select_neurons(scores, t=t, **settings).neurons
        seen = look(neurons)
        mass_kept = seen["answer_mass"] >= least_mass * min(1.0, untouched["answer_mass"])
        holds = mass_kept and abs(seen["share_a"] - untouched["share_a"]) <= letter_shift
        return TuningStep(t=t, n_found=len(neurons), holds=holds, **seen)

    steps = [step(START)]
    for t in track(LOWER, "tuning t" if progress else None):
        if not any(s.holds for s in steps[-2:]) and len(steps) > 1:
            break
        steps.append(step(t))
    steps += [step(t) for t in HIGHER]
    allowed = [s for s in steps if s.holds]
    if not allowed:
        raise BadInput(
            "no threshold lowers accuracy without losing the answer labels: with every set found the answer mass falls below "
            f"{least_mass:.2f} of the untouched model's or one letter takes over; give a t yourself"
        )
    best = min(allowed, key=lambda s: (s.order_averaged_accuracy, -s.t))
    return Tuning(
        t=best.t,
        steps=tuple(steps),
        untouched=TuningStep(t=1.0, n_found=0, holds=True, **untouched),
        n_questions=len({p.question for p in prompts}),
    )
