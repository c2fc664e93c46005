"""What the model answers in one condition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from jaxtyping import Float
from scipy import stats

if TYPE_CHECKING:
    from tn_lens.evaluation.result import Evaluation

ArmName = Literal["baseline", "random", "random_matched", "top_activation", "suppressed"]
ARMS: tuple[ArmName, ...] = get_args(ArmName)
"""Every condition."""
PAPER_ARMS: tuple[ArmName, ...] = ("baseline", "random", "random_matched", "suppressed")
"""The paper's three, and the control matched by layer."""

ARM_NAMES: Mapping[str, str] = {
    "baseline": "untouched",
    "random": "random neurons at zero",
    "random_matched": "random, matched by layer",
    "top_activation": "most active, matched by layer",
    "suppressed": "truth neurons at zero",
}
"""What the conditions are called in tables."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """What the model answers in one condition. Draw d's neurons are touched in repetition d; one draw serves all."""

    probabilities: Float[np.ndarray, "draw prompt choice"]
    """f of each shown choice, in [0, 1], for every order of every question; NaN for an order that was not asked."""
    evaluation: Evaluation

    @cached_property
    def is_complete(self) -> bool:
        """Whether every draw was asked every order; else nothing can be averaged over the orders."""
        return not bool(np.isnan(self.probabilities).any())

    def drawn(self, per_prompt: Float[np.ndarray, "draw prompt"]) -> Float[np.ndarray, "repetition question"]:
        """The values of the orders that the repetitions drew."""
        asked = self.evaluation.asked
        draws = np.arange(len(asked)) % len(per_prompt)
        return per_prompt[draws[:, None], asked]

    @cached_property
    def right(self) -> Float[np.ndarray, "draw prompt"]:
        """1 where the right label is more probable than every wrong one, else 0."""
        p, index = self.probabilities, self.evaluation.right_label
        own = np.take_along_axis(p, index[None, :, None], axis=-1)
        others = p.copy()
        np.put_along_axis(others, np.broadcast_to(index[None, :, None], own.shape), -1.0, axis=-1)
        return (own[..., 0] > others.max(-1)).astype(np.float64)  # never where it was not asked: NaN compares false

    @property
    def p_right(self) -> Float[np.ndarray, "draw prompt"]:
        """Probability of the right label."""
        return np.take_along_axis(self.probabilities, self.evaluation.right_label[None, :, None], axis=-1)[..., 0]

    @property
    def mass(self) -> Float[np.ndarray, "draw prompt"]:
        """Probability of all labels together."""
        return self.probabilities.sum(-1)

    @property
    def accuracies(self) -> Float[np.ndarray, " repetition"]:
        """Accuracy of each repetition, in [0, 1]."""
        return self.drawn(self.right).mean(-1)

    @property
    def accuracy(self) -> float:
        """Mean accuracy over repetitions, in [0, 1]."""
        return float(self.accuracies.mean())

    @property
    def accuracy_std(self) -> float:
        """Standard deviation over repetitions (ddof 1), in [0, 1]; 0 for one repetition."""
        return float(self.accuracies.std(ddof=1)) if len(self.accuracies) > 1 else 0.0

    @property
    def answer_mass(self) -> float:
        """Mean probability of all labels together."""
        return float(self.drawn(self.mass).mean())

    @property
    def shares(self) -> Float[np.ndarray, " choice"]:
        """Share of answers that choose each letter."""
        chosen = self.drawn(np.nan_to_num(self.probabilities).argmax(-1).astype(np.float64))
        return np.array([(chosen == letter).mean() for letter in range(self.probabilities.shape[-1])])

    @property
    def share_a(self) -> float:
        """Share of answers that choose the first label; letter bias moves it away from the share of right answers there."""
        return float(self.shares[0])

    @cached_property
    def by_choice(self) -> list[Float[np.ndarray, "draw choice"]]:
        """Per question: the probability of each choice, averaged over the orders; whatever favours a letter cancels."""
        found = []
        for rows, orders in self.evaluation.orders:
            total = np.zeros((len(self.probabilities), len(orders[0])))
            for row, order in zip(rows, orders, strict=True):
                total[:, list(order)] += self.probabilities[:, row, : len(order)]
            found.append(total / len(rows))
        return found

    @cached_property
    def order_averaged(self) -> Float[np.ndarray, "draw question"]:
        """1 where the right choice wins after averaging its probability over all orders of the question, else 0.

        NaN where not every order was asked.
        """
        if not self.is_complete:
            return np.full((len(self.probabilities), self.evaluation.n_questions), np.nan)
        verdicts = []
        for p, answer in zip(self.by_choice, self.evaluation.answers, strict=True):
            verdicts.append((p[:, answer] > np.delete(p, answer, axis=-1).max(-1)).astype(np.float64))
        return np.stack(verdicts, axis=-1)

    @property
    def order_averaged_accuracy(self) -> float:
        """Mean of `order_averaged`, in [0, 1]."""
        return float(self.order_averaged.mean())

    @cached_property
    def auc(self) -> float:
        """Area under the ROC curve: a right choice has a higher share of its question's mass than a wrong one of any question.

        From order-averaged probabilities; the mean over draws. NaN where not every order was asked.
        """
        if not self.is_complete:
            return float("nan")
        rights, wrongs = [], []
        for p, answer in zip(self.by_choice, self.evaluation.answers, strict=True):
            share = p / np.maximum(p.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
            rights.append(share[:, [answer]])
            wrongs.append(np.delete(share, answer, axis=-1))
        right, wrong = np.concatenate(rights, axis=-1), np.concatenate(wrongs, axis=-1)
        areas = []
        for ours, theirs in zip(right, wrong, strict=True):
            ranks = stats.rankdata(np.concatenate([ours, theirs]))[: len(ours)]
            areas.append((ranks.sum() - len(ours) * (len(ours) + 1) / 2) / (len(ours) * len(theirs)))
        return float(np.mean(areas))
