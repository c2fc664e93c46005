"""What a model writes with and without some of its neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pandas as pd
import torch

from tn_lens.core.errors import BadInput
from tn_lens.inference.answers import NO_NEURONS, ZERO
from tn_lens.inference.forward import Layout
from tn_lens.inference.interventions import Intervention, check_acts_on_any_text, intervention_hooks
from tn_lens.models import Model, backend_of
from tn_lens.models.isolation import isolated
from tn_lens.neurons import NeuronSet
from tn_lens.questions.chat import ChatTemplate
from tn_lens.questions.labels import PromptTokenizer

MAX_NEW_TOKENS = 30
"""Default of the maximum number of tokens of a continuation."""


@isolated
@torch.no_grad()
def generate(
    model: Model,
    prompts: str | Sequence[str],
    *,
    neurons: NeuronSet,
    intervention: Intervention = ZERO,
    max_new_tokens: int = MAX_NEW_TOKENS,
    chat: bool = False,
) -> pd.DataFrame:
    """Continue prompts by greedy decoding, without an intervention and with neurons ablated.

    The most probable token is always chosen, without the penalties and the sampling of the checkpoint's generation config.

    Args:
        model: a model with a tokenizer.
        prompts: one or more texts.
        neurons: neurons to act on.
        intervention: an intervention at all positions that takes no values from prompts; zero-ablation by default.
        max_new_tokens: maximum number of tokens of a continuation, which ends before the model's end-of-text token.
        chat: whether each text is a user turn of the model's chat template, or a text that is continued as it is.

    Returns:
        One row per prompt, with the columns `prompt`, `unablated` and `ablated`.

    Raises:
        BadInput: there is no prompt, a prompt has no token or is too long for the context window, the model has no tokenizer
            or no chat template, or the intervention needs prompts.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or max_new_tokens < 1:
        raise BadInput(
            f"generate needs at least one prompt and one new token; got {len(texts)} and {max_new_tokens} new tokens"
        )
    check_acts_on_any_text(intervention, "generate")
    encoded = _encode(model, texts, max_new_tokens, chat=chat)
    backend, tokenizer = backend_of(model), cast(Any, model.tokenizer)
    columns: dict[str, list[str]] = {"prompt": texts}
    for name, acting in (("unablated", NO_NEURONS), ("ablated", neurons)):
        hooks = intervention_hooks(model, [acting], intervention, ())
        with backend.hooks(hooks(Layout.aligned((), backend.device)) if hooks else []):
            written = [backend.continue_greedily(ids, max_new_tokens) for ids in encoded]
        # decoded with the prompt, since tokenizers drop a space at the beginning of a text
        columns[name] = [
            tokenizer.decode([*ids, *new])[len(tokenizer.decode(ids)) :]
            for ids, new in zip(encoded, written, strict=True)
        ]
    return pd.DataFrame(columns)


def _encode(model: Model, texts: Sequence[str], max_new_tokens: int, *, chat: bool) -> list[list[int]]:
    """The token ids of the prompts, all of which leave room for the new tokens."""
    # a chat template writes its own BOS token
    tokenizer, n_ctx = PromptTokenizer(model, adds_special=not chat), backend_of(model).n_ctx
    if chat and getattr(tokenizer.tokenizer, "chat_template", None) is None:
        raise BadInput(
            "this model has no chat template; omit chat=True (--chat), so that the texts are continued as they are"
        )
    encoded = tokenizer.ids(
        [ChatTemplate(tokenizer.tokenizer, {}).render([("user", text)]) for text in texts] if chat else texts
    )
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise BadInput(f"the prompt {text!r} has no token that the model could continue; give a longer text")
        if len(ids) + max_new_tokens > n_ctx:
            raise BadInput(
                f"the prompt {text!r:.60} has {len(ids)} tokens, which with {max_new_tokens} new tokens exceed the context "
                f"window of {n_ctx}; shorten it, or generate fewer tokens"
            )
    return encoded
