"""Comparison of a model's logits with those of Hugging Face's model on a few tokens, before any other work."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.models.isolation import evaluation_mode
from tn_lens.models.tensors import at_least_float32

N_TOKENS = 8
TOLERANCE = 1e-3
"""Largest accepted error in float32, relative to the standard deviation of the logits."""
HALF_TOLERANCE = 0.1
"""The same where one of the two models computes in half precision."""

NOT_CAUSAL = (
    "expected causal attention, but in this model the last token changes the logits of earlier positions (an encoder, or "
    "a prefix language model); use a causal decoder-only model"
)


def probe_tokens(n_vocab: int, n_positions: int, device: torch.device | str) -> Int[Tensor, "2 position"]:
    """Two rows of tokens that differ at their last position only."""
    tokens = torch.arange(min(N_TOKENS, n_positions), device=device) * max(1, n_vocab // N_TOKENS) % n_vocab
    last = torch.zeros_like(tokens)
    last[-1] = 1
    return torch.stack([tokens, (tokens + last) % n_vocab])


@torch.no_grad()
def reference_logits(hf_model: Any) -> tuple[Int[Tensor, "2 position"], Float[Tensor, "2 position vocab"]]:
    """`probe_tokens`, and a Hugging Face model's logits for them in evaluation mode.

    Raises:
        BadInput: the model has no language model head, or its attention is not causal.
    """
    config = hf_model.config.get_text_config(decoder=True)
    n_positions = getattr(config, "max_position_embeddings", None) or N_TOKENS
    tokens = probe_tokens(config.vocab_size, n_positions, next(hf_model.parameters()).device)
    with evaluation_mode(hf_model):
        logits = getattr(hf_model(tokens, use_cache=False), "logits", None)
    if logits is None:
        raise BadInput(
            f"expected a causal language model, but {type(hf_model).__name__} has no logits; load it with "
            "AutoModelForCausalLM"
        )
    logits = at_least_float32(logits)
    reject_bidirectional(logits, hf_model.dtype)
    return tokens, logits


def reject_bidirectional(logits: Float[Tensor, "2 position vocab"], dtype: torch.dtype) -> None:
    """Reject a model in which a token affects the logits of earlier positions.

    Args:
        logits: logits of `probe_tokens`.
        dtype: dtype of the model's weights.

    Raises:
        BadInput: the logits before the last position differ.
    """
    # the rows of a causal model differ by rounding at most
    if relative_error(logits[0, :-1], logits[1, :-1]) > (1e-2 if dtype.itemsize == 2 else 1e-5):
        raise BadInput(NOT_CAUSAL)


def relative_error(logits: Float[Tensor, "*row vocab"], expected: Float[Tensor, "*row vocab"]) -> float:
    """Root mean square of the difference, relative to that of the expected logits. Offsets of a row do not count."""
    differences = (logits - expected, expected)
    error, scale = (float((value - value.mean(-1, keepdim=True)).pow(2).mean().sqrt()) for value in differences)
    return error if scale == 0 else error / scale


def reject_different(
    logits: Float[Tensor, "2 position vocab"],
    hf_model: Any,
    expected: Float[Tensor, "2 position vocab"],
    dtype: torch.dtype,
    advice: str,
) -> None:
    """Reject a model whose logits for `probe_tokens` differ from those of the Hugging Face model.

    Args:
        logits: logits of the model.
        hf_model: the Hugging Face model.
        expected: its `reference_logits`.
        dtype: dtype of the model's weights.
        advice: what to do, as the end of the message.

    Raises:
        BadInput: the logits differ, or are not finite.
    """
    if not logits.isfinite().all():
        raise BadInput(
            "expected finite logits, but those of this model are not; check its weights for NaN, and load it in "
            "bfloat16 or float32 instead of float16"
        )
    is_half = min(hf_model.dtype.itemsize, dtype.itemsize) == 2
    tolerance = HALF_TOLERANCE if is_half else TOLERANCE
    error = relative_error(logits, expected.to(logits.device))
    if not error <= tolerance:  # also if NaN
        raise BadInput(
            f"expected the logits of Hugging Face's {type(hf_model).__name__}, but they differ by {error:.2g} standard "
            f"deviations; {advice}"
        )
