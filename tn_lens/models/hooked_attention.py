"""HookedTransformer's attention for rows that share one prefix.

During a pass, some methods of TransformerLens' modules are replaced, so that the modules' own forward functions run,
with every hook point, but compute only the part that differs between the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.utilities.activation_functions import apply_softcap

from tn_lens.models.tensors import Replacement

Heads = Float[Tensor, "prompt row head d_head"]
KeyHeads = Float[Tensor, "prompt row key_head d_head"]
"""One vector for each head; several heads may share the keys and values of one key head."""
Scores = Float[Tensor, "prompt head row key"]
"""Attention scores or patterns. Key is each position of the prefix, then the row itself."""


def cached_norms(blocks: Iterable[Any]) -> Iterator[Replacement]:
    """Norms that reuse their last result: TransformerLens normalises the same stream for queries, keys and values."""

    def cached(normalize: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        last: list[Tensor] = []  # input and output

        def forward(stream: Tensor) -> Tensor:
            if not last or last[0] is not stream:
                last[:] = [stream, normalize(stream)]
            return last[1]

        return forward

    for block in blocks:
        yield block.ln1, "forward", cached(block.ln1.forward)


def key_mask(is_visible: Bool[Tensor, "prompt prefix"]) -> Bool[Tensor, "prompt 1 1 key"] | None:
    """The keys that rows attend to: the visible positions of the prefix and, as the last key, the row itself.

    Returns:
        None if rows attend to all keys.
    """
    itself = is_visible.new_ones(len(is_visible), 1)
    # [prompt, prefix] -> [prompt, 1 (all heads), 1 (all rows), key], with key = prefix + 1
    return None if is_visible.all() else torch.cat([is_visible, itself], 1)[:, None, None]


def packed_attention(
    attention: Any, allowed: Bool[Tensor, "row 1 column key"], key_positions: Int[Tensor, "row key"]
) -> Iterator[Replacement]:
    """Replacements for a pass over packed rows: positions and masks are given, not counted from the first column."""
    cfg = attention.cfg
    device = attention.IGNORE.device
    allowed, key_positions = allowed.to(device), key_positions.to(device)
    if can_fuse(attention):
        yield from _fused(attention, allowed)
    else:
        yield attention, "apply_causal_mask", lambda scores, *_: torch.where(allowed, scores, attention.IGNORE)
    if cfg.positional_embedding_type == "rotary":
        longest = int(key_positions.max()) + 1
        if longest > len(attention.rotary_cos):
            attention._extend_rotary_embeddings(min(cfg.n_ctx, max(longest, 2 * len(attention.rotary_cos))))
        # [row, key, rotary_dim] -> [row, key, 1 (all heads), rotary_dim]
        cos, sin = (table[key_positions][:, :, None] for table in (attention.rotary_cos, attention.rotary_sin))

        def rotated(x: Heads, *_: object, **__: object) -> Heads:
            # the columns are the last keys
            return rotate(x, cos[:, -x.shape[1] :], sin[:, -x.shape[1] :], adjacent_pairs=cfg.rotary_adjacent_pairs)

        yield attention, "apply_rotary", rotated


def can_fuse(attention: Any) -> bool:
    """Whether PyTorch's fused attention computes the same: nothing acts on scores or pattern, and nothing caps them."""
    cfg = attention.cfg
    is_hooked = any(point.fwd_hooks for point in (attention.hook_attn_scores, attention.hook_pattern))
    return not (is_hooked or cfg.attn_scores_soft_cap > 0 or cfg.use_attention_sinks)


def _fused(attention: Any, allowed: Bool[Tensor, "row 1 column key"]) -> Iterator[Replacement]:
    """Replacements that compute scores, pattern and z in one step, in which TransformerLens normalises a single dummy score."""
    queries_and_keys: list[tuple[Tensor, Tensor]] = []

    def calculate_attention_scores(
        q: Float[Tensor, "row column head d_head"], k: Float[Tensor, "row key key_head d_head"]
    ) -> Float[Tensor, "row head column 1"]:
        queries_and_keys.append((q, k))
        return q.new_zeros(len(q), q.shape[2], q.shape[1], 1)

    def calculate_z_scores(
        v: Float[Tensor, "row key key_head d_head"], pattern: Float[Tensor, "row head column 1"]
    ) -> Float[Tensor, "row column head d_head"]:
        # [row, position, head, d_head] -> [row, head, position, d_head]
        q, k, v = (each.transpose(1, 2) for each in (*queries_and_keys.pop(), v))
        z = torch.nn.functional.scaled_dot_product_attention(
            q, k.to(q), v.to(q), attn_mask=allowed, scale=1 / attention.attn_scale, enable_gqa=True
        )
        return attention.hook_z(z.transpose(1, 2))

    yield attention, "calculate_attention_scores", calculate_attention_scores
    yield attention, "apply_causal_mask", lambda scores, *_: scores
    yield attention, "calculate_z_scores", calculate_z_scores


