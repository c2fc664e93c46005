"""Products of float32 activations with half-precision weights, without a float32 copy of the weights."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

COLUMNS_PER_PRODUCT = 8192
"""Number of columns of W_U that are converted to float32 at a time."""


class _WideLinear(torch.autograd.Function):
    """The product with the transposed weights in the dtype of the input. The weights get no gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Float[Tensor, "row d_model"], weight: Float[Tensor, "vocab d_model"]) -> Tensor:
        ctx.save_for_backward(weight)
        product = rows.new_empty(len(rows), len(weight))
        for start in range(0, len(weight), COLUMNS_PER_PRODUCT):
            columns = slice(start, start + COLUMNS_PER_PRODUCT)
            product[:, columns] = rows @ weight[columns].to(rows.dtype).T
        return product

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "row vocab"]) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        total = gradient.new_zeros(len(gradient), weight.shape[1])
        for start in range(0, len(weight), COLUMNS_PER_PRODUCT):
            columns = slice(start, start + COLUMNS_PER_PRODUCT)
            total += gradient[:, columns] @ weight[columns].to(gradient.dtype)
        return total, None


def wide_linear(
    stream: Float[Tensor, "*row d_model"], weight: Float[Tensor, "vocab d_model"], bias: Float[Tensor, " vocab"] | None
) -> Float[Tensor, "*row vocab"]:
    """A linear layer in float32 for weights in half precision, which are converted in blocks, forward and backward."""
    rows = stream.float().flatten(0, -2)  # [row, d_model]
    logits = _WideLinear.apply(rows, weight).unflatten(0, stream.shape[:-1])
    return logits if bias is None else logits + bias
