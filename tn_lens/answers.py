"""Ask the model: the probability of every shown choice (paper eq. 6-7), at the last position of each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import BadInput
from .models import Model, last_logits
from .progress import track
from .prompts import Prompt

MAX_TOKENS = 4096
"""Tokens in one batch, padding included. A constant, since results differ in bits between batch sizes."""


@torch.no_grad()
def ask(
    model: Model, prompts: Sequence[Prompt], *, max_tokens: int = MAX_TOKENS, progress: str | None = None
) -> Float[Tensor, "prompt choice"]:
    """Full-vocabulary softmax, summed over the label ids of each shown choice; never renormalised over the labels.

    Args:
        model: to ask.
        prompts: of any length; they are sorted by length and padded on the left.
        max_tokens: in one batch.
        progress: text of a progress bar; none by default.

    Returns:
        Probabilities in [0, 1] on the CPU, in at least float32; 0 where a prompt has fewer choices than the widest.

    Raises:
        BadInput: the model answers NaN, with the dtype to change.
    """
    width = max((p.n_choices for p in prompts), default=0)
    answers = torch.zeros(len(prompts), width, dtype=torch.promote_types(model.cfg.dtype, torch.float32))
    for batch in track(list(batches(prompts, max_tokens)), progress):
        tokens, mask = pad_left([prompts[index] for index in batch])
        device = model.cfg.device
        probabilities = last_logits(model, tokens.to(device), mask.to(device)).softmax(-1).cpu()
        if not probabilities.isfinite().all():
            raise BadInput(f"the model's logits are not finite in {model.cfg.dtype}; load it in bfloat16 or float32")
        for row, index in enumerate(batch):
            for shown, ids in enumerate(prompts[index].label_ids):
                answers[index, shown] = probabilities[row, list(ids)].sum()
    return answers


def batches(prompts: Sequence[Prompt], max_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts of similar length, at most `max_tokens` padded tokens together (but at least one prompt)."""
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids)):
        if batch and (len(batch) + 1) * len(prompts[index].token_ids) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad_left(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Token ids [prompt, position] padded on the left, and the attention mask that hides the padding."""
    longest = max(len(p.token_ids) for p in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask[row, longest - len(prompt.token_ids) :] = 1
    return tokens, mask