def rotate(x: Heads, cos: Tensor, sin: Tensor, *, adjacent_pairs: bool) -> Heads:
    """Rotate the first entries of each head, as many as the tables have.

    Args:
        x: queries or keys.
        cos: table of the positions, broadcastable to `x` except for the last axis.
        sin: likewise.
        adjacent_pairs: whether pairs of neighbouring entries are rotated, or entries of both halves.
    """
    rotated, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    if adjacent_pairs:
        first, second = rotated.unflatten(-1, (-1, 2)).unbind(-1)  # both [prompt, row, head, rotary_dim / 2]
        perpendicular = torch.stack([-second, first], dim=-1).flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        perpendicular = torch.cat([-second, first], dim=-1)
    rotated = rotated * cos + perpendicular * sin
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


class SharedAttention:
    """The attention of one layer, with the keys and values of the prompts' earlier positions shared by all rows.

    Every row has position T - 1 of its prompt. Keys and values of earlier positions are those of the prompt, and the
    keys are already rotated. Rows do not attend to each other, so scores between different rows are not computed.

    Args:
        attention: TransformerLens' attention module.
        allowed: the keys that rows attend to, with the row itself as the last key. None: all keys.
    """

    keys: Float[Tensor, "prompt key_head d_head prefix"]
    values: Float[Tensor, "prompt key_head prefix d_head"]

    def __init__(self, attention: Any, allowed: Bool[Tensor, "prompt 1 1 key"] | None) -> None:
        self.attention, self.allowed = attention, allowed
        self.cos_sin: tuple[Tensor, Tensor] | None = None

    def recording(self) -> Iterator[Replacement]:
        """Replacements for the pass over the prompts, which store the keys and values of the prefix."""

        def calculate_attention_scores(q: Tensor, k: Tensor) -> Tensor:
            # without the last position: [prompt, position, head, d_head] -> [prompt, head, d_head, prefix]
            self.keys = k[:, :-1].permute(0, 2, 3, 1).contiguous()
            return cls.calculate_attention_scores(self.attention, q, k)

        def calculate_z_scores(v: Tensor, pattern: Tensor) -> Tensor:
            # [prompt, position, head, d_head] -> [prompt, head, prefix, d_head]
            self.values = v[:, :-1].transpose(1, 2).contiguous()
            return cls.calculate_z_scores(self.attention, v, pattern)

        cls = type(self.attention)
        yield self.attention, "calculate_attention_scores", calculate_attention_scores
        yield self.attention, "calculate_z_scores", calculate_z_scores

    def set_positions(self, positions: Int[Tensor, " prompt"]) -> None:
        """Set the position of all rows of each prompt."""
        if self.attention.cfg.positional_embedding_type == "rotary":
            # [prompt, rotary_dim] -> [prompt, 1 (all rows), 1 (all heads), rotary_dim]
            tables = self.attention.rotary_cos, self.attention.rotary_sin
            self.cos_sin = tables[0][positions][:, None, None], tables[1][positions][:, None, None]

    def running(self) -> Iterator[Replacement]:
        """Replacements for a pass over the rows."""
        yield self.attention, "apply_rotary", self._rotate
        yield self.attention, "calculate_attention_scores", self._scores
        yield self.attention, "apply_causal_mask", self._mask
        yield self.attention, "calculate_z_scores", self._z

    def _rotate(self, x: Heads, *_: object, **__: object) -> Heads:
        assert self.cos_sin is not None
        return rotate(x, *self.cos_sin, adjacent_pairs=self.attention.cfg.rotary_adjacent_pairs)

    def _scores(self, q: Heads, k: KeyHeads) -> Scores:
        # [prompt, row, head, d_head] -> [prompt, key_head, head of the group, row, d_head]
        grouped = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)
        prefix = grouped.flatten(2, 3) @ self.keys  # [prompt, key_head, head of the group * row, prefix]
        wide = torch.promote_types(q.dtype, torch.float32)  # matrix products accumulate in float32, too
        # the product of each query with its own key: [prompt, key_head, head of the group, row, 1]
        itself = (grouped.to(wide) * k.to(wide).transpose(1, 2)[:, :, None]).sum(-1, keepdim=True).to(q.dtype)
        # -> [prompt, head, row, prefix + 1]
        scores = torch.cat([prefix.reshape(*itself.shape[:-1], -1), itself], dim=-1).flatten(1, 2)
        return apply_softcap(scores / self.attention.attn_scale, self.attention.cfg.attn_scores_soft_cap)

    def _mask(self, scores: Scores, *_: object, **__: object) -> Scores:
        return scores if self.allowed is None else torch.where(self.allowed, scores, self.attention.IGNORE)

    def _z(self, v: KeyHeads, pattern: Scores) -> Heads:
        # [prompt, head, row, key] -> [prompt, key_head, head of the group, row, key]
        grouped = pattern.unflatten(1, (v.shape[2], -1))
        prefix, itself = grouped.split([pattern.shape[-1] - 1, 1], dim=-1)
        # [prompt, key_head, head of the group * row, d_head] -> [prompt, key_head, head of the group, row, d_head]
        z = (prefix.flatten(2, 3) @ self.values).unflatten(2, grouped.shape[2:4])
        z = z + itself * v.transpose(1, 2)[:, :, None]
        # -> [prompt, row, head, d_head]
        return self.attention.hook_z(z.permute(0, 3, 1, 2, 4).flatten(2, 3))
