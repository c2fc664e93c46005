"""Rows that join a running TransformerBridge: a hook before each block appends them to the rows that already run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@contextmanager
def join_rows(
    rows_at: Mapping[int, int],
    block_inputs: Sequence[Float[Tensor, "prompt 1 d_model"]],
    blocks: Any,
    masks: Any,
    masks_for: Callable[[int], Any],
) -> Iterator[None]:
    """Append rows to the input of the blocks at which they first differ from the prompt.

    Args:
        rows_at: number of rows by layer.
        block_inputs: the input of each block in the run without intervention. If empty, no rows are appended.
        blocks: the model's blocks.
        masks: attention masks for one position, which are replaced by the masks for all rows of a block.
        masks_for: computes the masks for a number of rows.
    """
    n_rows, row_masks = 0, masks
    handles: list[Any] = []
    try:
        # below the lowest of these layers, all rows equal the prompt, so the pass runs a single position
        for layer in range(min(rows_at), len(block_inputs)):
            new = block_inputs[layer].expand(-1, rows_at.get(layer, 0), -1)  # [prompt, new row, d_model]
            n_before, n_rows = n_rows, n_rows + new.shape[1]
            row_masks = masks_for(n_rows) if n_rows > n_before else row_masks
            # a model with several kinds of layers has a mask for each
            old, new_masks = (masks, row_masks) if isinstance(masks, dict) else ({"": masks}, {"": row_masks})
            mask_by_id = {id(mask): new_masks[kind] for kind, mask in old.items()}
            hook = _append_rows(new, n_before, n_rows, mask_by_id)
            handles.append(blocks[layer].register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _append_rows(
    new: Float[Tensor, "prompt _ d_model"], n_before: int, n_rows: int, mask_by_id: Mapping[int, Tensor]
) -> Callable[..., tuple[Any, Any]]:
    """A forward pre-hook that appends rows to a block's input and expands its other arguments to all rows.

    Args:
        new: the rows to append.
        n_before: number of rows that already run.
        n_rows: number of rows with the new ones.
        mask_by_id: the mask for all rows by the `id` of the mask for one position.
    """

    def expand(value: Any) -> Any:
        if isinstance(value, tuple):  # cosines and sines of the rotary embedding
            return tuple(map(expand, value))
        if not isinstance(value, Tensor):
            return value
        # [prompt, 1] and [prompt, 1, ...] -> [prompt, row, ...]
        is_one_position = value.ndim in (2, 3) and value.shape[1] == 1
        return value.expand(-1, n_rows, *value.shape[2:]) if is_one_position else mask_by_id.get(id(value), value)

    def before_block(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        stream, *others = arguments
        # the first rows replace the position that ran below them
        rows = torch.cat([stream, new], dim=1) if n_before else new
        return (rows, *map(expand, others)), {name: expand(value) for name, value in named.items()}

    return before_block
