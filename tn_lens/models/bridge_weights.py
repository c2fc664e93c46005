"""The weights of a TransformerBridge's linear layers, whatever their class and order."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def base_rows(linear: Any) -> Float[Tensor, "input output"]:
    """The weights of a linear layer with one row per input, or those that an adapter wraps."""
    modules = linear.original_component.modules()
    base = next(module for module in modules if getattr(module, "weight", None) is not None)
    # GPT-2's Conv1D stores [input, output], other linear layers [output, input]
    return base.weight if isinstance(base, Conv1D) else base.weight.T


def weight_rows(linear: Any, rows: slice = slice(None)) -> Float[Tensor, "input output"]:
    """The weights of a linear layer, with one row per input; measured if the layer has an adapter."""
    base = base_rows(linear)
    original = linear.original_component
    if isinstance(original, nn.Linear | Conv1D):
        return base[rows]
    with torch.no_grad():
        inputs = torch.eye(len(base), dtype=base.dtype, device=base.device)[None, rows]  # [1, input, input]
        return (original(inputs) - original(torch.zeros_like(inputs[:, :1])))[0]
