"""Choose the threshold t by its effect on separate questions (an explicit version of the paper's A.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import pandas as pd

from tn_lens.attribution.result import ScoreSource
from tn_lens.core.errors import BadInput
from tn_lens.core.sentences import say
from tn_lens.core.stored import Stored
from tn_lens.evaluation.comparison import LETTER_SHIFT, MASS_KEPT
from tn_lens.evaluation.condition import ConditionResult
from tn_lens.inference.answers import Asking, ask_each
from tn_lens.models import Model
from tn_lens.models.isolation import isolated
from tn_lens.neurons import NeuronSet
from tn_lens.questions.prompts import PromptSet, build_prompts
from tn_lens.questions.question import QuestionSet
from tn_lens.runs.context import track
from tn_lens.selection.table import Rules, SelectionTable, Split

START = 0.2
"""Threshold at which the search begins (paper A.3)."""
LOWER = (0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
HIGHER = (0.25, 0.3, 0.4)
"""Thresholds tried after `START`, in this order."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Accuracy, answer mass and letter bias on the tuning questions with a set of neurons ablated, in [0, 1]."""

    order_averaged_accuracy: float
    answer_mass: float
    share_a: float


@dataclass(frozen=True, kw_only=True)
class TuningStep(Effect):
    """The effect of the neurons found with one threshold."""

    t: float
    n_found: int
    holds: bool
    """Whether the model still follows the instruction: answer mass and the balance of the letters are kept."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Tuning(Stored):
    """The search for t, and the threshold that was chosen."""

    t: float
    steps: tuple[TuningStep, ...]
    """In the order of the search."""
    unablated: Effect
    n_questions: int

    @property
    def chosen(self) -> TuningStep:
        """The step of the threshold that was chosen."""
        return next(step for step in self.steps if step.t == self.t)

    def to_frame(self) -> pd.DataFrame:
        """One row per threshold, the highest first."""
        frame = pd.DataFrame([asdict(step) for step in self.steps]).sort_values("t", ascending=False, ignore_index=True)
        return frame[["t", "n_found", "order_averaged_accuracy", "answer_mass", "share_a", "holds"]]  # pyright: ignore[reportReturnType]

    def summary(self) -> str:
        """Summary in one sentence."""
        return say("selection.tuning", self)


@isolated
def tune_threshold(
    model: Model,
    scores: ScoreSource,
    questions: QuestionSet,
    *,
    rules: Rules | None = None,
    seed: int = 0,
    least_mass: float = MASS_KEPT,
    letter_shift: float = LETTER_SHIFT,
    drop_long: bool = False,
    table: SelectionTable | None = None,
) -> Tuning:
    """Search for the t whose neurons lower order-averaged accuracy most without loss of instruction following.

    The search starts at 20 %, decreases t until instruction following is lost twice in a row, and then tries higher
    thresholds. The ablated model counts as following the instruction if its answer mass is at least `least_mass` times that
    of the unablated model, and if the fraction of the first letter changes by at most `letter_shift`. Ties are broken in
    favour of the highest t, which gives the smallest set. Report results on other questions than these.

    Args:
        model: the model that the scores belong to.
        scores: an `Attribution`, or the scores of a run folder.
        questions: the questions to tune on, which are asked in every order.
        rules: share threshold, level, correction and family of `select_neurons`; its defaults by default.
        seed: seed for the split into halves.
        least_mass: minimum answer mass, as a fraction of that of the unablated model.
        letter_shift: maximum change in the fraction of the first label, usually "A".
        drop_long: leave out questions beyond the context window instead of raising.
        table: counts and moments for `THRESHOLDS`, if they have been computed already.

    Raises:
        BadInput: there is no question, or no threshold at which the instruction is followed.
    """
    if not questions:
        raise BadInput("tuning needs questions; got none")
    rules = rules or Rules()
    split = Split(seed)
    table = table or SelectionTable(scores, ts=THRESHOLDS, splits=[split], share_threshold=rules.share_threshold)
    prompts = build_prompts(model, questions, order="both", drop_long=drop_long)
    effect_of = _effects(model, prompts)
    unablated = effect_of(NeuronSet())

    def step(t: float) -> TuningStep:
        neurons = table.select(t, split, rules).neurons
        effect = effect_of(neurons)
        mass_kept = effect.answer_mass >= least_mass * min(1.0, unablated.answer_mass)
        # NaN, for answers without labels, is no shift
        holds = mass_kept and not abs(effect.share_a - unablated.share_a) > letter_shift
        return TuningStep(t=t, n_found=len(neurons), holds=holds, **asdict(effect))

    steps = [step(START)]
    for t in track(LOWER, "tuning t"):
        # lost twice in a row: lower thresholds give larger sets, which are assumed to lose it as well
        if not any(s.holds for s in steps[-2:]) and len(steps) > 1:
            break
        steps.append(step(t))
    steps += [step(t) for t in HIGHER]
    allowed = [s for s in steps if s.holds]
    if not allowed:
        label = prompts.first_label
        shift = f', or the fraction of "{label}" changes too much' if label else ""
        raise BadInput(
            "no threshold keeps instruction following intact: at each one the answer mass falls below "
            f"{least_mass:.2f} times that of the unablated model{shift}; set t yourself"
        )
    best = min(allowed, key=lambda s: (s.order_averaged_accuracy, -s.t))
    return Tuning(t=best.t, steps=tuple(steps), unablated=unablated, n_questions=len(prompts.groups))


THRESHOLDS = (START, *LOWER, *HIGHER)
"""All thresholds that the search may try."""


def _effects(model: Model, prompts: PromptSet) -> Callable[[NeuronSet], Effect]:
    """A cached function from a set of neurons to the effect of ablating it."""
    first = np.array([rows.start for rows in prompts.groups.values()])

    @cache
    def effect_of(neurons: NeuronSet) -> Effect:
        # the chunks of every set of neurons need a unique name: the number of earlier sets
        name = f"set-{effect_of.cache_info().currsize}"
        (answers,) = ask_each(model, [Asking(prompts=prompts, neurons=neurons)], name=name)
        after = answers.double().numpy()  # [prompt, choice]
        result = ConditionResult(probabilities=after[None], prompts=prompts, asked=first[None])
        return Effect(
            order_averaged_accuracy=result.order_averaged_accuracy,
            # over every order of the questions, not only over the one that counts as asked
            answer_mass=float(after.sum(-1).mean()),
            share_a=float((after.argmax(-1) == 0).mean()) if prompts.labels else float("nan"),
        )

    return effect_of
