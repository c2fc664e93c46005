"""The manipulation check: keep the questions that the model answers correctly (paper 2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.core.sentences import say, say_each
from tn_lens.core.stored import Stored
from tn_lens.core.tokens import token_text
from tn_lens.inference.answers import Asking, ask_each
from tn_lens.inference.forward import prompt_logits
from tn_lens.models import Model
from tn_lens.models.isolation import isolated
from tn_lens.questions.prompts import Prompt, PromptSet
from tn_lens.runs.chunks import Tensors, chunk_key
from tn_lens.runs.context import map_chunks

LOPSIDED = 0.15
"""Maximum distance from chance of the fraction of right answers at A before the check is reported as lopsided."""
LITTLE_MASS = 0.1
"""Answer mass below which the model answers with something else than a label."""
LITTLE_COMPLETION_MASS = 0.01
"""The same for completions, which compete with every other continuation."""
MOST_PROBED = 64
"""Maximum number of prompts over which the next-token probabilities are averaged."""
N_NEXT = 5
"""Number of next tokens that a check lists."""
CALIBRATION_BINS = 5


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ManipulationCheck(Stored):
    """The answers to all prompts, and the questions that are answered correctly in every order in which they were asked."""

    asked: PromptSet
    """All prompts."""
    probabilities: Float[Tensor, "prompt choice"]
    """Answer probability f of each shown choice, in [0, 1]."""
    next_tokens: tuple[tuple[str, float], ...] = ()
    """The most probable next tokens as readable text, and their mean probability over at most 64 prompts, highest first."""

    @cached_property
    def right(self) -> Bool[Tensor, " prompt"]:
        """Whether the right label is more probable than every wrong one."""
        return is_right(self.probabilities, self.asked)

    @cached_property
    def passed(self) -> Bool[Tensor, " prompt"]:
        """Whether the prompt's question was answered correctly in all of its orders."""
        passed = torch.zeros_like(self.right)
        for rows in self.asked.groups.values():
            at = slice(rows.start, rows.stop)
            passed[at] = self.right[at].all()
        return passed

    @cached_property
    def prompts(self) -> PromptSet:
        """The prompts that are kept."""
        return PromptSet(tuple(p for p, passed in zip(self.asked, self.passed.tolist(), strict=True) if passed))

    @property
    def questions(self) -> list[str]:
        """Ids of the questions that are kept."""
        return list(self.prompts.groups)

    @property
    def dropped(self) -> list[str]:
        """Ids of the questions that are not kept."""
        return [question for question in self.asked.groups if question not in self.prompts.groups]

    @property
    def n_asked(self) -> int:
        """Number of questions that were asked."""
        return len(self.asked.groups)

    @property
    def n_kept(self) -> int:
        """Number of questions that are kept."""
        return len(self.questions)

    @property
    def is_swapped(self) -> bool:
        """Whether questions were asked in several orders of their choices."""
        return len(self.asked) > self.n_asked

    @property
    def answer_mass(self) -> float:
        """Mean total probability of the labels; the rest is the probability of other tokens."""
        return float(self.probabilities.sum(-1).mean())

    @property
    def least_mass(self) -> float:
        """Answer mass below which the model hardly gives any of the answers."""
        return LITTLE_MASS if self.asked.labels else LITTLE_COMPLETION_MASS

    @property
    def has_little_mass(self) -> bool:
        """Whether the mean answer mass is below `least_mass`."""
        return self.answer_mass < self.least_mass

    @cached_property
    def failures(self) -> dict[str, int]:
        """Number of questions that failed, by reason.

        mass: the answers have too little probability; position: the right label is chosen in some orders and not in others;
        content: a wrong answer is chosen in every order.
        """
        mass = self.probabilities.sum(-1)
        counts = {"mass": 0, "position": 0, "content": 0}
        for question in self.dropped:
            rows = self.asked.groups[question]
            at = slice(rows.start, rows.stop)
            some_right = bool(self.right[at].any())
            counts["mass" if mass[at].mean() < self.least_mass else "position" if some_right else "content"] += 1
        return counts

    @property
    def says_a(self) -> float:
        """Fraction of all prompts in which the model chooses the first label."""
        return float((self.probabilities.argmax(-1) == 0).double().mean())

    @property
    def right_at_a_before(self) -> float:
        """Fraction of all prompts whose right answer is at A."""
        return _fraction_at_a(self.asked)

    @property
    def right_at_a_after(self) -> float:
        """The same fraction among the prompts that are kept. If it is far from chance, the letter is confounded with truth."""
        return _fraction_at_a(self.prompts)

    @property
    def is_lopsided(self) -> bool:
        """Whether the check kept far more, or far fewer, right answers at A than expected by chance."""
        expected = sum(1 / p.n_choices for p in self.prompts) / max(len(self.prompts), 1)
        # the position of a completion has no label
        return bool(self.prompts and self.asked.labels) and abs(self.right_at_a_after - expected) > LOPSIDED

    def summary(self) -> str:
        """Summary in one or two sentences."""
        return say("check.summary", self)

    def explain(self) -> list[str]:
        """How many questions passed, why others failed, and what the model would say instead, in sentences."""
        return say_each("check.explain", self)

    def calibration(self, n_bins: int = CALIBRATION_BINS) -> pd.DataFrame:
        """Accuracy by confidence, which is the probability of the chosen label divided by that of all labels.

        Returns:
            One row per non-empty bin: low, high, n_prompts, confidence and accuracy (means, in [0, 1]).
        """
        # [prompt, choice]; clamped, since the probability of all labels can round to zero
        shares = self.probabilities / self.probabilities.sum(-1, keepdim=True).clamp(min=1e-12)
        confidence = shares.max(-1).values.double().numpy()
        right = self.right.double().numpy()
        least = 1 / max(self.asked.n_choices, 2)
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


