"""How rows join a running TransformerBridge: a hook before each block puts them beside those that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@contextmanager
def joining(
    of_layer: Mapping[int, int],
    entering: Sequence[Float[Tensor, "prompt 1 d_model"]],
    blocks: Any,
    masks: Any,
    masks_of: Callable[[int], Any],
) -> Iterator[None]:
    """Let rows join before the blocks of their layers.

    Args:
        of_layer: how many, by layer.
        entering: what enters each block of the untouched run; nothing joins where that is empty.
        blocks: of the model.
        masks: of one position, in whose place a block gets those of its rows.
        masks_of: masks of so many rows.
    """
    n_rows, wide = 0, masks
    handles: list[Any] = []
    try:
        for layer in range(min(of_layer), len(entering)):
            new = entering[layer].expand(-1, of_layer.get(layer, 0), -1)
            beside, n_rows = n_rows, n_rows + new.shape[1]
            wide = masks_of(n_rows) if n_rows > beside else wide
            before = _widening(new, beside, n_rows, {id(one): other for one, other in _pairs(masks, wide)})
            handles.append(blocks[layer].register_forward_pre_hook(before, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widening(
    new: Float[Tensor, "prompt _ d_model"], beside: int, n_rows: int, wide_of: Mapping[int, Tensor]
) -> Callable[..., tuple[Any, Any]]:
    """A hook before a block: rows join, and whatever else is given for one position is given for all of them.

    Args:
        beside: rows that are there already.
        wide_of: by the identity of a mask of one position, that of all rows.
    """

    def widen(value: Any) -> Any:
        if isinstance(value, tuple):  # cosines and sines
            return tuple(widen(one) for one in value)
        if not isinstance(value, Tensor):
            return value
        one_position = value.ndim in (2, 3) and value.shape[1] == 1
        return value.expand(-1, n_rows, *value.shape[2:]) if one_position else wide_of.get(id(value), value)

    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        there, *others = given
        rows = torch.cat([there, new], dim=1) if beside else new
        return (rows, *map(widen, others)), {name: widen(value) for name, value in named.items()}

    return before


def _pairs(masks: Any, others: Any) -> list[tuple[Tensor, Tensor]]:
    """Masks of the same kinds of layers."""
    return [(masks[kind], others[kind]) for kind in masks] if isinstance(masks, dict) else [(masks, others)]
