"""What a model writes with and without some of its neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from tn_lens.core.errors import BadInput
from tn_lens.inference.answers import NO_NEURONS, ZERO
from tn_lens.inference.forward import prompt_logits
from tn_lens.inference.interventions import Intervention, intervention_hooks
from tn_lens.models import Model, backend_of
from tn_lens.models.isolation import isolated
from tn_lens.neurons import NeuronSet
from tn_lens.questions.prompts import Prompt

MAX_NEW_TOKENS = 30


@isolated
@torch.no_grad()
def generate(
    model: Model,
    prompts: str | Prompt | Sequence[str | Prompt],
    *,
    neurons: NeuronSet,
    intervention: Intervention = ZERO,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> pd.DataFrame:
    """Continuations of prompts, unablated and with neurons ablated, by greedy decoding.

    Args:
        model: a model with a tokenizer.
        prompts: texts that are continued as they are, without a chat template, or prompts of `build_prompts`.
        neurons: neurons to act on.
        intervention: an intervention at all positions that takes no values from prompts; zero-ablation by default.
        max_new_tokens: maximum number of tokens of a continuation, which ends before the end-of-text token.

    Returns:
        One row per prompt with the columns `prompt`, `unablated` and `ablated`.

    Raises:
        BadInput: there is no prompt, the model has no tokenizer, or the intervention needs prompts.
    """
    given = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
    if not given or max_new_tokens < 1:
        raise BadInput(
            f"generate needs at least one prompt and one new token; got {len(given)} and {max_new_tokens}"
        )
    if intervention.needs_prompts or intervention.positions != "all":
        raise BadInput(
            "generate needs an intervention at all positions that takes no values from prompts: zero, scale, or mean with "
            f"values; got {intervention.description!r}"
        )
    if model.tokenizer is None:
        raise BadInput("this model has no tokenizer; load it with load_model(..., tokenizer=...)")
    tokenizer: Any = model.tokenizer
    encoded = [
        each
        if isinstance(each, Prompt)
        else Prompt(token_ids=tuple(tokenizer(each)["input_ids"]), label_ids=(), right=0, text=each)
        for each in given
    ]
    longest = max(len(prompt.token_ids) for prompt in encoded)
    if longest + max_new_tokens > backend_of(model).n_ctx:
        raise BadInput(
            f"the longest prompt has {longest} tokens; with {max_new_tokens} new tokens it exceeds the context window of "
            f"{backend_of(model).n_ctx}"
        )
    columns = {"prompt": [prompt.text for prompt in encoded]}
    for name, acting in (("unablated", NO_NEURONS), ("ablated", neurons)):
        columns[name] = [
            tokenizer.decode(ids) for ids in _continue(model, encoded, acting, intervention, max_new_tokens)
        ]
    return pd.DataFrame(columns)


def _continue(
    model: Model, prompts: Sequence[Prompt], neurons: NeuronSet, intervention: Intervention, max_new_tokens: int
) -> list[tuple[int, ...]]:
    """The new token ids of every prompt."""
    hooks = intervention_hooks(model, neurons, intervention, ())
    end = getattr(model.tokenizer, "eos_token_id", None)
    written: list[tuple[int, ...]] = [()] * len(prompts)
    unfinished = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        longer = [replace(prompts[row], token_ids=prompts[row].token_ids + written[row]) for row in unfinished]
        chosen: dict[int, int] = {}
        for rows, logits in prompt_logits(model, longer, hooks=hooks):
            chosen |= dict(zip(rows, logits.argmax(-1).tolist(), strict=True))
        going = [unfinished[row] for row, token in sorted(chosen.items()) if token != end]
        for row, token in chosen.items():
            if token != end:
                written[unfinished[row]] += (token,)
        unfinished = going
        if not unfinished:
            break
    return written
