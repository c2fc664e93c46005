"""Reading the result: paired comparisons with the question as the unit, and sentences about what else may have moved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.evaluation.condition import ARM_NAMES

if TYPE_CHECKING:
    from tn_lens.evaluation.result import Evaluation

MASS_KEPT = 0.95
"""Answer mass below which a fall in accuracy may be lost instruction following."""
LETTER_SHIFT = 0.15
"""Change in the share of "A" from which a fall in accuracy may be letter bias."""
FOLLOWED = 0.5
"""Answer mass below which a prompt counts as not answered at all."""
LEAST_FALL = 1
"""Points below which it makes no sense to ask what a fall is made of."""
N_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Order-averaged accuracy of one arm less that of another on the same questions.

    Plain accuracy over the repetitions, where an arm was not asked every order.
    """

    arm: str
    other: str
    difference: float
    """In points."""
    low: float
    """2.5 % of the bootstrap over questions, and over draws where an arm has several; in points."""
    high: float
    """97.5 % of it."""
    mcnemar_p: float
    """Exact two-sided McNemar test over questions; NaN where an arm has several draws."""
    draws_p: float
    """(1 + draws of the other arm that hurt as much) / (1 + draws); NaN for a single draw."""
    n_draws: int
    """Of the other arm."""

    def summary(self) -> str:
        """One sentence, that says whether the interval leaves out zero."""
        if self.difference == self.low == self.high == 0:
            return f"{_called(self.arm).capitalize()}: the same as {_called(self.other)}."
        direction, sign = ("below", -1) if self.difference < 0 else ("above", 1)
        low, high = sorted((sign * self.low, sign * self.high))
        interval = f"{_points(low)} to {_points(high)}"
        clear = "" if low > 0 else ", which holds zero: no difference is shown"
        test = f"; McNemar p = {self.mcnemar_p:.2g}" if self.mcnemar_p == self.mcnemar_p else ""
        draws = f"; p over draws = {self.draws_p:.2g}" if self.draws_p == self.draws_p else ""
        least = f", the least that {self.n_draws} draws can show" if self.draws_p == 1 / (1 + self.n_draws) else ""
        return (
            f"{_called(self.arm).capitalize()}: {abs(self.difference):.1f} points {direction} {_called(self.other)} "
            f"(95 % interval {interval}{clear}{test}{draws}{least})."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def _called(arm: str) -> str:
    return ARM_NAMES[arm].removesuffix(" at zero")


def compare(evaluation: Evaluation, arm: str, other: str) -> Comparison:
    """See `Evaluation.compare`."""
    if unknown := {arm, other} - set(evaluation.arms):
        raise BadInput(f"the arm {sorted(unknown)[0]!r} was not run; there are {', '.join(evaluation.arms)}")
    pair = [evaluation.arms[name] for name in (arm, other)]
    averaged = all(one.is_complete for one in pair)
    ours, theirs = (one.order_averaged if averaged else one.drawn(one.right) for one in pair)
    rng = generator(evaluation.seed, 8)
    apart = [_resampled(ours, theirs, rng) for _ in range(N_RESAMPLES)]
    low, high = np.percentile(apart, [2.5, 97.5])
    mcnemar = float("nan")
    if len(ours) == len(theirs) == 1:
        won, lost = int((ours > theirs).sum()), int((ours < theirs).sum())
        mcnemar = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    draws_p = float("nan")
    if len(theirs) > 1:
        as_bad = int((theirs.mean(-1) <= ours.mean()).sum())
        draws_p = (1 + as_bad) / (1 + len(theirs))
    return Comparison(
        arm=arm,
        other=other,
        difference=100 * float(ours.mean() - theirs.mean()),
        low=100 * float(low),
        high=100 * float(high),
        mcnemar_p=mcnemar,
        draws_p=draws_p,
        n_draws=len(theirs),
    )


def _resampled(
    ours: Float[np.ndarray, "draw question"], theirs: Float[np.ndarray, "other question"], rng: np.random.Generator
) -> float:
    """The difference on questions drawn with replacement, and on draws drawn likewise."""
    questions = rng.integers(ours.shape[1], size=ours.shape[1])
    means = []
    for of in (ours, theirs):
        draws = rng.integers(len(of), size=len(of)) if len(of) > 1 else [0]
        means.append(of[draws].mean(0)[questions].mean())
    return float(means[0] - means[1])


def fall(evaluation: Evaluation) -> dict[str, float]:
    """What a fall in accuracy is made of, in points.

    Returns:
        total: of plain accuracy; content: of order-averaged accuracy, where letters cancel; letter: the rest of it; mass:
        what is lost on top where prompts whose labels hold less than half of the probability count as wrong.
    """
    arms = [evaluation.arms[name] for name in ("baseline", "suppressed")]
    plain, averaged = ([getattr(arm, name) for arm in arms] for name in ("accuracy", "order_averaged_accuracy"))
    followed = [float(arm.drawn(arm.right * (arm.mass >= FOLLOWED)).mean()) for arm in arms]
    total, content, strict = (100 * (a - b) for a, b in (plain, averaged, followed))
    return {"total": total, "content": content, "letter": total - content, "mass": strict - total}


def warnings_of(evaluation: Evaluation) -> list[str]:
    """Sentences for every reason other than truth why accuracy may have moved."""
    before, after = evaluation.arms["baseline"], evaluation.arms["suppressed"]
    parts = fall(evaluation)
    said = []
    if not evaluation.neurons:
        said.append("No neurons were suppressed, so suppressed and baseline are the same.")
    if before.answer_mass >= MASS_KEPT > after.answer_mass:
        said.append(
            f"Answer mass fell from {before.answer_mass:.2f} to {after.answer_mass:.2f}: part of the fall is lost "
            "instruction following (format neurons), not truth."
        )
    elif before.answer_mass < MASS_KEPT:
        said.append(
            f"The untouched model puts only {before.answer_mass:.2f} of its probability on the labels: it hardly follows "
            "the instruction, and its accuracies mean little."
        )
    if abs(after.share_a - before.share_a) > LETTER_SHIFT and parts["total"] >= 1 and evaluation.n_orders > 1:
        said.append(
            f'The share of "A" moved from {before.share_a:.2f} to {after.share_a:.2f}: letter bias explains part of the '
            f"fall of {parts['total']:.1f} points; with the letters averaged out it is {parts['content']:.1f} points."
        )
    if after.accuracy < 0.5 - 0.05 and len(evaluation.prompts[0].label_ids) == 2:
        said.append("Suppressed accuracy is below chance: answers are inverted, which is not the absence of truth.")
    return said


def _points(value: float) -> str:
    """With one digit, and no minus before nothing."""
    return f"{round(value, 1) + 0.0:.1f}"


def explain(evaluation: Evaluation) -> list[str]:
    """What the fall is made of, and how it compares with every control: one sentence each."""
    parts = fall(evaluation)
    said = []
    if abs(parts["total"]) >= LEAST_FALL:
        of = "fall" if parts["total"] > 0 else "rise"
        sign = 1 if parts["total"] > 0 else -1
        pieces = (
            f"{_points(sign * parts['content'])} are the content choice (order-averaged) and {_points(sign * parts['letter'])} letter bias"
            if evaluation.n_orders > 1
            else "letter bias cannot be told apart, as every question was asked in one order"
        )
        lost = f"; counting answers without half of the probability as wrong adds {_points(sign * parts['mass'])}"
        said.append(f"Of the {of} of {abs(parts['total']):.1f} points in plain accuracy {pieces}{lost}.")
    else:
        said.append(
            f"Plain accuracy moves by {_points(-parts['total'])} points"
            + (f", order-averaged by {_points(-parts['content'])}." if evaluation.n_orders > 1 else ".")
            if parts["total"] or parts["content"]
            else "Plain accuracy does not move."
        )
    said += [evaluation.compare("suppressed", other).summary() for other in evaluation.arms if other != "suppressed"]
    if evaluation.text_loss is not None:
        loss = {arm: float(values.mean()) for arm, values in evaluation.text_loss.items()}
        controls = [
            f"{loss[arm]:.3f} with {arm.replace('_', ' ')}" for arm in loss if arm not in ("baseline", "suppressed")
        ]
        said.append(
            f"Loss on plain text: {loss['baseline']:.3f} nats a token untouched, {loss['suppressed']:.3f} with the neurons "
            f"{evaluation.intervention}{', ' + ', '.join(controls) if controls else ''}."
        )
    return said
