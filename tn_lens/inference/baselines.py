"""Activations on a baseline input, for the baseline "input" of integrated gradients.

The paper integrates from "the corresponding activation when the baseline input is applied" (2.1) and leaves that input open.
Three readings are offered:

- `"zero_embeddings"`: an input as long as the prompt whose token embeddings are zero; added positional embeddings stay. In a
  model without biases and added positions, all activations are then zero, as with the baseline "zero".
- `"end_of_text"`: an input as long as the prompt that consists of padding tokens, after the BOS token if the prompt begins
  with it. All of them are attended to. The padding token is the tokenizer's, or its end-of-text token if it has none.
- `"blanked"`: the prompt's template rendered without context, question and choices. Instruction, solved examples, labels and
  the end of the prompt stay, so this input is shorter than the prompt, and all questions with the same labels share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.core.options import NEURON_SITES, BaselineInput
from tn_lens.inference.activations import last_activations
from tn_lens.models import Hooks, Model, backend_of
from tn_lens.models.isolation import isolated
from tn_lens.neurons import SiteName
from tn_lens.questions.prompts import Prompt

EMBEDDINGS = "hook_embed"
"""Hook point of the token embeddings, before positional embeddings are added."""


@isolated
@torch.no_grad()
def input_activations(
    model: Model,
    prompts: Sequence[Prompt],
    baseline_input: BaselineInput = "end_of_text",
    *,
    sites: Sequence[SiteName] = NEURON_SITES,
) -> dict[SiteName, Float[Tensor, "prompt layer _"]]:
    """Activations at the last position of the baseline input of every prompt.

    Each distinct input is run once.

    Args:
        model: model without interventions.
        prompts: prompts whose baseline inputs are run.
        baseline_input: kind of input, see above.
        sites: sites to read.

    Returns:
        Activations on the CPU, in at least float32.

    Raises:
        BadInput: the kind is unknown, the tokenizer has no suitable token, or a prompt has no template.
    """
    inputs = baseline_tokens(model, prompts, baseline_input)
    row_of = {token_ids: row for row, token_ids in enumerate(dict.fromkeys(inputs))}
    distinct = [Prompt(token_ids=token_ids, label_ids=(), right=0) for token_ids in row_of]
    blank: Hooks = [(EMBEDDINGS, _zeros)] if baseline_input == "zero_embeddings" else []
    rows = [row_of[token_ids] for token_ids in inputs]
    return {site: values[rows] for site, values in last_activations(model, distinct, sites, also=blank).items()}


def baseline_tokens(model: Model, prompts: Sequence[Prompt], baseline_input: BaselineInput) -> list[tuple[int, ...]]:
    """Token ids of the baseline input of every prompt; for zero embeddings, any ids of the prompt's length."""
    match baseline_input:
        case "zero_embeddings":
            return [(0,) * len(prompt.token_ids) for prompt in prompts]
        case "end_of_text":
            tokenizer, padding = model.tokenizer, padding_token(model)
            bos = None if tokenizer is None else tokenizer.bos_token_id
            kept = [prompt.token_ids[:1] if prompt.token_ids[:1] == (bos,) else () for prompt in prompts]
            return [
                (*first, *[padding] * (len(p.token_ids) - len(first))) for p, first in zip(prompts, kept, strict=True)
            ]
        case "blanked":
            if not all(prompt.blank_ids for prompt in prompts):
                raise BadInput(
                    "baseline_input 'blanked' needs prompts of build_prompts in a format with text besides the question and its "
                    "choices, such as 'letters'; use 'end_of_text' or 'zero_embeddings'"
                )
            return [prompt.blank_ids for prompt in prompts]
        case _:
            names = ", ".join(map(repr, get_args(BaselineInput)))
            raise BadInput(f"baseline_input must be one of {names}; got {baseline_input!r}")


def padding_token(model: Model) -> int:
    """The tokenizer's padding token, unless it is also the unknown or the BOS token; otherwise its end-of-text token.

    Raises:
        BadInput: there is no such token, or the model has no embedding for it.
    """
    tokenizer: Any = model.tokenizer
    names = ("pad_token_id", "eos_token_id", "unk_token_id", "bos_token_id")
    padding, end, *others = (getattr(tokenizer, name, None) for name in names)
    token = end if padding in (None, *others) else padding
    if token is None or token >= backend_of(model).n_embeddings:
        raise BadInput(
            "baseline_input 'end_of_text' needs a tokenizer with a padding or end-of-text token that the model can embed; use "
            "'zero_embeddings' or 'blanked'"
        )
    return token


def _zeros(value: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(value)
