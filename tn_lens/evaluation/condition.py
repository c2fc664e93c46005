"""The model's answers under one condition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats

from tn_lens.core.options import Condition
from tn_lens.evaluation.controls import CONTROLS
from tn_lens.inference.manipulation import is_right
from tn_lens.questions.prompts import PromptSet

HEADINGS: Mapping[Condition | str, str] = {"random_matched": "matched", "top_activation": "most active"}
"""Column headings of conditions whose heading differs from their name."""


def condition_label(name: str, intervention: str = "zero-ablated") -> str:
    """The name of a condition in tables and figures, for example "random neurons zero-ablated".

    Args:
        name: name of the condition.
        intervention: description of the intervention, see `Intervention.description`.
    """
    if name == "unablated":
        return name
    subject = "truth neurons" if name == "ablated" else CONTROLS[name].label if name in CONTROLS else name
    return f"{subject} {intervention}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ConditionResult:
    """The answers under one condition. Repetition d ablates the neurons of draw d, or those of a single draw."""

    probabilities: Float[np.ndarray, "draw prompt choice"]
    """f of each shown choice, in [0, 1], for every order of every question; NaN for an order that was not asked."""
    prompts: PromptSet
    """Every order of every question."""
    asked: Int[np.ndarray, "repetition question"]
    """Which prompt each repetition asked."""

    @cached_property
    def is_complete(self) -> bool:
        """Whether every draw was asked in every order; otherwise nothing can be averaged over the orders."""
        return not bool(np.isnan(self.probabilities).any())

    def drawn(self, per_prompt: Float[np.ndarray, "draw prompt"]) -> Float[np.ndarray, "repetition question"]:
        """The values of the orders that the repetitions drew."""
        # a single draw is used for all repetitions
        draws = np.arange(len(self.asked)) % len(per_prompt)
        return per_prompt[draws[:, None], self.asked]

    @cached_property
    def right(self) -> Float[np.ndarray, "draw prompt"]:
        """1 where the right label is more probable than every wrong one, else 0."""
        # 0 for prompts that were not asked, since comparisons with NaN are false
        draws = [is_right(torch.tensor(draw), self.prompts) for draw in self.probabilities]
        return torch.stack(draws).double().numpy()

    @property
    def p_right(self) -> Float[np.ndarray, "draw prompt"]:
        """Probability of the right label."""
        return self.probabilities[:, np.arange(len(self.prompts)), [prompt.right for prompt in self.prompts]]

    @property
    def mass(self) -> Float[np.ndarray, "draw prompt"]:
        """Total probability of all labels."""
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
        """Mean total probability of all labels."""
        return float(self.drawn(self.mass).mean())

    @property
    def shares(self) -> Float[np.ndarray, " choice"]:
        """Fraction of the answers that choose each letter."""
        chosen = self.drawn(np.nan_to_num(self.probabilities).argmax(-1).astype(np.float64))
        return np.array([(chosen == letter).mean() for letter in range(self.probabilities.shape[-1])])

    @property
    def share_a(self) -> float:
        """Fraction of the answers that choose the first label, which depends on letter bias; NaN for answers without labels."""
        return float(self.shares[0]) if self.prompts.labels else float("nan")

    @cached_property
    def by_choice(self) -> list[tuple[Float[np.ndarray, "draw choice"], int]]:
        """For each question the probabilities of its choices, averaged over the orders so that letter bias cancels.

        Each array is paired with the index of the right choice.
        """
        averaged = []
        for rows in self.prompts.groups.values():
            first = self.prompts[rows.start]
            total = np.zeros((len(self.probabilities), first.n_choices))
            for row in rows:
                order = self.prompts[row].order  # position shown -> choice
                total[:, list(order)] += self.probabilities[:, row, : len(order)]
            averaged.append((total / len(rows), first.order[first.right]))
        return averaged

    @cached_property
    def order_averaged(self) -> Float[np.ndarray, "draw question"]:
        """1 where the right choice is the most probable after averaging over all orders of the question, else 0.

        NaN if not every order was asked.
        """
        if not self.is_complete:
            return np.full((len(self.probabilities), self.asked.shape[1]), np.nan)
        # a tie with a wrong choice does not count as right; [draw] for each question
        verdicts = [p[:, answer] > np.delete(p, answer, axis=-1).max(-1) for p, answer in self.by_choice]
        return np.stack(verdicts, axis=-1).astype(np.float64)

    @property
    def order_averaged_accuracy(self) -> float:
        """Mean of `order_averaged`, in [0, 1]."""
        return float(self.order_averaged.mean())

    @cached_property
    def auc(self) -> float:
        """Area under the ROC curve that separates right choices from wrong ones by their share of the question's mass.

        Computed from order-averaged probabilities, and averaged over draws. NaN if not every order was asked.
        """
        if not self.is_complete:
            return float("nan")
        rights, wrongs = [], []
        for p, answer in self.by_choice:
            # [draw, choice]; the lower limit avoids a division by zero for a question without any mass
            share = p / np.maximum(p.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
            rights.append(share[:, [answer]])
            wrongs.append(np.delete(share, answer, axis=-1))
        # [draw, choice of any question]
        right, wrong = np.concatenate(rights, axis=-1), np.concatenate(wrongs, axis=-1)
        # the area is the number of pairs in the right order, a tie counted as one half, over the number of pairs
        n_ordered = stats.mannwhitneyu(right, wrong, axis=-1, method="asymptotic").statistic
        return float(np.mean(n_ordered / (right.shape[-1] * wrong.shape[-1])))
