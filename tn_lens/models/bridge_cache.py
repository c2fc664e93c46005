"""Keys and values of a prefix in Hugging Face's cache classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tn_lens.models.backend import Prefix


class FrozenLayer(DynamicLayer):
    """Keys and values that every pass continues and no pass changes."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys: Tensor = keys
        self.values: Tensor = values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the frozen keys and values followed by the new ones, without storing the new ones."""
        # [row, head, prefix, d_head] and [row, head, new, d_head] -> [row, head, prefix + new, d_head]
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def frozen_cache(keys_and_values: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache of the given keys and values of each layer that no pass changes."""
    cache = DynamicCache()
    layers: list[Any] = [FrozenLayer(keys, values) for keys, values in keys_and_values]
    cache.layers = layers
    return cache


def read_cache(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, each [row, head, position, d_head]."""
    return [(layer.keys, layer.values) for layer in cache.layers]


class BridgePrefix(Prefix):
    """Hugging Face's cache of one row."""

    def __init__(self, cache: DynamicCache) -> None:
        self.layers = read_cache(cache)

    def expand(self, n_rows: int) -> DynamicCache:
        # views of [1, head, prefix, d_head] as [row, head, prefix, d_head]
        return frozen_cache([(k.expand(n_rows, -1, -1, -1), v.expand(n_rows, -1, -1, -1)) for k, v in self.layers])
