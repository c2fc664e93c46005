"""Keys and values of a prefix, in Hugging Face's own cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tn_lens.models.backend import Prefix


class FrozenLayer(DynamicLayer):
    """Keys and values that every pass goes on from, and none changes."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys: Tensor = keys
        self.values: Tensor = values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The frozen ones and these."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def frozen(kept: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache that stays what it is."""
    cache = DynamicCache()
    layers: list[Any] = [FrozenLayer(keys, values) for keys, values in kept]
    cache.layers = layers
    return cache


def held(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


class BridgePrefix(Prefix):
    """Hugging Face's cache of one row."""

    def __init__(self, cache: DynamicCache) -> None:
        self.kept = held(cache)

    def expand(self, n_rows: int) -> DynamicCache:
        return frozen([(k.expand(n_rows, -1, -1, -1), v.expand(n_rows, -1, -1, -1)) for k, v in self.kept])
