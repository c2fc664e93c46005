"""Keys and values of a prefix in Hugging Face's cache classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class FrozenLayer(DynamicLayer):
    """Cached keys and values that forward passes read but never change."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys: Tensor = keys
        self.values: Tensor = values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the frozen keys and values followed by the new ones, without storing the new ones."""
        # [row, head, prefix, d_head] and [row, head, new, d_head] -> [row, head, prefix + new, d_head]
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def frozen_cache(cache: Any, view: Callable[[Tensor], Tensor]) -> DynamicCache:
    """A cache that passes never change, made of a view of each layer's keys and values [row, head, position, d_head]."""
    frozen = DynamicCache()
    layers: list[Any] = [FrozenLayer(view(layer.keys), view(layer.values)) for layer in cache.layers]
    frozen.layers = layers
    return frozen
