"""The fast engine: rows of one position each, on the frozen keys and values of the prompt before them.

Only the last position is interpolated and attention is causal, so the keys and values of the earlier positions never change.
The prompt is run once; after that every (site, layer, step) is a single position that attends to the frozen prefix and to
itself. Rows enter at the layer they touch, since below it they equal the untouched run. The results are those of the direct
engine; the cost per prompt is about T + 2 L m tokens through half of the stack instead of 2 L m T through all of it.

The rows of a prompt stand side by side as sibling positions of one sequence, which copies no keys or values: TransformerLens
takes rotary positions from the running sum of the attention mask, and a mask that ends in 1, 0, 0, ... gives all of them the
position T - 1. Each attention's causal mask is replaced, for the length of a pass, by "the prefix and myself".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import TransformerLensKeyValueCache

from ..answers import pad_left
from ..models import Model, unembed
from ..neurons import Site, hook_name
from ..prompts import Prompt
from .direct import stack_layers
from .integrate import Place, replacing


def unsupported(model: Model) -> str | None:
    """Why a model needs the direct engine; None if it does not."""
    cfg = model.cfg
    reasons = {
        f"{cfg.positional_embedding_type} positions": cfg.positional_embedding_type not in ("standard", "rotary"),
        "log-n attention scaling": cfg.use_logn_attn,
        "dynamic NTK rope scaling": cfg.use_dynamic_ntk_rope,
        "bidirectional attention": cfg.attention_dir != "causal",
        "layers on several devices": cfg.n_devices > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


LAYERS_PER_PASS = 4
"""Layers whose rows enter together: few enough to skip the layers below, many enough to fill the matrix products."""
PROMPTS_PER_PASS = 16
"""At most so many prompts side by side, where memory allows."""


def plan(model: Model, n_tokens: int, n_places: int, n_steps: int, max_memory: int) -> tuple[int, int]:
    """How many prompts and rows go into one pass: constants of the model's shape and the budget, never of free memory.

    Args:
        n_tokens: of the longest prompt.
        n_places: sites of one layer.
        max_memory: bytes that one pass may take above the weights, by an estimate of what its backward pass keeps.
    """
    cfg = model.cfg
    n_rows = LAYERS_PER_PASS * n_places * n_steps
    d_mlp, d_attn = cfg.d_mlp or 0, cfg.n_heads * cfg.d_head
    of_layer = 8 * cfg.d_model + 6 * d_attn + 5 * d_mlp + 4 * cfg.n_heads * (n_tokens + n_rows)
    of_row = cfg.dtype.itemsize * cfg.n_layers * of_layer + 5 * 4 * cfg.d_vocab_out
    fitting = max_memory // of_row
    return max(1, min(PROMPTS_PER_PASS, fitting // n_rows)), max(1, min(n_rows, fitting))


class SharedPrefix:
    """Some prompts of any length, and single positions behind their common prefix with activations replaced."""

    def __init__(self, model: Model, prompts: Sequence[Prompt], sites: Sequence[Site]) -> None:
        cfg = model.cfg
        self.model, self.prompts = model, list(prompts)
        tokens, mask = (tensor.to(cfg.device) for tensor in pad_left(prompts))
        self.seen: Bool[Tensor, "prompt prefix"] = mask[:, :-1].bool()
        self.cache = TransformerLensKeyValueCache.init_cache(cfg, cfg.device, len(prompts))
        kept: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> None:
            kept[hook.name] = value[:, -1:].flatten(2)

        layers = range(cfg.n_layers)
        names = {hook_name(site, layer) for site in sites for layer in layers}
        names |= {f"blocks.{layer}.hook_resid_pre" for layer in layers}
        with torch.no_grad(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
            residual = model(tokens, attention_mask=mask, past_kv_cache=self.cache, stop_at_layer=cfg.n_layers)
            self.logits = unembed(model, residual[:, -1])
        self.own = stack_layers(kept, sites, cfg.n_layers)
        self.entering = [kept[f"blocks.{layer}.hook_resid_pre"] for layer in layers]
        for entry in self.cache.entries:
            entry.past_keys, entry.past_values = entry.past_keys[:, :-1], entry.past_values[:, :-1]
        self.cache.freeze()

    def run(self, paths: Mapping[Place, Float[Tensor, "prompt _ 1 _"]]) -> Float[Tensor, "prompt row vocab"]:
        """Last logits of the rows, entered at the lowest layer that any of them touches."""
        n_rows = sum(path.shape[1] for path in paths.values())
        first = min(layer for _, layer in paths)
        rows = self.entering[first].expand(-1, n_rows, -1)
        mask = torch.zeros(len(rows), self.seen.shape[1] + n_rows, dtype=torch.long, device=rows.device)
        mask[:, : self.seen.shape[1]] = self.seen
        mask[:, self.seen.shape[1]] = 1
        hooks = replacing(paths, lambda rows: (slice(None), rows))
        with siblings(self.model, self.seen, n_rows), self.model.hooks(fwd_hooks=hooks):
            residual = self.model(
                rows,
                start_at_layer=first,
                stop_at_layer=self.model.cfg.n_layers,
                past_kv_cache=self.cache,
                attention_mask=mask,
            )
        return unembed(self.model, residual)


@contextmanager
def siblings(model: Model, seen: Bool[Tensor, "prompt prefix"], n_rows: int) -> Iterator[None]:
    """Let every row attend to the prefix, as far as its position T - 1 would see, and to itself."""
    itself = torch.eye(n_rows, dtype=torch.bool, device=seen.device).expand(len(seen), -1, -1)

    def visible(attention: Any) -> Bool[Tensor, "prompt 1 row key"]:
        near = seen
        if attention.attn_type == "local":  # position T - 1 sees the window that ends with itself
            places = torch.arange(seen.shape[1], device=seen.device)
            near = seen & (places > seen.shape[1] - (model.cfg.window_size or 0))
        return torch.cat([near[:, None].expand(-1, n_rows, -1), itself], -1)[:, None]

    attentions: list[Any] = [block.attn for block in model.blocks]
    masks = {attention.attn_type: visible(attention) for attention in attentions}
    try:
        for attention in attentions:

            def mask(scores: Tensor, *_: object, attention: Any = attention, **__: object) -> Tensor:
                return torch.where(masks[attention.attn_type], scores, attention.IGNORE)

            attention.apply_causal_mask = mask
        yield
    finally:
        for attention in attentions:
            vars(attention).pop("apply_causal_mask", None)
