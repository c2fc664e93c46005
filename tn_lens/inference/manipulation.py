"""The manipulation check: keep what the model answers right (paper 2.3), and say what that does to the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.inference.answers import ask_each
from tn_lens.models import Model
from tn_lens.prompts import Prompt, by_question
from tn_lens.runs.units import Mapper, in_memory

LOPSIDED = 0.15
"""How far the share of right answers at A may be from chance before it is worth a warning."""
CALIBRATION_BINS = 5


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ManipulationCheck:
    """Which questions the model answers right, in every order in which they were asked."""

    asked: tuple[Prompt, ...]
    """Every prompt."""
    probabilities: Float[Tensor, "prompt choice"]
    """f of each shown choice, in [0, 1]."""
    passed: Bool[Tensor, " prompt"]
    """Whether the prompt's question was right in all of its orders."""

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts that are kept."""
        return [p for p, passed in zip(self.asked, self.passed.tolist(), strict=True) if passed]

    @property
    def questions(self) -> list[int]:
        """Indices of the questions that are kept."""
        return sorted({p.question for p in self.prompts})

    @property
    def n_asked(self) -> int:
        """How many questions were asked."""
        return len({p.question for p in self.asked})

    @property
    def answer_mass(self) -> float:
        """Mean probability of all labels together: what is left went to other tokens."""
        return float(self.probabilities.sum(-1).mean())

    @property
    def says_a(self) -> float:
        """Share of all prompts in which the model chooses the first label."""
        return float((self.probabilities.argmax(-1) == 0).double().mean())

    @property
    def right_at_a_before(self) -> float:
        """Share of all prompts whose right answer stands at A."""
        return _share_at_a(self.asked)

    @property
    def right_at_a_after(self) -> float:
        """The same share among the prompts that are kept: far from one half, letters pass for truth."""
        return _share_at_a(self.prompts)

    @property
    def is_lopsided(self) -> bool:
        """Whether the check kept far more, or far fewer, right answers at A than choices at random would."""
        expected = sum(1 / p.n_choices for p in self.prompts) / max(len(self.prompts), 1)
        return bool(self.prompts) and abs(self.right_at_a_after - expected) > LOPSIDED

    @property
    def lopsided(self) -> str:
        """The sentence that warns of it."""
        swapped = len(self.asked) > self.n_asked
        return (
            f"The check is lopsided: it kept questions whose right answer stands at A in {100 * self.right_at_a_after:.0f} % of the "
            "prompts, so that neurons which support one letter may look like truth neurons"
            + ("." if swapped else "; use order='both'.")
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def summary(self) -> str:
        """One or two sentences."""
        swapped = " in both orders" if len(self.asked) > self.n_asked else ""
        said = (
            f"The model answers {len(self.questions)} of {self.n_asked} questions right{swapped}; the right answer stands at A in "
            f"{100 * self.right_at_a_before:.0f} % of the prompts before and {100 * self.right_at_a_after:.0f} % after the check."
        )
        if self.is_lopsided:
            said += f" {self.lopsided}"
        return said

    def calibration(self, n_bins: int = CALIBRATION_BINS) -> pd.DataFrame:
        """How often the model is right where it is sure: prompts by the chosen label's share of the labels' probability.

        Returns:
            One row per bin that holds a prompt: low, high, n_prompts, confidence and accuracy (means, in [0, 1]).
        """
        shares = self.probabilities / self.probabilities.sum(-1, keepdim=True).clamp(min=1e-12)
        confidence = shares.max(-1).values.double().numpy()
        right = is_right(self.probabilities, self.asked).double().numpy()
        least = 1 / max((p.n_choices for p in self.asked), default=2)
        edges = np.linspace(least, 1, n_bins + 1)
        bins = np.clip(np.digitize(confidence, edges) - 1, 0, n_bins - 1)
        rows = [
            {
                "low": float(edges[b]),
                "high": float(edges[b + 1]),
                "n_prompts": int((bins == b).sum()),
                "confidence": float(confidence[bins == b].mean()),
                "accuracy": float(right[bins == b].mean()),
            }
            for b in sorted(set(bins.tolist()))
        ]
        return pd.DataFrame(rows, columns=["low", "high", "n_prompts", "confidence", "accuracy"])

    def to_dict(self) -> dict[str, Any]:
        """The counts and shares, as plain values for JSON."""
        return {
            "n_asked": self.n_asked,
            "n_kept": len(self.questions),
            "n_prompts": len(self.asked),
            "answer_mass": self.answer_mass,
            "says_a": self.says_a,
            "right_at_a_before": self.right_at_a_before,
            "right_at_a_after": self.right_at_a_after,
            "is_lopsided": self.is_lopsided,
            "calibration": self.calibration().to_dict("records"),
            "summary": self.summary(),
        }

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt."""
        return pd.DataFrame(
            {
                "question": [p.question for p in self.asked],
                "category": [p.category for p in self.asked],
                "right_label": [p.right for p in self.asked],
                "p_right": [float(row[p.right]) for row, p in zip(self.probabilities, self.asked, strict=True)],
                "answer_mass": self.probabilities.sum(-1).tolist(),
                "passed": self.passed.tolist(),
            }
        )


def manipulation_check(
    model: Model, prompts: Sequence[Prompt], *, progress: bool = False, mapper: Mapper = in_memory
) -> ManipulationCheck:
    """Ask every prompt, and keep the questions that are answered right in all of their prompts (paper 2.3).

    An answer is right where the right label has a strictly higher probability than every wrong one.

    Args:
        model: to ask.
        prompts: from `build_prompts`.
        progress: show a progress bar.
        mapper: computes the units of some hundreds of prompts, or knows them.
    """
    if not prompts:
        raise BadInput("there are no prompts to ask; was the part of the question set empty?")
    (probabilities,) = ask_each(
        model, [(None, prompts)], mapper=mapper, progress="manipulation check" if progress else None
    )
    right = is_right(probabilities, prompts)
    passed = torch.zeros_like(right)
    start = 0
    for _, group in by_question(prompts):
        passed[start : start + len(group)] = right[start : start + len(group)].all()
        start += len(group)
    return ManipulationCheck(asked=tuple(prompts), probabilities=probabilities, passed=passed)


def is_right(probabilities: Float[Tensor, "prompt choice"], prompts: Sequence[Prompt]) -> Bool[Tensor, " prompt"]:
    """Whether the right label is more probable than every wrong one."""
    index = torch.tensor([p.right for p in prompts], dtype=torch.long).unsqueeze(-1)
    others = probabilities.scatter(-1, index, -1.0)
    return probabilities.gather(-1, index).squeeze(-1) > others.max(-1).values


def _share_at_a(prompts: Sequence[Prompt]) -> float:
    return sum(p.right == 0 for p in prompts) / len(prompts) if prompts else float("nan")
