"""Log-likelihoods of texts, with the rules of lm-evaluation-harness for their tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from tn_lens.core.errors import BadInput
from tn_lens.inference.answers import NO_NEURONS, ZERO
from tn_lens.inference.forward import MAX_TOKENS, MOST_LOGITS, Layout, batches_of, pad_right
from tn_lens.inference.interventions import Intervention, check_acts_on_any_text, intervention_hooks
from tn_lens.models import Model, backend_of
from tn_lens.models.isolation import isolated
from tn_lens.neurons import NeuronSet

Row = tuple[int, list[int]]
"""The index of the first token that is predicted, and the token ids."""


def log_likelihoods(
    model: Model,
    pairs: Sequence[tuple[str, str]],
    *,
    neurons: NeuronSet = NO_NEURONS,
    intervention: Intervention = ZERO,
) -> list[float]:
    """Log-likelihood of each continuation after its context: the summed log-probabilities of its tokens, in nats.

    Tokens are those of lm-evaluation-harness (`HFLM.loglikelihood` with its defaults): spaces at the end of a context belong
    to the continuation; the tokens of the context alone are followed by those tokens of the whole text that come after as
    many; the tokenizer adds its special tokens unless the context begins with the BOS token; an empty context is the BOS
    token, or the end-of-text token if there is none; a text longer than the context window loses its beginning.

    Args:
        model: a model with a tokenizer.
        pairs: contexts and continuations, such as `("Q: Is it?\\nA:", " Yes")`.
        neurons: neurons to act on; none by default.
        intervention: an intervention at all positions that takes no values from prompts; zero-ablation by default.

    Raises:
        BadInput: a continuation has no token or exceeds the context window, the model has no tokenizer, or the intervention
            needs prompts or acts at some positions only.
    """
    check_acts_on_any_text(intervention, "a log-likelihood")
    tokenizer, n_ctx = tokenizer_of(model), backend_of(model).n_ctx
    encoded = [_encode_pair(tokenizer, *pair) for pair in pairs]
    for (context, continuation), (first, ids) in zip(pairs, encoded, strict=True):
        if not 0 < len(ids) - first <= n_ctx:
            raise BadInput(
                f"expected a continuation of 1 to {n_ctx} tokens (the context window), but {continuation!r:.60} after "
                f"{context[-20:]!r} has {len(ids) - first}; give another one"
            )
    # the last token is predicted, but not part of the input
    n_cut = [max(0, len(ids) - 1 - n_ctx) for _, ids in encoded]
    if n_long := sum(map(bool, n_cut)):
        warnings.warn(
            f"{n_long} of {len(pairs)} texts are longer than the context window of {n_ctx} tokens; their beginning is left out",
            stacklevel=2,
        )
    rows = [(first - cut, ids[cut:]) for (first, ids), cut in zip(encoded, n_cut, strict=True)]
    return summed_log_probabilities(model, rows, neurons=neurons, intervention=intervention)


def tokenizer_of(model: Model) -> Any:
    """The tokenizer of a model.

    Raises:
        BadInput: it has none.
    """
    if model.tokenizer is None:
        raise BadInput("this model has no tokenizer; load it with load_model(..., tokenizer=...)")
    return model.tokenizer


def _encode_pair(tokenizer: Any, context: str, continuation: str) -> Row:
    """The tokens of a context and its continuation, as in `HFLM._encode_pair`."""
    bos = tokenizer.bos_token_id
    prefix = tokenizer.eos_token_id if bos is None else bos
    if prefix is None:
        raise BadInput("a log-likelihood needs a tokenizer with a BOS or end-of-text token; got one without")
    if not context.strip():
        continuation = context + continuation
        ids = tokenizer.encode(continuation, add_special_tokens=False)
        return 1, ids if ids[:1] == [prefix] else [prefix, *ids]

    def encode(text: str) -> list[int]:
        is_begun = text.startswith(tokenizer.decode(prefix))
        return tokenizer.encode(text, **({"add_special_tokens": False} if is_begun else {}))

    before = encode(context.rstrip())
    # after the context's own tokens, also where the last one merges with the continuation in the whole text
    return len(before), before + encode(context + continuation)[len(before) :]


@isolated
@torch.no_grad()
def summed_log_probabilities(
    model: Model, rows: Sequence[Row], *, neurons: NeuronSet, intervention: Intervention
) -> list[float]:
    """The summed log-probabilities of the tokens of each row from its first predicted one on, in nats."""
    backend = backend_of(model)
    hooks = intervention_hooks(model, [neurons], intervention, ())
    sums = [0.0] * len(rows)
    max_tokens = min(MAX_TOKENS, MOST_LOGITS // backend.d_vocab)
    for batch in batches_of([len(ids) for _, ids in rows], max_tokens):
        # nothing follows the last token
        tokens = pad_right([rows[row][1][:-1] for row in batch]).to(backend.device)
        start = min(rows[row][0] for row in batch) - 1
        with backend.hooks(hooks(Layout.aligned((), backend.device)) if hooks else []):
            logits = backend.all_logits(tokens, start=start)  # [row, column from start on, vocab]
        for row, predicted in zip(batch, logits, strict=True):
            first, ids = rows[row]
            expected = torch.tensor(ids[first:], device=predicted.device)
            # the logits at a position predict the token after it
            predicted = predicted[first - 1 - start : len(ids) - 1 - start]
            sums[row] = -float(torch.nn.functional.cross_entropy(predicted, expected, reduction="sum"))
    return sums