@isolated
def manipulation_check(model: Model, prompts: Sequence[Prompt]) -> ManipulationCheck:
    """Ask every prompt, and keep the questions that are answered correctly in all of their prompts (paper 2.3).

    An answer is right if the right label has a strictly higher probability than every wrong one.

    Args:
        model: model to run.
        prompts: prompts from `build_prompts`.

    Raises:
        BadInput: there are no prompts.
    """
    prompts = PromptSet.of(prompts)
    if not prompts:
        raise BadInput("expected at least one prompt, got none; check that the question set is not empty")
    (probabilities,) = ask_each(model, [Asking(prompts=prompts)])
    return ManipulationCheck(asked=prompts, probabilities=probabilities, next_tokens=_next_tokens(model, prompts))


def _next_tokens(model: Model, prompts: PromptSet) -> tuple[tuple[str, float], ...]:
    """See `ManipulationCheck.next_tokens`."""
    probed = prompts[:MOST_PROBED]

    def compute(_: int) -> Tensors:
        with torch.no_grad():
            # [row, vocab] -> [vocab]
            sums = [logits.softmax(-1).sum(0) for _, logits in prompt_logits(model, probed)]
        mean = torch.stack(sums).sum(0) / len(probed)
        highest = mean.topk(min(N_NEXT, len(mean)))
        return {"ids": highest.indices.cpu(), "probabilities": highest.values.cpu()}

    (chunk,) = map_chunks("next_tokens", [chunk_key("next tokens", probed)], compute)
    pairs = zip(chunk["ids"].tolist(), chunk["probabilities"].tolist(), strict=True)
    return tuple((token_text(model.tokenizer, token), probability) for token, probability in pairs)


def is_right(probabilities: Float[Tensor, "prompt choice"], prompts: Sequence[Prompt]) -> Bool[Tensor, " prompt"]:
    """Whether the right label is more probable than every wrong one."""
    index = torch.tensor([p.right for p in prompts], dtype=torch.long).unsqueeze(-1)
    # -1 is below every probability, so the right label is not compared with itself
    others = probabilities.scatter(-1, index, -1.0)
    return probabilities.gather(-1, index).squeeze(-1) > others.max(-1).values


def _fraction_at_a(prompts: Sequence[Prompt]) -> float:
    return sum(p.right == 0 for p in prompts) / len(prompts) if prompts else float("nan")
