"""The fast engine: rows of one position each, on the frozen keys and values of the prompt before them.

Only the last position is interpolated and attention is causal, so the keys and values of the earlier positions never change.
The prompt is run once; after that every (site, layer, step) is a single position that attends to the frozen prefix and to
itself. Rows join at the layer they touch, since below it they equal the untouched run. The results are those of the direct
engine; the cost per prompt is about T + 2 L m tokens through half of the stack instead of 2 L m T through all of it.

The rows of a prompt stand side by side as sibling positions of one sequence, which copies no keys or values: TransformerLens
takes rotary positions from the running sum of the attention mask, and a mask that ends in 1, 0, 0, ... gives all of them the
position T - 1. Each attention's causal mask is replaced, for the length of a pass, by "the prefix and myself".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import TransformerLensKeyValueCache

from ..forward import pad_left, unshareable
from ..models import Model, unembed
from ..neurons import Site, hook_name
from ..prompts import Prompt
from .direct import stack_layers
from .integrate import Place, replacing
from .result import PassSize


def unsupported(model: Model) -> str | None:
    """Why a model needs the direct engine; None if it does not."""
    return unshareable(model) or ("layers on several devices" if model.cfg.n_devices > 1 else None)


LAYERS_PER_PASS = 4
"""Layers whose rows run together: more fill the matrix products better and cost memory; 3 to 12 were alike on two cores."""
PROMPTS_PER_PASS = 16
"""At most so many prompts side by side, where memory allows."""


def plan(model: Model, n_tokens: int, n_places: int, n_steps: int, max_memory: int) -> PassSize:
    """How many prompts and rows go into one pass: constants of the model's shape and the budget, never of free memory.

    Args:
        n_tokens: of the longest prompt.
        n_places: sites of one layer.
        max_memory: bytes that one pass may take above the weights, by an estimate of what its backward pass keeps and of
            what running the prompts takes.
    """
    cfg = model.cfg
    n_rows = LAYERS_PER_PASS * n_places * (n_steps + 1)  # one at the baseline
    d_mlp, d_attn = cfg.d_mlp or 0, cfg.n_heads * cfg.d_head
    d_cached = 2 * cfg.d_head * (cfg.n_key_value_heads or cfg.n_heads)
    size = cfg.dtype.itemsize
    of_layer = 8 * cfg.d_model + 6 * d_attn + 5 * d_mlp + 4 * cfg.n_heads * (n_tokens + n_rows)
    of_row = size * cfg.n_layers * of_layer + 5 * 4 * cfg.d_vocab_out
    of_position = cfg.n_layers * d_cached + 6 * cfg.d_model + 3 * d_attn + 4 * d_mlp + 4 * cfg.n_heads * n_tokens
    fitting = max_memory // of_row
    n_prompts = min(PROMPTS_PER_PASS, fitting // n_rows, max_memory // (size * n_tokens * of_position))
    return PassSize(max(1, n_prompts), max(1, min(n_rows, fitting)))


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
        """Last logits of the rows; `paths` go up the layers, and the rows of each join at theirs."""
        of_layer: Counter[int] = Counter()
        for (_, layer), path in paths.items():
            of_layer[layer] += path.shape[1]
        hooks = replacing(paths, lambda rows: (slice(None), rows))
        residual = self.entering[min(of_layer)][:, :0]
        with siblings(self.model, self.seen) as see, self.model.hooks(fwd_hooks=hooks):
            for layer in range(min(of_layer), self.model.cfg.n_layers):
                joining = self.entering[layer].expand(-1, of_layer[layer], -1)
                residual = torch.cat([residual, joining], dim=1) if of_layer[layer] else residual
                residual = self.model(
                    residual,
                    start_at_layer=layer,
                    stop_at_layer=layer + 1,
                    past_kv_cache=self.cache,
                    attention_mask=see(residual.shape[1]),
                )
        return unembed(self.model, residual)


@contextmanager
def siblings(model: Model, seen: Bool[Tensor, "prompt prefix"]) -> Iterator[Callable[[int], Tensor]]:
    """Let every row attend to the prefix, as far as its position T - 1 would see, and to itself.

    Yields:
        From the number of rows to the attention mask that gives all of them the position T - 1; to be called before each
        pass.
    """
    attentions: list[Any] = [block.attn for block in model.blocks]
    visible: dict[str, Tensor] = {}

    def see(n_rows: int) -> Int[Tensor, "prompt key"]:
        itself = torch.eye(n_rows, dtype=torch.bool, device=seen.device).expand(len(seen), -1, -1)
        if not visible or next(iter(visible.values())).shape[2] != n_rows:
            for attn_type in {attention.attn_type for attention in attentions}:
                near = seen
                if attn_type == "local":  # position T - 1 sees the window that ends with itself
                    places = torch.arange(seen.shape[1], device=seen.device)
                    near = seen & (places > seen.shape[1] - (model.cfg.window_size or 0))
                visible[attn_type] = torch.cat([near[:, None].expand(-1, n_rows, -1), itself], -1)[:, None]
        one_place = torch.zeros(len(seen), n_rows, dtype=torch.long, device=seen.device)
        one_place[:, 0] = 1
        return torch.cat([seen.long(), one_place], dim=1)

    try:
        for attention in attentions:

            def mask(scores: Tensor, *_: object, attention: Any = attention, **__: object) -> Tensor:
                return torch.where(visible[attention.attn_type], scores, attention.IGNORE)

            attention.apply_causal_mask = mask
        yield see
    finally:
        for attention in attentions:
            vars(attention).pop("apply_causal_mask", None)
