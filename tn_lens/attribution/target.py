"""Targets: the functions of the logits at a prompt's last position that are attributed (paper eq. 6-8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.core.options import TargetName
from tn_lens.questions.prompts import Prompt

Target: TypeAlias = Callable[[Float[Tensor, "row vocab"], Prompt], Float[Tensor, " row"]]
"""Function of the last logits of several rows of one prompt, and of the prompt, that returns one number per row."""


def right_probability(logits: Float[Tensor, "row vocab"], prompt: Prompt) -> Float[Tensor, " row"]:
    """f(T|t): the probability of the right label, upper and lower case, under the softmax over the full vocabulary (eq. 6)."""
    return logits.softmax(-1)[:, list(prompt.label_ids[prompt.right])].sum(-1)


def wrong_probability(logits: Float[Tensor, "row vocab"], prompt: Prompt) -> Float[Tensor, " row"]:
    """f(T|f): the probability of the wrong labels (eq. 7)."""
    return logits.softmax(-1)[:, list(prompt.wrong_ids)].sum(-1)


def probability_difference(logits: Float[Tensor, "row vocab"], prompt: Prompt) -> Float[Tensor, " row"]:
    """f(T|t) - f(T|f), whose attribution is D (eq. 8), since integrated gradients are linear in f."""
    probabilities = logits.softmax(-1)
    right, wrong = list(prompt.label_ids[prompt.right]), list(prompt.wrong_ids)
    return probabilities[:, right].sum(-1) - probabilities[:, wrong].sum(-1)


def normalized_difference(logits: Float[Tensor, "row vocab"], prompt: Prompt) -> Float[Tensor, " row"]:
    """(f_t - f_f) / (f_t + f_f): insensitive to neurons that raise or lower all labels together (figure 2's cases 1 and 4)."""
    difference, mass = probability_difference(logits, prompt), right_probability(logits, prompt)
    return difference / (mass + wrong_probability(logits, prompt))


def log_ratio(logits: Float[Tensor, "row vocab"], prompt: Prompt) -> Float[Tensor, " row"]:
    """log f_t - log f_f: a difference of logits, which does not saturate."""
    right, wrong = list(prompt.label_ids[prompt.right]), list(prompt.wrong_ids)
    return logits[:, right].logsumexp(-1) - logits[:, wrong].logsumexp(-1)


TARGETS: Mapping[str, Target] = {
    "probability_difference": probability_difference,
    "normalized_difference": normalized_difference,
    "log_ratio": log_ratio,
}
"""The targets by name."""


def resolve_target(target: Target | TargetName) -> Target:
    """The function of a named target, or the given function.

    Raises:
        BadInput: the name is unknown.
    """
    if not isinstance(target, str):
        return target
    if target not in TARGETS:
        raise BadInput(
            f"unknown target {target!r}: expected {', '.join(TARGETS)}, or a function of the logits at the last position"
        )
    return TARGETS[target]
