"""Operations on modules and tensors that both model classes need, and the attention masks of prompts and their rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from tn_lens.core.errors import BadInput

M = TypeVar("M", bound=nn.Module)

Replacement = tuple[nn.Module, str, Any]
"""A module, the name of one of its methods or attributes, and its replacement."""


def freeze(model: M) -> M:
    """Disable dropout and the gradients of all parameters, so that only interpolated activations have gradients."""
    return model.requires_grad_(False).eval()


def at_least_float32(tensor: Float[Tensor, "*axis"]) -> Float[Tensor, "*axis"]:
    """Convert half precision to float32 and leave wider dtypes unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def replace_methods(replacements: Iterable[Replacement]) -> Iterator[None]:
    """Replace methods or attributes of single modules inside a `with` block, and restore them on exit."""
    originals: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module, name, replacement in replacements:
            originals.append((vars(module), name, vars(module).get(name)))
            vars(module)[name] = replacement
        yield
    finally:
        # in reverse order, in case one was replaced twice
        for attributes, name, original in reversed(originals):
            if original is None:  # the original method is defined by the class
                del attributes[name]
            else:
                attributes[name] = original


def rows_of(value: Shaped[Tensor, "prefix *_"], index: Int[Tensor, " row"]) -> Shaped[Tensor, "row *_"]:
    """The row of `value` at each index; a view if there is only one."""
    return value.expand(len(index), *value.shape[1:]) if len(value) == 1 else value[index]


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor without its graph. A copy if it was created in inference mode, since autograd rejects such tensors."""
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()


@contextmanager
def block_inputs(blocks: Iterable[nn.Module]) -> Iterator[list[Float[Tensor, "prompt 1 d_model"]]]:
    """Collect the input of each block at the last position, before any hook point of the block, during a pass."""
    inputs: list[Tensor] = []

    def collect(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0][:, -1:].clone())  # [prompt, position, d_model] -> [prompt, 1, d_model]

    handles = [block.register_forward_pre_hook(collect) for block in blocks]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Rows of several prompts each, in which a column attends only to the columns of the same prompts."""

    tokens: Int[Tensor, "row column"]
    positions: Int[Tensor, "row column"]
    """Position of each column in its prompt."""
    visible: Bool[Tensor, "row column column"]
    """The columns that each column attends to."""
    n_before: int
    """Number of cached positions before the rows, which every column attends to."""

    @property
    def key_positions(self) -> Int[Tensor, "row key"]:
        """Positions of the cached keys and of the columns."""
        before = torch.arange(self.n_before, device=self.positions.device).expand(len(self.tokens), -1)
        return torch.cat([before, self.positions], 1)

    def allowed(self, window: int | None = None) -> Bool[Tensor, "row 1 column key"]:
        """The keys that each column attends to.

        Args:
            window: number of positions that local attention covers, the query's position included. None: all positions.
        """
        visible = torch.nn.functional.pad(self.visible, (self.n_before, 0), value=True)
        if window is not None:
            visible = visible & (self.positions[:, :, None] - self.key_positions[:, None] < window)
        return visible[:, None]


def reject_rotated(w_o: Float[Tensor, "head d_head d_model"]) -> None:
    """Reject a W_O whose rows are orthogonal within every head.

    Raises:
        BadInput: the rows are orthogonal, so the basis of z was rotated.
    """
    gram = torch.einsum("him,hjm->hij", w_o.float(), w_o.float())  # [head, d_head, d_head]
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    if gram.abs().sum() > 0 and (gram - diagonal.diag_embed()).abs().max() < 1e-4 * diagonal.abs().max():
        raise BadInput(
            "expected hook_z in the model's original basis, but the rows of W_O are orthogonal, which is the effect of "
            "refactor_factored_attn_matrices; load the model without that option"
        )


def causal_mask(
    is_token: Bool[Tensor, "prompt position"], window: int | None = None
) -> Bool[Tensor, "prompt 1 position position"]:
    """The keys that each position attends to: itself and the earlier positions that are not padding.

    Args:
        is_token: False at padding.
        window: number of positions that local attention covers, the query's position included. None: all positions.
    """
    columns = torch.arange(is_token.shape[1], device=is_token.device)
    distance = columns[:, None] - columns  # [query, key]
    in_window = (distance >= 0) & (distance < (window or len(columns)))
    # padding attends to itself, since a softmax over no key would be NaN; -> [prompt, 1 (all heads), query, key]
    return ((in_window & is_token[:, None]) | (distance == 0))[:, None]


def visible_prefix(is_token: Bool[Tensor, "prompt prefix"], window: int | None = None) -> Bool[Tensor, "prompt prefix"]:
    """The positions of the prefix that the last position of each prompt attends to.

    Args:
        is_token: False at padding.
        window: number of positions that local attention covers, the query's position included. None: all positions.
    """
    if window is None:
        return is_token
    columns = torch.arange(is_token.shape[1], device=is_token.device)
    return is_token & (columns > is_token.shape[1] - window)


def sibling_mask(
    is_token: Bool[Tensor, "prompt prefix"], n_rows: int, window: int | None = None
) -> Bool[Tensor, "prompt 1 row key"]:
    """The keys that sibling rows attend to: the prefix, as the last position does, and each row itself.

    Args:
        is_token: False at padding.
        n_rows: number of rows per prompt.
        window: number of positions that local attention covers, the query's position included. None: all positions.
    """
    prefix = visible_prefix(is_token, window)[:, None].expand(-1, n_rows, -1)  # [prompt, row, prefix]
    itself = torch.eye(n_rows, dtype=torch.bool, device=is_token.device).expand(len(is_token), -1, -1)
    return torch.cat([prefix, itself], -1)[:, None]  # key = prefix + row
